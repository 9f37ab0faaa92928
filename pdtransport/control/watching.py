"""Watches how a worker's transfers end, from any process that may connect: needs no Hello, no identity, no thread."""

from __future__ import annotations

import contextlib

import zmq

from pdtransport.control import curve
from pdtransport.control.handshake import foreign_version, refusal
from pdtransport.control.limits import WATCH_QUEUE_FRAMES
from pdtransport.control.owners import ListenerOwner, owners_for
from pdtransport.control.sockets import Inbox, Socket, open_socket, tcp_url
from pdtransport.errors import PDTransportError, SettingsError
from pdtransport.protocol.messages import Message, Watch, WireError, decode, encode
from pdtransport.settings import ControlSettings


class CannotWatch(PDTransportError):
    """The worker can't be watched from here; the text says why."""


class WorkerWatch:
    """A subscription to one worker's reports.

    Call :meth:`ask` every ``WATCH_AGAIN_S``, and :meth:`read` whenever :attr:`descriptor` is readable and after each
    :meth:`ask`: the descriptor is edge-triggered.

    Raises:
        CannotWatch: the worker is on another machine and there are no CURVE keys, the address is malformed, or this
        kernel can't report the owner of a local connection.
    """

    def __init__(
        self,
        context: zmq.Context[Socket],
        host: str,
        port: int,
        settings: ControlSettings,
        keys: curve.CurveKeys | None,
    ) -> None:
        if settings.needs_keys(host):
            raise CannotWatch(
                f"{host}:{port} is not this machine, and this side has no CURVE keys (curve_*_key_file; "
                "allow_plaintext on a trusted network)"
            )
        self._question = encode(Watch())
        self._where = f"{host}:{port}"
        try:
            self._listening = ListenerOwner(owners_for(settings, keys=keys is not None), port)
        except SettingsError as error:
            raise CannotWatch(str(error)) from None
        self.foreign: int | None = None  # protocol version of a received frame that has another version than ours
        socket = open_socket(context, zmq.DEALER, settings, ipv6=":" in host)
        try:
            socket.set(zmq.IMMEDIATE, 0)  # the Watch waits for the connection ...
            socket.set(zmq.SNDHWM, WATCH_QUEUE_FRAMES)  # ... without piling up
            curve.apply_client(socket, keys)
            socket.connect(tcp_url(host, port))
        except zmq.ZMQError as error:
            socket.close(0)
            raise CannotWatch(f"{host}:{port}: {error.strerror}") from None
        self._socket = socket
        self._inbox = Inbox(socket, addressed=False)
        self.descriptor = int(socket.get(zmq.FD))

    def ask(self) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the queue is full
            self._socket.send(self._question, zmq.NOBLOCK)

    def read(self, limit: int) -> tuple[list[Message], bool]:
        """Up to ``limit`` messages that have arrived, and whether there may be more to read."""
        messages: list[Message] = []
        for _ in range(limit):
            letter = self._inbox.read()
            if letter is False:
                return messages, False
            if isinstance(letter, bool) or letter.body is None:
                continue
            try:
                if complaint := self._listening.complaint(letter.part):
                    messages.append(refusal("user", reason=f"{self._where}: {complaint}"))
                    continue
                messages.append(decode(letter.body.bytes))
            except OSError:  # its connection is closed already: unknown whose it was
                continue
            except (WireError, RecursionError):
                self.foreign = foreign_version(letter.body.bytes)
        return messages, True

    def close(self) -> None:
        self._socket.close(0)
