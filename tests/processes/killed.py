"""A peer is killed in the middle of its batches, again and again; the survivor must not notice more than it has to.

    python -m tests.processes.killed --link cma [--times 20] [--device cuda [--cards 0,1]] [--json FILE]

One process survives, as decode or as prefill by turns, and a second pair of hands, the *friend*, lives beside it the
whole time. Each time a fresh *victim* exchanges transfers with the survivor without pause, several at once, and gets
SIGKILL at a seeded moment while bytes flow. Then: every transfer under way ends by itself; no page is written any more;
nothing is held for transfers; whatever was reported as received is right byte for byte, before and after; and the next
transfer with the friend goes well. With ``--device cuda`` pages lie in GPU memory, with ``twin`` in that of a stand-in
for a GPU (see tests/rig/twin_gpu.py); with ``--cards`` the survivor's on the first of two GPUs, all others' on the
second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pdtransport import KVGeometry, Settings, Transport, prompt_digest
from pdtransport.control.limits import RETRY_FOR_S
from pdtransport.kv.geometry import Region
from pdtransport.transfer.outcome import Outcome
from tests.rig import twin_gpu

Side = Literal["prefill", "decode"]
SIDES: tuple[Side, Side] = ("prefill", "decode")
Device = Literal["cpu", "cuda", "twin"]
HOST = "127.0.0.1"
LAYERS, HEADS, BLOCK_SIZE = 4, 4, 16
SLOT = {"cpu": 256, "twin": 256, "cuda": 8192}  # bytes of one head of one token: blocks of 64 KiB, of 2 MiB on a GPU
BATCHES = 8  # in a transfer
LANES, LANE_BLOCKS = 4, 128  # transfers at a time, and the blocks that each one's pages take turns in
CHUNKS = 4  # a prompt is computed in so many steps
STARTED_S = 60.0  # a process with a CUDA context takes a while
ENDED_S = 30.0
QUIET_S = 0.2
LATEST_KILL_S = 0.4
MAX_FILES = 12  # more open files than before the first kill


class Memory:
    """A KV cache of ``[layers, blocks, heads, tokens, slot]`` bytes in host or GPU memory."""

    def __init__(self, device: Device, card: int) -> None:
        self.xp: Any = np
        self.device = device
        shape = (LAYERS, LANES * LANE_BLOCKS, HEADS, BLOCK_SIZE, SLOT[device])
        if device == "cuda":
            import cupy

            self.xp = cupy
            cupy.cuda.Device(card).use()
            self.kv: Any = cupy.zeros(shape, dtype=np.uint8)
        elif device == "twin":
            self._memory = twin_gpu.DeviceMemory(int(np.prod(shape)), card)
            self.kv = self._memory.array(shape)
        else:
            self.kv = np.zeros(shape, dtype=np.uint8)
        geometry = KVGeometry.of_array(self.kv)
        self.geometry = replace(geometry, device=card) if device == "twin" else geometry
        first = self.geometry.layers[0]
        self.regions = [Region(first.address, self.kv.nbytes, self.kv, self.geometry.device)]

    def content(self, seed: int, blocks: int) -> Any:
        """What a transfer's pages hold: ``[layers, blocks, heads, tokens, slot]``, no two words alike."""
        words = LAYERS * blocks * HEADS * BLOCK_SIZE * SLOT[self.device] // 8
        flat = self.xp.arange(words, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        return flat.view(np.uint8).reshape(LAYERS, blocks, HEADS, BLOCK_SIZE, SLOT[self.device])

    def fill(self, pages: Sequence[int], seed: int) -> None:
        self.kv[:, pages] = self.content(seed, len(pages))
        self.settle()

    def holds(self, pages: Sequence[int], seed: int) -> bool:
        return bool((self.kv[:, pages] == self.content(seed, len(pages))).all())

    def settle(self) -> None:
        """Wait until the GPU has done what was asked of it."""
        if self.device == "cuda":
            self.xp.cuda.runtime.deviceSynchronize()

    def free_bytes(self) -> int:
        """Free memory of the GPU; 0 in host memory."""
        if self.device != "cuda":
            return 0
        self.xp.get_default_memory_pool().free_all_blocks()  # what our own comparisons took
        return int(self.xp.cuda.runtime.memGetInfo()[0])


@dataclass(frozen=True)
class Job:
    """One transfer. ``source`` and ``target`` are its pages on prefill's and on decode's side."""

    transfer: str
    seed: int
    source: tuple[int, ...]
    target: tuple[int, ...]
    port: int = 0  # of prefill's control channel

    @property
    def digest(self) -> bytes:
        return prompt_digest([self.seed, *range(3)])

    @property
    def tokens(self) -> int:
        return len(self.source) * BLOCK_SIZE


def settings_for(link: str, device: Device) -> Settings:
    batch = LAYERS * LANE_BLOCKS * HEADS * BLOCK_SIZE * SLOT[device] // BATCHES
    deadlines = {"arrival_s": 10.0, "answer_s": 3.0, "hold_s": 3.0, "stall_s": 5.0}
    control = {"heartbeat_s": 0.2, "liveness_s": 2.0}
    links = {"order": [link], "batch_bytes": batch, "gpu_batch_bytes": batch}
    return Settings.parse({"links": links, "deadlines": deadlines, "control": control})


def gpu(device: Device) -> AbstractContextManager[Any]:
    """In force while a transport of ``device`` lives."""
    return twin_gpu.installed() if device == "twin" else nullcontext()


class Worker:
    """A transport and its memory; what both sides of a transfer do."""

    def __init__(self, link: str, device: Device, name: str, card: int) -> None:
        self.memory = Memory(device, card)
        self.transport = Transport(
            self.memory.geometry, settings_for(link, device), engine=name, port=0, regions=self.memory.regions
        )

    def give(self, job: Job) -> Any:
        """Prefill's part: the pages become final in a few steps."""
        self.memory.fill(job.source, job.seed)
        offer = self.transport.offer(job.transfer, job.digest, job.tokens)
        for chunk in range(1, CHUNKS + 1):
            offer.ready(job.source, job.tokens * chunk // CHUNKS)
        offer.finish()
        return offer

    def take(self, job: Job) -> Any:
        """Decode's part."""
        return self.transport.receive(job.transfer, job.digest, job.tokens, job.target, host=HOST, port=job.port)

    def live(self) -> int:
        return sum(self.transport.status()["live"].values())


def serve(pipe: Connection, link: str, device: Device, side: Side, name: str, card: int) -> None:
    """A peer's process: does its side of the jobs that come through ``pipe`` and answers with (transfer, went well)."""
    consumer: list[tuple[Job, Any]] = []
    with ExitStack() as stack:
        stack.enter_context(gpu(device))
        worker = Worker(link, device, name, card)
        stack.enter_context(worker.transport)
        pipe.send(worker.transport.port)
        while True:
            try:
                if pipe.poll(0.001 if consumer else None):
                    job: Job = pipe.recv()
                    if side == "prefill":
                        worker.give(job)
                    else:
                        consumer.append((job, worker.take(job)))
            except EOFError:
                return
            for ended in [entry for entry in consumer if entry[1].future.done()]:
                consumer.remove(ended)
                job, receipt = ended
                pipe.send((job.transfer, receipt.future.result().ok and worker.memory.holds(job.target, job.seed)))


class Peer:
    """A process that does ``side``'s part."""

    def __init__(self, link: str, device: Device, side: Side, name: str, card: int) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: Any = context.Process(target=serve, args=(theirs, link, device, side, name, card), daemon=True)
        self.process.start()
        theirs.close()
        self.side = side
        self.port: int = self.answer(STARTED_S)

    def answer(self, timeout_s: float) -> Any:
        if not self.pipe.poll(timeout_s):
            raise AssertionError(f"the {self.side} peer did not answer within {timeout_s:.0f} s")
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@dataclass
class Tally:
    """What happened in one round. ``cut``: transfers that ended for want of the victim after bytes had crossed."""

    side: Side
    went_well: int = 0
    cut: int = 0
    unstarted: int = 0
    ended_s: float = 0.0


class Survivor:
    """Lives through all kills. ``rounds`` are kept for the report.

    Args:
        cards: numbers of the GPUs that its own pages, and all others', lie on.
    """

    def __init__(self, link: str, device: Device, seed: int, cards: tuple[int, int] = (0, 0)) -> None:
        self._link, self._device, self._card = link, device, cards[1]
        self._dice = random.Random(seed)
        self._stack = ExitStack()
        self._stack.enter_context(gpu(device))
        self._worker = Worker(link, device, "survivor", cards[0])
        self._stack.enter_context(self._worker.transport)
        self._friends = {side: Peer(link, device, side, f"friend-{side}", cards[1]) for side in SIDES}
        self._seed = seed << 20
        for side in self._friends:
            self._serves_on(side)
        self.rounds: list[Tally] = []
        self._files = len(os.listdir("/proc/self/fd"))
        self._free = self._worker.memory.free_bytes()

    def __enter__(self) -> Survivor:
        return self

    def __exit__(self, *_: object) -> None:
        for friend in self._friends.values():
            friend.kill()
        self._stack.close()

    def round(self, victim_side: Side) -> Tally:
        """One victim, from its start to the proof that it is not missed.

        Raises:
            AssertionError: a promise was broken.
        """
        victim = Peer(self._link, self._device, victim_side, f"victim-{len(self.rounds)}", self._card)
        tally, give_up = Tally(victim_side), time.monotonic() + ENDED_S
        lanes: list[tuple[Job, Any] | None] = [None] * LANES
        before, kill_at, moving = self._bytes(), float("inf"), False
        while time.monotonic() < kill_at or not moving:
            for lane, under_way in enumerate(lanes):
                if under_way is None or under_way[1].future.done():
                    if under_way is not None:
                        tally.went_well += self._right(*under_way, victim_side)
                    lanes[lane] = self._begin(victim, lane)
            while victim.side == "decode" and victim.pipe.poll(0):
                transfer, good = victim.pipe.recv()
                assert good, f"transfer {transfer}: wrong bytes were accepted"
            now = self._bytes()
            before, moving = now, now > before
            if moving and kill_at == float("inf"):
                kill_at = time.monotonic() + self._dice.uniform(0, LATEST_KILL_S)
            assert time.monotonic() < give_up, "no bytes flow between the survivor and its victim"
        victim.kill()
        killed = time.monotonic()
        for under_way in lanes:
            assert under_way is not None
            outcome: Outcome = under_way[1].future.result(ENDED_S)  # its own deadlines must be shorter
            if outcome.ok:
                tally.went_well += self._right(*under_way, victim_side)
            elif "first_batch" in outcome.events or outcome.nbytes:
                tally.cut += 1
            else:
                tally.unstarted += 1
        tally.ended_s = time.monotonic() - killed
        self._nothing_left()
        self._serves_on(victim_side)
        self.rounds.append(tally)
        return tally

    def _begin(self, peer: Peer, lane: int) -> tuple[Job, Any]:
        """Give both sides a transfer within a lane's pages, in an order of its own."""
        self._seed += 1
        base = lane * LANE_BLOCKS
        source, target = (
            tuple(base + page for page in self._dice.sample(range(LANE_BLOCKS), LANE_BLOCKS)) for _ in range(2)
        )
        port = peer.port if peer.side == "prefill" else self._worker.transport.port
        job = Job(secrets.token_hex(16), self._seed, source, target, port)
        handle = self._worker.take(job) if peer.side == "prefill" else self._worker.give(job)
        peer.pipe.send(job)
        return job, handle

    def _bytes(self) -> int:
        """Bytes of pages that this side has sent or received so far."""
        counters = self._worker.transport.status()["counters"]
        return int(counters.get("bytes_received", 0) + counters.get("bytes_sent", 0))

    def _right(self, job: Job, handle: Any, victim_side: Side) -> int:
        """Assert that a transfer of a living victim went well, byte for byte where this side can see it."""
        outcome: Outcome = handle.future.result(0)
        assert outcome.ok, f"a transfer failed although its peer lived: {outcome.code}: {outcome.reason}"
        if victim_side == "prefill":
            assert self._worker.memory.holds(job.target, job.seed), (
                f"transfer {job.transfer}: wrong bytes were accepted"
            )
        return 1

    def _nothing_left(self) -> None:
        deadline = time.monotonic() + ENDED_S
        while self._worker.live():
            assert time.monotonic() < deadline, f"left behind: {self._worker.transport.status()['live']}"
            time.sleep(0.02)
        before = self._worker.memory.kv.copy()
        time.sleep(QUIET_S)
        self._worker.memory.settle()
        assert bool((self._worker.memory.kv == before).all()), "a page was written after its transfer had ended"

    def _serves_on(self, side: Side) -> None:
        friend = self._friends[side]
        job, handle = self._begin(friend, 0)
        outcome: Outcome = handle.future.result(ENDED_S)
        assert outcome.ok, f"the next transfer failed: {outcome.code}: {outcome.reason}"
        if side == "prefill":
            assert self._worker.memory.holds(job.target, job.seed), "the next transfer brought wrong bytes"
        else:
            assert friend.answer(ENDED_S) == (job.transfer, True), "the next transfer brought wrong bytes"

    def no_leak(self, settle_s: float = 0.0) -> str:
        """Assert that the kills left no file open and no memory of the GPU taken; what was found, in words.

        Args:
            settle_s: how long files may stay open: the control channel goes on trying a lost endpoint for a minute.
        """
        deadline = time.monotonic() + settle_s
        while (files := len(os.listdir("/proc/self/fd"))) > self._files + MAX_FILES and time.monotonic() < deadline:
            time.sleep(0.5)
        assert files <= self._files + MAX_FILES, f"open files {self._files} -> {files}"
        taken = self._free - self._worker.memory.free_bytes()
        assert taken <= self._worker.memory.kv.nbytes, f"{taken} bytes of the GPU's memory are gone"
        return f"open files {self._files} -> {files}" + (f", GPU memory {taken >> 20:+d} MiB" if self._free else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.processes.killed", description=str(__doc__).splitlines()[0])
    parser.add_argument("--link", required=True, help="cma, ucx, cuda_ipc, ...: the only one that is tried")
    parser.add_argument("--device", choices=("cpu", "cuda", "twin"), default=os.environ.get("PDT_DEVICE") or "cpu")
    parser.add_argument("--cards", default="0,0", help="GPUs of the survivor and of the others (default 0,0)")
    parser.add_argument("--times", type=int, default=20, help="kills, half of them of either side (default 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no further round after this")
    parser.add_argument("--json", type=Path, help="write the rounds here")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    ours, theirs = map(int, options.cards.split(","))
    ends = time.monotonic() + options.seconds
    with Survivor(options.link, options.device, options.seed, (ours, theirs)) as survivor:
        for number in range(options.times):
            if time.monotonic() > ends:
                print(f"no time left after {number} of {options.times}")
                break
            tally = survivor.round(SIDES[number % 2])
            print(
                f"{number + 1:>3} {tally.side:<8} {tally.went_well:>5} right, {tally.cut} cut, {tally.unstarted} "
                f"not begun, all ended after {tally.ended_s:.2f} s",
                flush=True,
            )
        leaks = survivor.no_leak(RETRY_FOR_S + 15.0)
        rounds = survivor.rounds
    cut = sum(bool(tally.cut) for tally in rounds)
    where = f"{options.link}, {options.device}, GPUs {options.cards}"
    print(f"{where}: {len(rounds)} kills, {cut} in the middle of a transfer; {leaks}")
    if options.json:
        shown = {"where": where, "rounds": [vars(tally) for tally in rounds]}
        options.json.write_text(json.dumps({**shown, "leaks": leaks}, indent=1) + "\n")
    return 0 if len(rounds) == options.times and cut else 1


if __name__ == "__main__":
    sys.exit(main())
