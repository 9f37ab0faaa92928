"""An engine of another package, attached by ``pdtransport.engine`` alone: prefill in one process, decode in another.

The package is ``tests/outside_engine``, an engine on transformers with a paged KV cache of its own, here with tiny-lm.
``docs/adding/engine.md`` leads through it. KV is float32, so that no token hangs on how a forward pass is cut.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import secrets
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.rig import outside_package
from tests.rig.cases import WrongAnswer
from tests.rig.checkpoints import altered
from tests.rig.documents import blocks
from tests.rig.prompts import Prompts
from tests.rig.servers import TINY_LM

pytestmark = [
    pytest.mark.timeout(280),
    pytest.mark.xdist_group("outside_engine"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
]

PACKAGE = Path(__file__).parents[1] / "outside_engine"
PAGE = outside_package.ADDING / "engine.md"
BLOCK, BLOCKS, CHUNK, ANSWER = 16, 64, 32, 12
BLOCK_BYTES = 8 * 2 * 4 * 32 * 4 * BLOCK  # tiny-lm: layers, keys and values, heads, their size, float32
LENGTHS = (2, 15, 16, 17, 33, 161)  # of prompts: around the edges of blocks and of chunks
WAIT_S = 60.0


def run_engine(pipe: Connection, model: str, name: str) -> None:
    """A process with one engine. It does what it is told, and else takes steps, unless it was told how many."""
    import torch
    from paged_transformers import Engine

    torch.set_num_threads(1)
    engine = Engine(model, name=name, blocks=BLOCKS, block_size=BLOCK, chunk=CHUNK)
    pipe.send(("ready", engine.transport.port))
    left = sys.maxsize
    while True:
        while pipe.poll(0 if engine.busy and left else None):
            order, *args = pipe.recv()
            if order == "close":
                engine.close()
                return
            if order == "steps":
                (left,) = args
            elif order == "status":
                pipe.send(
                    ("status", {**engine.transport.status(), "free": len(engine.pages.free), "busy": engine.busy})
                )
            elif order == "generate":
                ids = torch.tensor(args[:1])
                more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": ANSWER, "do_sample": False}
                pipe.send(("generated", engine.model.generate(ids, **more)[0, ids.shape[1] :].tolist()))
            else:
                getattr(engine, order)(*args)
        if engine.busy and left:
            left -= 1
            for answer in engine.step():
                pipe.send(("answer", answer))


class Running:
    """An engine in a process of its own."""

    def __init__(self, name: str, model: Path = TINY_LM) -> None:
        context = mp.get_context("forkserver")  # which imports torch and transformers once
        context.set_forkserver_preload(["paged_transformers", "transformers.models.llama.modeling_llama", __name__])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_engine, args=(theirs, str(model), name), daemon=True)
        self._process.start()
        theirs.close()
        self._heard: list[tuple[str, Any]] = []
        self._port = 0

    @property
    def port(self) -> int:
        """Where it listens, as soon as it does."""
        self._port = self._port or self.hear("ready")
        return self._port

    def tell(self, order: str, *args: Any) -> None:
        self._pipe.send((order, *args))

    def hear(self, kind: str) -> Any:
        """The next of its kind; others are kept."""
        deadline = time.monotonic() + WAIT_S
        while True:
            for heard in self._heard:
                if heard[0] == kind:
                    self._heard.remove(heard)
                    return heard[1]
            assert self._pipe.poll(max(0.0, deadline - time.monotonic())), f"no {kind} came"
            self._heard.append(self._pipe.recv())

    def answer(self, prompt: list[int], tokens: int = ANSWER, params: Any = None) -> Any:
        self.tell("add", secrets.token_hex(4), prompt, tokens, params)
        return self.hear("answer")

    def status(self) -> Any:
        self.tell("status")
        return self.hear("status")

    def until(self, what: Any) -> Any:
        """The status for which ``what`` is true."""
        deadline = time.monotonic() + WAIT_S
        while not what(status := self.status()):
            assert time.monotonic() < deadline, status
            time.sleep(0.02)
        return status

    def kill(self) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join(WAIT_S)

    def close(self) -> None:
        if self._process.is_alive():
            self.tell("close")
            self._process.join(WAIT_S)
            assert self._process.exitcode == 0

    def end(self) -> None:
        self._process.kill()


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with outside_package.installed(PACKAGE, tmp_path_factory.mktemp("engine")) as folder:
        yield folder


@pytest.fixture(scope="module")
def pair(package: Path) -> Iterator[tuple[Running, Running]]:
    """A prefill and a decode instance."""
    prefill, decode = Running("prefill"), Running("decode")
    try:
        yield prefill, decode
        prefill.close()
        decode.close()
    finally:
        prefill.end()
        decode.end()


@pytest.fixture
def nothing_left(pair: tuple[Running, Running]) -> Iterator[None]:
    """At the end, each block of both engines can be used again."""
    yield
    for engine in pair:
        status = engine.until(lambda status: not status["busy"])
        assert status["free"] == BLOCKS
        assert not any(status["live"].values()), status["live"]


def check(answer: Any, prompt: list[int], engine: Running) -> None:
    """Is it what transformers generates by itself, in ``engine``?"""
    engine.tell("generate", prompt)
    expected = engine.hear("generated")
    if answer.tokens != expected:
        raise WrongAnswer(f"a prompt of {len(prompt)} tokens was answered with {answer.tokens}, not {expected}")


def received(status: Any) -> int:
    """Blocks that crossed and were verified."""
    return int(status["counters"].get("blocks_received", 0))


def latest(engine: Running) -> Any:
    """The transfer that ended last."""
    return engine.status()["transfers"][-1]


def where(prefill: Running, transfer: str) -> dict[str, Any]:
    """What a router that asks both at once tells decode."""
    return {
        "do_remote_prefill": True,
        "transfer_id": transfer,
        "remote_host": "127.0.0.1",
        "remote_port": prefill.port,
        "tp_size": 1,
    }


@pytest.mark.parametrize("length", LENGTHS)
def test_decode_answers_from_pages_of_another_process(
    pair: tuple[Running, Running], nothing_left: None, length: int
) -> None:
    """Token for token what one process answers, with its pages and with transformers' own cache; decode computes no
    more of the prompt than its last token, and every block has crossed, verified."""
    prefill, decode = pair
    prompt = Prompts(length).one(length)
    before = received(decode.status())
    first = prefill.answer(prompt, 1, {"do_remote_decode": True})
    answer = decode.answer(prompt, params=first.kv_transfer_params)
    for each in (answer, prefill.answer(prompt)):
        check(each, prompt, decode)
    assert (first.prefilled, answer.prefilled) == (length, 1)
    count = -(-length // BLOCK)
    transfer = latest(decode)
    assert (transfer["transfer"], transfer["state"]) == (first.kv_transfer_params["transfer_id"], "ready")
    assert (transfer["blocks"], transfer["bytes"]) == (count, count * BLOCK_BYTES)
    assert received(decode.status()) == before + count


def test_what_decode_has_already_is_not_sent_again(pair: tuple[Running, Running], nothing_left: None) -> None:
    """Whole blocks of a prefix that an earlier prompt left, received or computed: only what follows crosses."""
    prefill, decode = pair
    begin, rest = Prompts(71).one(4 * BLOCK), Prompts(72).one(40)
    first = prefill.answer(begin + rest[:20], 1, {"do_remote_decode": True})
    decode.answer(begin + rest[:20], params=first.kv_transfer_params)
    prompt = begin + rest[20:]
    second = prefill.answer(prompt, 1, {"do_remote_decode": True})
    answer = decode.answer(prompt, params=second.kv_transfer_params)
    check(answer, prompt, decode)
    assert (second.prefilled, answer.prefilled) == (20, 1)
    transfer = latest(decode)
    assert (transfer["skipped_blocks"], transfer["bytes"]) == (4, 2 * BLOCK_BYTES)


def half_way(prefill: Running, decode: Running, prompt: list[int]) -> str:
    """Ask both at once, prefill for three chunks of the prompt only; returns the transfer's id."""
    transfer = secrets.token_hex(16)
    prefill.tell("steps", 0)
    decode.tell("add", "half way", prompt, ANSWER, where(prefill, transfer))
    prefill.tell("add", "half way", prompt, 1, {"do_remote_decode": True, "transfer_id": transfer})
    prefill.tell("steps", 3)
    return transfer


