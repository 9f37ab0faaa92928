"""No secret is in a log, a process list or an error's text: everything that pdlaunch starts, and the router at its most
talkative."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pdtransport.control.curve import make_keys
from pdtransport.errors import SettingsError
from pdtransport.launch import guard
from pdtransport.launch.reading import load
from tests.processes.test_launch import REPO, UP_S, Rig, wait_for
from tests.processes.test_router import Child, body, router, server

pytestmark = pytest.mark.xdist_group("launch")  # its rig's ports are those of test_launch.py
WITHIN_S = 60.0


class Secrets:
    """Every secret that a deployment has, each in its file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.texts = {
            name: f"{name}-{secrets.token_hex(16)}" for name in ("client", "admin", "server", "tenants", "salt")
        }
        self.files = {name: folder / name for name in self.texts}
        for name, text in self.texts.items():
            self.files[name].write_text(text + (" acme-corporation\n" if name == "client" else "\n"))
            self.files[name].chmod(0o600)
        self.public, self.secret = make_keys(folder / "curve")
        self.texts["curve"] = self.secret.read_text().strip()

    @property
    def router(self) -> dict[str, str]:
        named = {
            "api_key": "client",
            "admin_api_key": "admin",
            "upstream_api_key": "server",
            "tenant_secret": "tenants",
        }
        return {f"{setting}_file": str(self.files[name]) for setting, name in named.items()}

    def shown_in(self, text: str) -> list[str]:
        """Names of those that ``text`` shows, whole or in good part."""
        return [name for name, secret in self.texts.items() if secret[-16:] in text]


@pytest.fixture
def kept(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path / "secrets")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.communicate(timeout=UP_S)


def ask(url: str, path: str, key: str | None, payload: bytes | None = None) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url + path, payload, headers)
    try:
        with urllib.request.urlopen(request, timeout=WITHIN_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def everything_asked(url: str, kept: Secrets, private: str) -> str:
    """All that the router answers to right and wrong requests with right and wrong keys, and to garbage with keys in
    it."""
    answers = []
    for key in (None, "wrong", *kept.texts.values()):
        for path in (
            "/health",
            "/live",
            "/metrics",
            "/pd/status?workers=1",
            "/pd/traces",
            "/pd/trace/x",
            "/v1/models",
            "/openapi.json",
        ):
            answers.append(ask(url, path, key))
        for payload in (json.dumps({**body(), "cache_salt": private}).encode(), b"{", b'{"cache_salt": 1}'):
            answers.append(ask(url, "/v1/completions", key, payload))
    where = urlsplit(url)
    for key in kept.texts.values():
        head = f"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer {key}\r\n"
        for rest in (
            "no colon here\r\n\r\n",
            "Content-Length: x\r\n\r\n",
            "X: \x00\r\n\r\n",
            "Transfer-Encoding: chunked\r\n\r\nz",
        ):
            raw = socket.create_connection((where.hostname, where.port), timeout=WITHIN_S)
            with raw, contextlib.suppress(ConnectionError):
                raw.sendall((head + rest).encode())
                raw.shutdown(socket.SHUT_WR)
                answers.append((0, raw.recv(65536).decode(errors="replace")))
    assert {200, 400, 401} <= {status for status, _ in answers}
    return "\n".join(text for _, text in answers)


def test_the_router_at_debug_level_tells_no_secret(kept: Secrets) -> None:
    private = f"private-{secrets.token_hex(16)}"
    options = [part for name, file in kept.router.items() for part in (f"--{name.replace('_', '-')}", file)]
    options += ["--curve-public-key-file", str(kept.public), "--curve-secret-key-file", str(kept.secret)]
    with (
        server("prefill") as (p, _),
        server("decode") as (d, other),
        router("--prefill", f"{p}@127.0.0.1:9", "--decode", d, *options, "--log-level", "debug") as (url, child),
    ):
        answers = everything_asked(url, kept, private)
        other.process.kill()
        other.process.wait(WITHIN_S)
        answers += ask(url, "/v1/completions", kept.texts["client"], json.dumps(body()).encode())[1]
        child.process.terminate()
        said = child.process.communicate(timeout=WITHIN_S)[0]
    for text in (said, answers):
        assert kept.shown_in(text) == []
        assert private not in text
        assert "acme-corporation" not in text


WORKERS = """
import json, logging, secrets, sys
logging.basicConfig(level="DEBUG")
import numpy as np
from pdtransport import KVGeometry, Settings, Transport, TransferFailed, prompt_digest

def transport(name, keys):
    control = {"port": 0, "connect_s": 2.0, "curve_public_key_file": keys[0], "curve_secret_key_file": keys[1]}
    settings = Settings.parse({"control": control, "pool": {"salt_file": sys.argv[2]}})
    print(settings, file=sys.stderr)
    return Transport(KVGeometry.of_array(np.zeros((1, 8, 2, 16, 64), np.uint8)), settings, engine=name, port=0)

good, bad = json.loads(sys.argv[1])
digest = prompt_digest([1, 2])
with transport("p", good) as p, transport("d", good) as d, transport("m", bad) as m:
    for taker in (d, m):
        transfer = secrets.token_hex(16)
        offer = p.offer(transfer, digest, 2)
        offer.ready([0], 2)
        offer.finish()
        receipt = taker.receive(transfer, digest, 2, [1], host="127.0.0.1", port=p.port)
        try:
            print("ended:", receipt.result(30).ok)
        except TransferFailed as error:
            print("failed:", error)
    print(json.dumps([p.status(), d.status(), m.status()]))
"""


def test_workers_at_debug_level_tell_no_secret(kept: Secrets, tmp_path: Path) -> None:
    """Neither where keys fit nor where they do not, in logs, errors and status."""
    other = make_keys(tmp_path / "other")
    pairs = json.dumps([[str(kept.public), str(kept.secret)], [str(other[0]), str(other[1])]])
    argv = [sys.executable, "-c", WORKERS, pairs, str(kept.files["salt"])]
    done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, timeout=UP_S)
    assert "ended: True" in done.stdout, done.stderr
    assert "failed: " in done.stdout, done.stderr
    assert "DEBUG" in done.stderr
    for secret in (*kept.texts.values(), other[1].read_text().strip()):
        assert secret[-16:] not in done.stdout + done.stderr


