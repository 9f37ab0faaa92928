"""Processes that hold one end of a link each, driven by a test over a pipe.

Each end has one buffer of pages; runs are named by offsets into it. An end makes progress on its own, like the
transport's I/O thread, unless it is told to hold still.

The buffer lies in host memory, or (setting ``gpu``) on a GPU: ``"cuda"`` is a real one, ``"twin"`` the stand-in of
:mod:`tests.rig.twin_gpu`, and with ``"twin-direct"`` UCX is said to know its memory. Setting ``card`` is its number.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from pdtransport.errors import LinkError, LinkUnavailable
from pdtransport.kv.geometry import HOST
from pdtransport.links.base import LinkBusy, Region
from pdtransport.links.negotiate import open_links
from pdtransport.links.ucx.gpu import CudaGpu
from pdtransport.settings import LinkSettings
from tests.rig import twin_gpu

ANSWER_S = 30.0
CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000
MS_REC, MS_SLAVE = 1 << 14, 1 << 19
REMOTE_ERRORS = {error.__name__: error for error in (LinkError, LinkUnavailable, LinkBusy, ValueError)}
Spans = Sequence[tuple[int, int]]  # (offset, nbytes) in the end's buffer


class End:
    """A child process with one end of a link. Every call has a deadline; leaving the ``with`` block kills it."""

    def __init__(self, nbytes: int, settings: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = dict(os.environ)
        os.environ.update(environment or {})
        try:
            self.process = context.Process(target=_serve, args=(theirs, nbytes, settings), daemon=True)
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self.names: list[str] = self.ask("names")

    def ask(self, verb: str, *arguments: Any) -> Any:
        self._pipe.send((verb, arguments))
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"{verb}: no answer within {ANSWER_S} s")
        kind, value = self._pipe.recv()
        if kind != "ok":
            raise REMOTE_ERRORS.get(kind, RuntimeError)(value)
        return value

    def wait_for(self, key: Any, timeout_s: float = 10.0) -> str | None:
        """The error (or None) with which ``done`` of ``key`` was called."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            ended = self.ask("ended")
            if key in ended:
                error: str | None = ended[key]
                return error
            time.sleep(0.01)
        raise TimeoutError(f"{key}: its callback was not called within {timeout_s} s")

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join(10)

    def finish(self) -> int | None:
        """Close the link in order and say how the process ended."""
        self._pipe.send(("exit", ()))
        self.process.join(15)
        return self.process.exitcode

    def __enter__(self) -> End:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)
        self._pipe.close()


def pair(sender: End, receiver: End) -> tuple[str, str]:
    """Connect both ends over the first link of their order; ``why`` of each."""
    ours, theirs = sender.ask("export"), receiver.ask("export")
    return sender.ask("connect", theirs), receiver.ask("connect", ours)


def shuffled(pages: int, page_bytes: int, seed: int) -> Spans:
    """Pages ``0 .. pages`` of a buffer in random order."""
    return [(int(i) * page_bytes, page_bytes) for i in np.random.default_rng(seed).permutation(pages)]


def _serve(pipe: Connection, nbytes: int, settings: dict[str, Any]) -> None:
    namespace = settings.pop("netns", None)
    if namespace:
        _enter_network(namespace)
    with twin_gpu.installed() if settings.get("gpu", "").startswith("twin") else nullcontext():
        try:
            server = _Server(nbytes, settings)
        except Exception as error:  # noqa: BLE001 - told to the test
            pipe.recv()
            pipe.send((type(error).__name__, str(error)))
            return
        _serve_calls(pipe, server)
        server.close()


def _enter_network(namespace: str) -> None:
    """What ``ip netns exec`` does: UCX lists network devices from /sys, which must show the namespace's own."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}") as file:
        results = [libc.setns(file.fileno(), CLONE_NEWNET), libc.unshare(CLONE_NEWNS)]
    results.append(libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_SLAVE), None))
    results.append(libc.mount(b"sysfs", b"/sys", b"sysfs", ctypes.c_ulong(0), None))
    assert results == [0] * 4, os.strerror(ctypes.get_errno())


def _serve_calls(pipe: Connection, server: _Server) -> None:
    while True:
        busy = server.progress()
        if not busy and server.may_sleep():
            waiting = [pipe.fileno(), *server.descriptors()]
            wait(waiting, 0.2)
        try:
            if not pipe.poll(0):
                continue
            verb, arguments = pipe.recv()
        except EOFError:
            return
        if verb == "exit":
            return
        try:
            pipe.send(("ok", getattr(server, "do_" + verb)(*arguments)))
        except Exception as error:  # noqa: BLE001 - told to the test
            pipe.send((type(error).__name__, str(error)))


class _Buffer:
    """Pages in host memory."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._memory = np.zeros(nbytes, dtype=np.uint8)
        self.address: int = self._memory.ctypes.data

    def write(self, offset: int, data: np.ndarray) -> None:
        self._memory[offset : offset + data.size] = data

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._memory[offset : offset + nbytes].tobytes()


class _DeviceBuffer(_Buffer):
    """Pages on a GPU, or on its stand-in."""

    def __init__(self, nbytes: int, card: int) -> None:
        from pdtransport.kernels import gpu
        from pdtransport.kernels.watch import DeviceMemory

        self._gpu: Any = gpu
        self.nbytes = nbytes
        self._card = card
        self._device_memory = DeviceMemory(nbytes, card)
        self.address = self._device_memory.address
        self.write(0, np.zeros(nbytes, dtype=np.uint8))

    def write(self, offset: int, data: np.ndarray) -> None:
        self._gpu.from_host(self.address + offset, data.tobytes(), self._card)

    def read(self, offset: int, nbytes: int) -> bytes:
        data: bytes = self._gpu.to_host(self.address + offset, nbytes, self._card)
        return data


