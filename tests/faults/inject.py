"""Puts an injector's points into the channel and the links of this process. Nothing of it exists in a process that
does not call :func:`install`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from pdtransport import transport
from pdtransport.control.channel import ControlChannel
from pdtransport.control.dialer import Dialer
from pdtransport.control.directory import Sent
from pdtransport.control.events import MessageReceived
from pdtransport.control.listener import ControlListener
from pdtransport.errors import LinkError
from pdtransport.kernels.reference import memory
from pdtransport.links.base import Channel, Done, Link, LinkBusy, Runs
from pdtransport.transfer.engine import TransferEngine
from tests.faults.rules import Injector


def install(injector: Injector) -> list[Link]:
    """Call before the transport is made. Returns a list that will hold the links that it opens."""
    _wrap_control(injector)
    links: list[Link] = []
    original = transport.open_links

    def open_links(*args: Any, **kwargs: Any) -> Any:
        opened = original(*args, **kwargs)
        for link in opened.links.values():
            _wrap_link(link, injector)
            links.append(link)
        return opened

    transport.open_links = open_links
    return links


def _wrap_control(injector: Injector) -> None:
    dial, answer = Dialer.send, ControlListener.send
    receive, deadline, turn = ControlChannel.receive, TransferEngine.next_deadline, TransferEngine.turn

    def dialer_send(self: Dialer, frame: bytes) -> Any:
        return injector.out(id(self), frame, lambda each: dial(self, each), Sent.OK)

    def listener_send(self: ControlListener, connection: Any, frame: bytes) -> Any:
        return injector.out(id(connection), frame, lambda each: answer(self, connection, each), Sent.OK)

    def channel_receive(self: ControlChannel, *args: Any, **kwargs: Any) -> Any:
        events = receive(self, *args, **kwargs)
        for event in events:
            if isinstance(event, MessageReceived):
                injector.strike(injector.match("in", event.message.kind), after=False)
        return events

    def engine_turn(self: TransferEngine, now: float) -> bool:
        injector.strike(injector.match("turn", "any"), after=False)
        injector.run_due()
        return turn(self, now)

    def next_deadline(self: TransferEngine) -> float | None:
        times = [due for due in (deadline(self), injector.next_due()) if due is not None]
        return min(times, default=None)

    Dialer.send = dialer_send  # type: ignore[method-assign]
    ControlListener.send = listener_send  # type: ignore[method-assign]
    ControlChannel.receive = channel_receive  # type: ignore[method-assign]
    TransferEngine.turn = engine_turn  # type: ignore[method-assign]
    TransferEngine.next_deadline = next_deadline  # type: ignore[method-assign]


def _wrap_link(link: Link, injector: Injector) -> None:
    connect, progress = link.connect, link.progress

    def connected(*args: Any) -> Channel:
        channel = connect(*args)
        _FaultyChannel(channel, injector)
        return channel

    def progressed() -> bool:
        return not injector.still and progress()

    link.connect = connected  # type: ignore[method-assign]
    link.progress = progressed  # type: ignore[method-assign]


class _FaultyChannel:
    """Stands between the transport and one channel, by taking the places of its methods."""

    def __init__(self, channel: Channel, injector: Injector) -> None:
        self._injector = injector
        self._channel = channel
        self._send, self._release, self._receive = channel.send, channel.release, channel.receive
        self._fence, self._close = channel.fence, channel.close
        self._mend: dict[int, Callable[[], None]] = {}  # key -> puts flipped bits back
        self._late: dict[int, object] = {}  # keys whose receive is held back
        for name in ("send", "release", "receive", "fence", "close"):
            setattr(channel, name, getattr(self, name))

    def send(self, key: int, runs: Runs, checksum_blocks: int) -> tuple[bytes, bytes]:
        injector = self._injector
        states = injector.match("send", "any") if checksum_blocks else []  # probes go without checksums
        injector.strike(states, after=False)
        actions = {state.rule.action: state for state in states}
        if "busy" in actions:
            injector.done["busy"] += 1
            raise LinkBusy("injected")
        if "error" in actions:
            injector.done["error"] += 1
            raise LinkError("injected")
        try:
            offer, checksums = self._send(key, runs, checksum_blocks)
        except LinkBusy:  # nothing was sent: it is tried again, and a rule must not spend itself on this
            if checksum_blocks:
                injector.uncount("send", "any")
            raise
        if "flip" in actions:
            self._flip(key, runs, actions["flip"].random.random())
        if "truncate" in actions:
            injector.done["truncate"] += 1
            offer = offer[: len(offer) // 2]
        return offer, checksums

    def _flip(self, key: int, runs: Runs, where: float) -> None:
        """Turn a bit over in what the peer is about to get: a link's own copy where it has one, else the pages."""
        offered = getattr(self._channel, "_offered", {}).get(key)
        staged, copied = getattr(offered, "data", None), getattr(offered, "slot", None) is not None
        if staged is None:
            address, nbytes = runs[int(where * len(runs))].tolist()
            staged = memory(int(address), int(nbytes))
        at = int(where * staged.size)
        staged[at] ^= np.uint8(1 << at % 8)
        self._injector.done["flip"] += 1
        if copied:
            return  # gone with its slot
        before = staged[at].copy()

        def mend() -> None:
            if staged[at] == before:
                staged[at] ^= np.uint8(1 << at % 8)

        self._mend[key] = mend

    def release(self, key: int) -> None:
        mend = self._mend.pop(key, None)
        if mend is not None:
            mend()
        self._release(key)

    def receive(self, key: int, offer: bytes, runs: Runs, checksums: bytes, blocks: int, done: Done) -> None:
        injector = self._injector
        states = injector.match("receive", "any") if checksums else []
        injector.strike(states, after=False)
        actions = {state.rule.action: state for state in states}
        if "error" in actions:
            injector.done["error"] += 1
            raise LinkError("injected")
        if "stall" in actions:
            injector.done["stall"] += 1
            injector.stall_links(actions["stall"].rule.seconds)

        def placed(error: str | None) -> None:
            if checksums:
                injector.strike(injector.match("placed", "any"), after=False)
            done(error)

        if "delay" not in actions:
            self._receive(key, offer, runs, checksums, blocks, placed)
            injector.strike(states, after=True)
            return
        injector.done["delay"] += 1
        self._late[key] = token = object()

        def go_on() -> None:
            if self._late.get(key) is token:
                del self._late[key]
                try:
                    self._receive(key, offer, runs, checksums, blocks, placed)
                except LinkError as error:
                    placed(f"link: {error}")

        injector.later(actions["delay"].rule.seconds, go_on)

    def fence(self, keys: Any, done: Callable[[], None]) -> None:
        for key in keys:
            self._late.pop(key, None)
        self._fence(keys, done)

    def close(self) -> None:
        self._late.clear()
        for mend in self._mend.values():
            with contextlib.suppress(ValueError):
                mend()
        self._mend.clear()
        self._close()
