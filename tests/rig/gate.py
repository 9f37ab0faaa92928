"""A gate in front of a prefill worker's control channel: it lets everything through up to the first commit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.rig.ports import HOST
from tests.rig.servers import PORTS, Server

_COMMIT = b"\xa4kind\xa6commit"  # msgpack


class Gate:
    """Decode, told :attr:`port`, reaches ``prefill`` through it.

    ``cut`` closes every connection at the first commit, and takes none any more; otherwise the commit and what follows
    waits for :meth:`open`.
    """

    def __init__(self, prefill: Server, *, cut: bool) -> None:
        self._prefill = prefill
        self._cut = cut
        self.port = PORTS.take()
        self.reached = asyncio.Event()  # a commit came
        self._opened = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    def open(self) -> None:
        self._opened.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut and self.reached.is_set():
            writer.close()
            return
        up_reader, up_writer = await asyncio.open_connection(HOST, self._prefill.control_port)
        self._writers |= {writer, up_writer}
        for source, sink, held in ((reader, up_writer, False), (up_reader, writer, True)):
            task = asyncio.create_task(self._pass(source, sink, held))
            self._tasks.add(task)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, held: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                if held and _COMMIT in data:
                    self.reached.set()
                if held and self.reached.is_set():
                    if self._cut:
                        self.close()
                        return
                    await self._opened.wait()
                sink.write(data)
                await sink.drain()
        sink.close()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    async def end(self) -> None:
        self.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        PORTS.give_back([self.port])


@asynccontextmanager
async def gated(prefill: Server, *, cut: bool) -> AsyncIterator[Gate]:
    gate = Gate(prefill, cut=cut)
    server = await asyncio.start_server(gate.serve, HOST, gate.port)
    try:
        yield gate
    finally:
        server.close()
        await gate.end()