def test_pages_leave_while_the_prompt_is_computed(pair: tuple[Running, Running], nothing_left: None) -> None:
    """Asked at once, decode has the first chunks' blocks while prefill stands still before the last."""
    prefill, decode = pair
    prompt = Prompts(81).one(5 * CHUNK)
    before = received(decode.status())
    half_way(prefill, decode, prompt)
    there = before + 3 * CHUNK // BLOCK
    assert decode.until(lambda status: received(status) >= there)["busy"]
    prefill.tell("steps", sys.maxsize)
    first, answer = prefill.hear("answer"), decode.hear("answer")
    check(answer, prompt, decode)
    assert (first.prefilled, answer.prefilled) == (len(prompt), 1)


def test_an_abort_on_either_side_frees_both(pair: tuple[Running, Running], nothing_left: None) -> None:
    """Whoever's client leaves while pages are under way: nothing is answered, and no block stays in use."""
    prefill, decode = pair
    for leaver in (decode, prefill):
        prompt = Prompts(90 + pair.index(leaver)).one(5 * CHUNK)
        before = received(decode.status())
        half_way(prefill, decode, prompt)
        decode.until(lambda status, before=before: received(status) > before)
        for engine in pair if leaver is decode else (prefill,):
            engine.tell("abort", "half way")
        prefill.tell("steps", sys.maxsize)
    assert decode.hear("answer").prefilled == len(prompt)  # whom prefill left alone