@pytest.mark.more
def test_nothing_that_pdlaunch_starts_or_writes_shows_a_secret(
    rig: Rig, kept: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command lines of every process, all files of the run, all output, and what `check` and `status` print."""
    monkeypatch.setenv("VLLM_API_KEY", kept.texts["server"])
    rig.data["router"] |= kept.router
    rig.data["transport"] = {
        "control": {"curve_public_key_file": str(kept.public), "curve_secret_key_file": str(kept.secret)},
        "pool": {"salt_file": str(kept.files["salt"])},
    }
    rig.up()
    rig.wait_up()
    assert rig.process is not None
    url = f"http://127.0.0.1:{rig.data['router']['port']}"
    wait_for(lambda: ask(url, "/health", None)[0] == 200)
    lines = {
        pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        for pid in (rig.process.pid, *guard.descendants(rig.process.pid))
    }
    assert len(lines) >= 4  # pdlaunch, two servers under their guards, the router
    assert any("pdtransport.router.cli" in line for line in lines.values())
    texts = [*lines.values(), everything_asked(url, kept, "private")]
    for verb in (["check", "--json"], ["status", "--run-dir", str(rig.run_dir)]):
        argv = [sys.executable, "-m", "tests.processes.launch_standins", verb[0], str(rig.file), *verb[1:]]
        done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, timeout=UP_S)
        assert "usage:" not in done.stderr
        texts.append(done.stdout + done.stderr)
    rig.process.terminate()
    texts.append(rig.end()[1])
    texts += [file.read_text(errors="replace") for file in sorted(rig.run_dir.rglob("*")) if file.is_file()]
    for text in texts:
        assert kept.shown_in(text) == [], text[:2000]


@pytest.mark.parametrize(
    ("section", "told", "says"),
    [
        ("router", {"api_key": "hush"}, "api_key_file"),
        ("router", {"admin_api_key": "hush"}, "admin_api_key_file"),
        ("router", {"upstream_api_key": "hush"}, "upstream_api_key_file"),
        ("transport", {"pool": {"salt": "hush"}}, "pool.salt_file"),
        ("defaults", {"args": {"api-key": "hush"}}, "VLLM_API_KEY"),
        ("defaults", {"args": {"hf_token": "hush"}}, "HF_TOKEN"),
    ],
)
def test_a_topology_with_a_secret_in_it_is_refused_with_the_remedy(
    rig: Rig, section: str, told: dict[str, object], says: str
) -> None:
    rig.data[section] = {**rig.data.get(section, {}), **told}
    with pytest.raises(SettingsError) as caught:
        load(rig.file)
    assert says in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("place", ["http://user:hush@127.0.0.1:1", "http://user:hush@127.0.0.1"])
def test_a_password_in_a_servers_url_is_refused_and_not_shown(place: str) -> None:
    with Child("-m", "pdtransport.router.cli", "--prefill", place, "--decode", "http://127.0.0.1:2") as child:
        said = child.process.communicate(timeout=WITHIN_S)[0]
    assert child.process.returncode == 2
    assert "hush" not in said
    assert "Traceback" not in said