class _Server:
    def __init__(self, nbytes: int, settings: dict[str, Any]) -> None:
        gpu, card = settings.pop("gpu", ""), settings.pop("card", 0)
        self.settings = LinkSettings.model_validate(settings)
        if gpu.endswith("direct"):
            CudaGpu.sendable = lambda self, context: True  # type: ignore[method-assign]
            CudaGpu.why_not_direct = lambda self, context, lanes: ""  # type: ignore[method-assign]
        self.buffer = _DeviceBuffer(nbytes, card) if gpu else _Buffer(nbytes)
        region = Region(self.buffer.address, nbytes, self.buffer, device=card if gpu else HOST)
        self.opened = open_links(self.settings, [region])
        self.links = list(self.opened.links.values())
        self.channel: Any = None
        self.ended: dict[Any, str | None] = {}
        self.still = False

    def runs(self, spans: Spans) -> np.ndarray:
        runs = np.array(spans, dtype=np.uint64).reshape(-1, 2)
        runs[:, 0] += np.uint64(self.buffer.address)
        return runs

    def progress(self) -> bool:
        return not self.still and any(link.progress() for link in self.links)

    def may_sleep(self) -> bool:
        return self.still or all(link.arm() for link in self.links)

    def descriptors(self) -> list[int]:
        return [] if self.still else [link.fileno() for link in self.links if link.fileno() >= 0]

    def close(self) -> None:
        for link in self.links:
            link.close()

    def do_names(self) -> list[str]:
        return list(self.opened.links)

    def do_unavailable(self) -> dict[str, str]:
        return self.opened.unavailable

    def do_export(self) -> dict[str, bytes]:
        return {name: link.export() for name, link in self.opened.links.items()}

    def do_connect(self, exports: dict[str, bytes]) -> str:
        from pdtransport.links.negotiate import choose

        settings = self.settings
        links, missing = self.opened.links, self.opened.unavailable
        self.channel = choose(links, missing, settings.order, settings.require, exports, "peer")
        why: str = self.channel.why
        return why

    def do_fill(self, seed: int, size: int = 1 << 20) -> None:
        """Random bytes at the front."""
        size = min(self.buffer.nbytes, size)
        self.buffer.write(0, np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))

    def do_set(self, offset: int, data: bytes) -> None:
        self.buffer.write(offset, np.frombuffer(data, dtype=np.uint8))

    def do_read(self, spans: Spans) -> bytes:
        return b"".join(self.buffer.read(offset, nbytes) for offset, nbytes in spans)

    def do_send(self, key: int, spans: Spans, blocks: int) -> tuple[bytes, bytes]:
        offered: tuple[bytes, bytes] = self.channel.send(key, self.runs(spans), blocks)
        return offered

    def do_release(self, key: int) -> None:
        self.channel.release(key)

    def do_receive(self, key: int, offer: bytes, spans: Spans, checksums: bytes, blocks: int) -> None:
        self.channel.receive(key, offer, self.runs(spans), checksums, blocks, self.end(("receive", key)))

    def do_fence(self, keys: Sequence[int]) -> None:
        self.channel.fence(keys, lambda: self.ended.__setitem__(("fence", tuple(keys)), None))

    def do_receive_and_fence(self, key: int, *arguments: Any) -> None:
        """Fence right after the link began with it, in the same turn of the I/O thread."""
        self.do_receive(key, *arguments)
        self.links[0].progress()
        self.do_fence([key])

    def end(self, key: Any) -> Any:
        def done(error: str | None) -> None:
            assert key not in self.ended, f"{key}: called twice"
            self.ended[key] = error

        return done

    def do_ended(self) -> dict[Any, str | None]:
        return dict(self.ended)

    def do_forget(self) -> None:
        """What an earlier test left."""
        if self.channel is not None:
            self.channel.close()
        self.source = None
        for link in self.links:
            link.progress()
        self.ended.clear()
        self.still = False

    def do_hold_still(self, still: bool) -> None:
        self.still = still

    def do_close_channel(self) -> float:
        begin = time.monotonic()
        self.channel.close()
        return time.monotonic() - begin

    def do_give_up(self) -> None:
        self.channel.give_up()

    def do_regions(self) -> int:
        return len(self.opened.regions)

    def do_stats(self) -> dict[str, Any]:
        stats = self.channel.stats
        return {**vars(stats), "bandwidth": stats.bandwidth}

    def do_free(self) -> dict[str, tuple[int, int]]:
        """What is free of each bounded resource, and how much there is."""
        free: dict[str, tuple[int, int]] = {}
        for link in self.links:
            if hasattr(link, "tickets"):
                free["tickets"] = (link.tickets.free, 4096)
            for memory in getattr(link, "memories", ()):
                for ring in ("sending", "receiving"):
                    free[ring] = (getattr(memory, ring).free, getattr(memory, ring).count)
        return free

    def do_held(self) -> dict[str, int]:
        """Descriptors, mappings, and resident bytes of this process."""
        with open("/proc/self/maps") as maps, open("/proc/self/statm") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            mappings = len(maps.readlines())
        return {"descriptors": len(os.listdir("/proc/self/fd")), "mappings": mappings, "resident": resident}

    def do_hold_kernels(self, hold: bool) -> None:
        """Of a twin: kernels are launched, and do nothing until they are let go on."""
        (twin_gpu.going.clear if hold else twin_gpu.going.set)()

    def do_kernels(self) -> int:
        """Of a twin: launched and not ended."""
        return len(twin_gpu.under_way)

    def do_become_nobody(self) -> None:
        os.setgid(65534)
        os.setuid(65534)

    def do_environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("UCX_")}
