"""ZeroMQ sockets with bounded queues, immediate close and a monitor."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

import zmq

from pdtransport.control.limits import (
    LISTEN_BUFFER_BYTES,
    LISTEN_QUEUE_FRAMES,
    MONITOR_QUEUE_EVENTS,
    RECEIVE_QUEUE_FRAMES,
    RECONNECT_MAX_S,
    RECONNECT_S,
    SEND_QUEUE_FRAMES,
    TCP_BACKLOG,
)
from pdtransport.settings import ControlSettings

Socket = zmq.Socket[bytes]

_names = itertools.count()


def open_socket(context: zmq.Context[Socket], kind: int, settings: ControlSettings, *, ipv6: bool) -> Socket:
    """A DEALER or ROUTER with bounded queues and no linger."""
    socket = context.socket(kind)
    options = {
        zmq.LINGER: 0,
        zmq.SNDHWM: SEND_QUEUE_FRAMES,
        zmq.RCVHWM: RECEIVE_QUEUE_FRAMES,
        zmq.MAXMSGSIZE: settings.max_frame_bytes,
        zmq.HANDSHAKE_IVL: _ms(settings.connect_s),
        zmq.TCP_KEEPALIVE: 0,  # the channel's own heartbeats are faster
        zmq.IPV6: int(ipv6),
    }
    if kind == zmq.DEALER:
        # IMMEDIATE: don't queue for a connection that is down, so that no stale frame reaches a restarted peer.
        options |= {
            zmq.IMMEDIATE: 1,
            zmq.RECONNECT_IVL: _ms(RECONNECT_S),
            zmq.RECONNECT_IVL_MAX: _ms(RECONNECT_MAX_S),
            zmq.CONNECT_TIMEOUT: _ms(settings.liveness_s),
        }
    else:
        # MANDATORY: sending to a connection that is gone or full raises an error.
        options |= {zmq.ROUTER_MANDATORY: 1, zmq.BACKLOG: TCP_BACKLOG}
        options |= {zmq.RCVHWM: LISTEN_QUEUE_FRAMES, zmq.RCVBUF: LISTEN_BUFFER_BYTES}
    try:
        for option, value in options.items():
            socket.set(option, value)
    except BaseException:
        socket.close(0)
        raise
    return socket


def watch(context: zmq.Context[Socket], socket: Socket, events: int) -> Socket:
    """A PAIR socket on which ``socket`` reports ``events``."""
    address = f"inproc://pdtransport-monitor-{next(_names)}"
    monitor = context.socket(zmq.PAIR)
    monitor.set(zmq.LINGER, 0)
    monitor.set(zmq.RCVHWM, MONITOR_QUEUE_EVENTS)
    socket.monitor(address, events)
    monitor.connect(address)
    return monitor


def close_watched(socket: Socket | None, monitor: Socket | None) -> None:
    """Close both sockets. Monitoring is disabled first: libzmq must not block on a monitor without a reader."""
    with contextlib.suppress(zmq.ZMQError):
        if socket is not None and monitor is not None:
            socket.disable_monitor()
    for each in (monitor, socket):
        if each is not None:
            each.close(0)


def tcp_url(host: str, port: int | str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


@dataclass(frozen=True)
class Letter:
    """One received message. ``body`` is None if it had more than one part, which no valid message has."""

    sender: bytes  # libzmq's name of the connection; empty on a DEALER
    body: zmq.Frame | None
    part: zmq.Frame  # the message's first part, which carries the connection's metadata


class Inbox:
    """Reads a socket one part at a time, so that a message of a million parts can't block a turn."""

    def __init__(self, socket: Socket, *, addressed: bool) -> None:
        self._socket = socket
        self._addressed = addressed  # ROUTER: the first part names the connection
        self._skipping = False

    def read(self) -> Letter | bool:
        """The next message; True if a part was read and dropped; False if there is nothing to read."""
        try:
            part = self._socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        if self._skipping:
            self._skipping = part.more
            return True
        sender = b""
        if self._addressed:
            if not part.more:
                return True
            sender, part = part.bytes, self._socket.recv(zmq.NOBLOCK, copy=False)
        self._skipping = part.more
        return Letter(sender, None if part.more else part, part)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
