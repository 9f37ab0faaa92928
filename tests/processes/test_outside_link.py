"""A link of another package, installed as pip installs it: found by its entry point, and used as if it were ours.

The package is ``tests/outside_link``; ``docs/adding/link.md`` leads through it.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from pdtransport import KVGeometry, Settings, Transport, prompt_digest
from pdtransport.errors import LinkUnavailable
from pdtransport.links.registry import check_links, load, names
from tests.processes.link_rig import End, pair, shuffled
from tests.rig import outside_package
from tests.unit.test_topology import GOOD, loaded

pytestmark = pytest.mark.timeout(240)

REPO = Path(__file__).parents[2]
PACKAGE = REPO / "tests" / "outside_link"
LINKS = {"order": ["ucx", "memfd"], "require": "memfd"}
BATCH, PAGE, BLOCKS = 256 << 10, 8192, 8
TOKENS, BLOCK_SIZE = 1000, 16
PAGES = list(range(-(-TOKENS // BLOCK_SIZE)))
WAIT_S = 30.0


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the package is installed in, where this process and those that it starts look for packages."""
    with outside_package.installed(PACKAGE, tmp_path_factory.mktemp("link")) as folder:
        yield folder


def test_it_is_known_by_its_entry_point(tmp_path: Path) -> None:
    """Settings, topology files and errors know its name, and it speaks for itself."""
    assert "memfd" in names()
    assert load("memfd").__module__ == "pdt_memfd_link"
    topology = loaded(tmp_path, GOOD + "transport: {links: {order: [memfd, ucx]}, integrity: {checksum: 'off'}}\n")
    assert topology.transport.links.order == ("memfd", "ucx")
    check_links(Settings.parse({"links": LINKS}))


def cache(fill: int) -> np.ndarray:
    return np.full((4, 64, 4, BLOCK_SIZE, 128), fill, dtype=np.uint8)


def prefill(pipe: Connection, transfer: str) -> None:
    """A process that hands its pages over, and says how that ended."""
    kv = cache(1)
    kv[:, PAGES] = np.random.default_rng(7).integers(0, 256, kv[:, PAGES].shape, dtype=np.uint8)
    with Transport(KVGeometry.of_array(kv), Settings.parse({"links": LINKS}), port=0) as transport:
        pipe.send(transport.port)
        offer = transport.offer(transfer, prompt_digest(list(range(TOKENS))), TOKENS)
        offer.ready(PAGES, tokens=TOKENS // 2)
        offer.ready(PAGES, tokens=TOKENS)
        offer.finish()
        outcome = offer.result(timeout_s=WAIT_S)
        pipe.send((kv[:, PAGES].tobytes(), outcome.ok, transport.status()["peers"][0]["link"]))
        pipe.recv()


def test_pages_of_another_process_arrive_over_it_verified() -> None:
    """The whole of a hand-off, between two processes, with links.require: nothing else could have carried it."""
    context, transfer, kv = mp.get_context("spawn"), secrets.token_hex(16), cache(2)
    pipe, theirs = context.Pipe()
    process = context.Process(target=prefill, args=(theirs, transfer), daemon=True)
    process.start()
    try:
        assert pipe.poll(WAIT_S)
        with Transport(KVGeometry.of_array(kv), Settings.parse({"links": LINKS}), port=0) as transport:
            pages = list(reversed(PAGES))  # pages of its own, in its own order
            digest = prompt_digest(list(range(TOKENS)))
            receipt = transport.receive(transfer, digest, TOKENS, pages, host="127.0.0.1", port=pipe.recv())
            assert receipt.result(timeout_s=WAIT_S).ok
            (peer,) = transport.status()["peers"]
            assert (peer["link"], peer["why"]) == ("memfd", "memfd: same host; a copy in a file in memory")
            assert peer["bytes_received"] >= kv[:, PAGES].nbytes
            assert peer["probe_bytes_s"]
            assert pipe.poll(WAIT_S)
            sent, ok, link = pipe.recv()
            assert (ok, link) == (True, "memfd")
            assert kv[:, pages].tobytes() == sent
            assert (kv[:, len(PAGES) :] == 2).all()
            pipe.send("enough")
        process.join(WAIT_S)
        assert process.exitcode == 0
    finally:
        process.kill()


def test_damage_is_reported_and_a_fence_holds() -> None:
    """In the rig that our own links are tested with: the bytes that were sent or none, and none after a fence."""
    with End(4 * BATCH, dict(LINKS)) as sender, End(4 * BATCH, dict(LINKS)) as receiver:
        assert pair(sender, receiver)[1].startswith("memfd: ")
        sender.ask("fill", 1)
        receiver.ask("fill", 2)
        spans = shuffled(BATCH // PAGE, PAGE, 3)
        before = receiver.ask("read", [(0, BATCH)])
        receiver.ask("hold_still", True)
        for key in (1, 2):
            offer, checksums = sender.ask("send", key, spans, BLOCKS)
            receiver.ask("receive", key, offer, [((key - 1) * BATCH, BATCH)], checksums, BLOCKS)
        receiver.ask("fence", [1])
        receiver.ask("hold_still", False)
        assert receiver.wait_for(("receive", 2)) is None
        assert receiver.ask("read", [(BATCH, BATCH)]) == sender.ask("read", spans)
        offer, checksums = sender.ask("send", 3, spans, BLOCKS)
        receiver.ask("receive", 3, offer, [(0, BATCH)], bytes(8) + checksums[8:], BLOCKS)
        assert receiver.wait_for(("receive", 3)) == "damaged: 1 of 8 blocks differ from their checksums, first 0"
        assert receiver.ask("read", [(0, BATCH)]) == before
        assert ("receive", 1) not in receiver.ask("ended")
        assert [sender.finish(), receiver.finish()] == [0, 0]


@pytest.mark.more
def test_it_passes_the_tests_of_our_own_links(installed: Path) -> None:
    """As docs/adding/link.md tells authors to run them: kills, stops, lies and late messages included."""
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/processes/test_links.py", "-k", "memfd"]
    environment = {**os.environ, "PDT_LINKS": "memfd", "PYTHONPATH": f"{installed}:{os.environ.get('PYTHONPATH', '')}"}
    run = subprocess.run(tests, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout


def test_a_peer_without_it_is_refused_by_name() -> None:
    """links.require does not fall back; without it, the next link carries the pair and says why."""
    with End(4096, {"order": ["cma"]}) as other, End(4096, {"order": ["memfd", "cma"]}) as open_minded:
        assert open_minded.ask("connect", other.ask("export")) == (
            "cma: same host; reads pages directly; memfd unavailable: the peer does not offer it"
        )
        with End(4096, dict(LINKS)) as strict, pytest.raises(LinkUnavailable, match=r"links.require is 'memfd'"):
            strict.ask("connect", other.ask("export"))
