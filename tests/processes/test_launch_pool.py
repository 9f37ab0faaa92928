"""``pdlaunch pool`` against a real pool: what it shows, what it does, and mistakes in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdtransport.kv.keys import KeySpace
from pdtransport.launch.cli import main
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.core.key_spaces import Space
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings
from tests.processes.pool_rig import CHUNK, Pages, until

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-lm"
HALVES = [
    KeySpace(model="tiny-lm", revision="r", dtype="float32", layout="l", shard=f"heads {head}", chunk_tokens=8)
    for head in range(2)
]
SPACE = Space.of(HALVES, served=("tiny",), tokenizer=str(MODEL))
SALTED = Space.of([replace(half, chunk_tokens=4) for half in HALVES], salted=True, served=("tiny",))
TEXT = "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    return parser.parse_args(argv)\n" * 2


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolClient]:
    """Of a pool with a disk, to which engines with and without a salt told of their keys."""
    directory = Path(f"/dev/shm/pdt-test-{os.getpid()}")
    disk = {"path": tmp_path_factory.mktemp("disk"), "bytes": 256 * CHUNK}
    made = PoolSettings.parse(
        {"dir": directory, "memory_bytes": 64 * CHUNK, "disk": disk, "quotas": {"alice": 8 * CHUNK}}
    )
    with Pool(made), PoolClient(directory=directory) as client, PoolClient(directory=directory) as second:
        for of, space in ((client, SPACE), (second, SALTED)):
            of.lookup([]).result()
            of.introduce(space.model_dump_json())
        until(lambda: len(client.spaces().result()) == 2, "spaces were not told")
        yield client
    for left in directory.glob("*"):
        left.unlink()
    directory.rmdir()


class Command:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.status = 0

    def text(self, *arguments: object) -> str:
        directory = f"/dev/shm/pdt-test-{os.getpid()}"
        self.status = main(["pool", str(arguments[0]), "--dir", directory, *map(str, arguments[1:])])
        told = self._capsys.readouterr()
        return told.out if self.status == 0 else told.err

    def json(self, *arguments: object) -> Any:
        return json.loads(self.text(*arguments, "--json"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def put(client: PoolClient, keys: list[bytes]) -> None:
    memory = Pages(1)
    assert client.store(keys, [memory.runs(0)] * len(keys)).result().prefix == len(keys)
    until(lambda: not client.status().result()["writeback_bytes"], "chunks were not written")


def test_a_prompt_is_found_by_text_and_by_tokens(client: PoolClient, command: Command, tmp_path: Path) -> None:
    """The engine's tokenizer makes the same ids; a chunk of which a part is missing is not there; tiers are told."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(MODEL).encode(TEXT)
    parts = SPACE.parts(ids)
    assert len(parts) >= 4
    put(client, [key for chunk in parts[:3] for key in chunk] + parts[3][:1])
    client.manage([parts[2][1]], "leave").result()
    (found,) = command.json("lookup", "--prompt", TEXT)
    assert (found["chunks"], found["there"], found["tokens_there"]) == (len(parts), 3, 24)
    assert found["by_tier"] == {"memory": 2, "disk": 1}
    (tmp_path / "prompt").write_text(TEXT)
    (tmp_path / "ids").write_text(json.dumps(ids))
    for how in (
        ("--prompt-file", tmp_path / "prompt"),
        ("--tokens", *ids),
        ("--tokens-file", tmp_path / "ids", "--model", "tiny"),
    ):
        assert command.json("lookup", *how) == [found]
    text = command.text("lookup", "--tokens", *ids)
    assert f"3 of {len(parts)} chunks of 8 tokens are there, 24 of {len(ids)} tokens: memory 2, disk 1" in text