def test_decode_computes_what_a_killed_prefill_took_with_it(pair: tuple[Running, Running], nothing_left: None) -> None:
    """Prefill dies with half of the pages sent: decode uses none of them, and answers the same."""
    _, decode = pair
    victim = Running("victim")
    try:
        prompt = Prompts(101).one(5 * CHUNK)
        before = received(decode.status())
        transfer = half_way(victim, decode, prompt)
        decode.until(lambda status: received(status) >= before + 3 * CHUNK // BLOCK)
        victim.kill()
        answer = decode.hear("answer")
        check(answer, prompt, decode)
        assert answer.prefilled == len(prompt)
        assert (latest(decode)["transfer"], latest(decode)["state"]) == (transfer, "failed")
    finally:
        victim.end()


def test_pages_of_other_weights_are_refused(pair: tuple[Running, Running], nothing_left: None, tmp_path: Path) -> None:
    """An engine whose weights differ in one layer looks the same otherwise; its pages are nobody's."""
    _, decode = pair
    other = Running("other", altered(TINY_LM, tmp_path / "altered"))
    try:
        prompt = Prompts(111).one(50)
        first = other.answer(prompt, 1, {"do_remote_decode": True})
        answer = decode.answer(prompt, params=first.kv_transfer_params)
        check(answer, prompt, decode)
        assert answer.prefilled == len(prompt)
        assert "weights" in latest(decode)["reason"]
        other.close()
    finally:
        other.end()


def test_the_page_shows_the_package() -> None:
    """Each block of docs/adding/engine.md stands in the package that these tests run."""
    source = "\n".join(path.read_text() for path in sorted((PACKAGE / "paged_transformers").glob("*.py")))
    project = (PACKAGE / "pyproject.toml").read_text()
    shown = blocks(PAGE)
    assert {block.language for block in shown} == {"python", "toml"}
    for block in shown:
        whole = source if block.language == "python" else project
        text = block.text.strip("\n")
        assert any(textwrap.indent(text, " " * depth) in whole for depth in (0, 4, 8)), f"line {block.line}"