def test_a_salted_prompt_needs_its_salt(client: PoolClient, command: Command, tmp_path: Path) -> None:
    """Engine's and request's salts come from files, and nothing else finds these chunks."""
    tokens = list(range(100, 112))
    put(client, [key for chunk in SALTED.parts(tokens, salt="s3cret", cache_salt="alice") for key in chunk])
    (tmp_path / "salt").write_text("s3cret\n")
    (tmp_path / "cache").write_text("alice\n")
    salted = ("--tokens", *tokens, "--salt-file", tmp_path / "salt")
    assert [each["there"] for each in command.json("lookup", "--tokens", *tokens)] == [0]
    assert [each["there"] for each in command.json("lookup", *salted)] == [0]
    assert [each["there"] for each in command.json("lookup", *salted, "--cache-salt-file", tmp_path / "cache")] == [3]


def test_chunks_are_managed_by_prompt_by_key_and_all(client: PoolClient, command: Command) -> None:
    """Each verb says for how many chunks it is so now."""
    tokens = list(range(200, 232))
    keys = [key for chunk in SPACE.parts(tokens) for key in chunk]
    put(client, [*keys, SPACE.parts(range(900, 908))[0][0]])
    prompt = ("--tokens", *tokens)
    assert command.json("move", *prompt, "--to", "disk") == {"done": 8, "of": 8}
    assert command.json("prefetch", "--key", keys[0].hex()) == {"done": 1, "of": 1}
    assert command.text("pin", *prompt, "--for", "30") == "8 of 8 chunks are pinned\n"
    assert command.json("move", "--all", "--to", "below")["of"] > 8
    assert client.look(keys).result().tiers == bytes([3] * 8)
    assert command.text("unpin", *prompt) == "8 chunks in memory are not pinned\n"
    assert command.json("pin", *prompt, "--soft") == {"done": 8, "of": 8}
    assert command.json("clear", *prompt) == {"done": 8, "of": 8}
    assert command.json("clear", "--tenant", "alice") == {"done": 0, "of": 0}
    assert command.json("clear", "--all")["done"] >= 0
    assert client.status().result()["chunks"] == 0


def test_the_status_is_a_table_or_json(client: PoolClient, command: Command) -> None:
    """People see tiers with sizes and hit rates; programs get all of it."""
    put(client, [SPACE.parts(range(8))[0][0]])
    lines = command.text("status").splitlines()
    assert lines[0].startswith("pool default: ")
    assert [line.split()[0] for line in lines[1:4]] == ["TIER", "memory", "disk"]
    status = command.json("status")
    assert {row["tier"] for row in status["held"]} == {"memory", "disk"}
    assert status["hits"]["loaded_from"].keys() == {"memory", "disk", "waited", "missed"}
    assert "tiny-lm" in command.text("spaces")
    assert [each["chunk_tokens"] for each in command.json("spaces")] == [4, 8]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("status", "--pool", "other"), 1, "check that the pool is running"),
        (("status", "--pool", "a/b"), 2, "name"),
        (("pin", "--key", "12"), 2, "64 hexadecimal digits"),
        (("pin", "--all", "--for", "0"), 2, "more than 0"),
        (("move", "--all", "--to", "tape"), 2, "memory, disk, below"),
        (("compress", "--all"), 2, "--disk-codec"),
        (("clear", "--tenant", "bob"), 2, "no quota"),
        (("clear", "--tenant", "b b"), 2, "tenant"),
        (("lookup", "--tokens", "-1"), 2, "token ids"),
        (("lookup", "--tokens", "1", "--model", "big"), 2, "choose one: tiny-lm"),
        (("lookup", "--prompt", "x", "--tokenizer", "/nowhere"), 2, "--tokenizer"),
        (("lookup", "--prompt-file", "/nowhere"), 2, "/nowhere"),
        (("lookup", "--tokens-file", __file__), 2, "not a JSON list"),
        (("lookup", "--tokens", "1", "--salt-file", "/dev/null"), 2, "empty"),
        (("pin", "--tokens", "1"), 2, "shorter than a chunk"),
    ],
)
def test_mistakes_are_one_line(
    client: PoolClient, command: Command, arguments: tuple[str, ...], status: int, says: str
) -> None:
    """Whatever can't be done is said in one line that names the option."""
    text = command.text(*arguments)
    assert (command.status, text.count("\n")) == (status, 1), text
    assert says in text
    assert text.startswith("pdlaunch: ")
