"""Fetches the status of a worker, from any process that may connect: needs no Hello and no identity."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from pdtransport.control import curve
from pdtransport.control.handshake import foreign_version, version_refusal
from pdtransport.control.owners import ListenerOwner, owners_for
from pdtransport.control.sockets import Inbox, Socket, close_watched, open_socket, tcp_url, watch
from pdtransport.errors import PDTransportError
from pdtransport.kv.fingerprint import plain
from pdtransport.protocol.messages import Refused, StatusReply, StatusRequest, WireError, decode, encode
from pdtransport.settings import ControlSettings

ASK_AGAIN_S = 0.2  # after "ask less often"
REPEAT_S = 1.0  # send the request again: it may have been lost with its connection
MAX_FRAMES = 64  # frames read while waiting for the one answer

_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class StatusUnavailable(PDTransportError):
    """The worker's status could not be fetched; the text says why."""


def fetch_status(
    host: str, port: int, *, transfer: str = "", timeout_s: float = 2.0, settings: ControlSettings | None = None
) -> dict[str, Any]:
    """The status of the worker whose control channel listens at ``host:port``.

    Args:
        transfer: limits the timelines to one transfer.
        timeout_s: for the whole call.
        settings: this side's settings: CURVE keys, and ``max_frame_bytes`` as the longest answer. Default: no
            encryption, 4 MiB; another machine without encryption only with ``allow_plaintext``.

    Raises:
        StatusUnavailable: no answer in time, a refusal, or an invalid answer; one line.
        SettingsError: a CURVE key file can't be used, or this kernel can't report the owner of a local connection.
    """
    settings = settings or ControlSettings()
    keys = curve.load_keys(settings)
    if settings.needs_keys(host):
        raise StatusUnavailable(
            f"no status from {host}:{port}: it is not this machine, and this side has no CURVE keys (curve_*_key_file; "
            "allow_plaintext on a trusted network)"
        )
    deadline = time.monotonic() + timeout_s
    owners = owners_for(settings, keys=keys is not None)
    context: zmq.Context[Socket] = zmq.Context(1)
    socket = monitor = None
    try:
        socket = open_socket(context, zmq.DEALER, settings, ipv6=":" in host)
        socket.set(zmq.IMMEDIATE, 0)  # the request waits for the connection
        curve.apply_client(socket, keys)
        monitor = watch(context, socket, _FAILED)
        socket.connect(tcp_url(host, port))
        listening = ListenerOwner(owners, port)
        return _Asking(socket, monitor, f"{host}:{port}", listening, transfer, deadline, timeout_s).answer()
    except zmq.ZMQError as error:
        raise StatusUnavailable(f"no status from {host}:{port}: {error.strerror}") from None
    finally:
        close_watched(socket, monitor)
        context.term()


async def afetch_status(
    host: str, port: int, *, transfer: str = "", timeout_s: float = 2.0, settings: ControlSettings | None = None
) -> dict[str, Any]:
    """:func:`fetch_status` in a worker thread, which ends within ``timeout_s`` even if the task is cancelled."""
    return await asyncio.to_thread(fetch_status, host, port, transfer=transfer, timeout_s=timeout_s, settings=settings)


class _Asking:
    """One status request, until its answer or the deadline."""

    def __init__(
        self,
        socket: Socket,
        monitor: Socket,
        where: str,
        listening: ListenerOwner,
        transfer: str,
        deadline: float,
        timeout_s: float,
    ) -> None:
        self._socket, self._monitor = socket, monitor
        self._where, self._question = where, encode(StatusRequest(transfer=transfer))
        self._listening, self._deadline, self._timeout_s = listening, deadline, timeout_s
        self._hung_up = False

    def answer(self) -> dict[str, Any]:
        inbox = Inbox(self._socket, addressed=False)
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        self._socket.send(self._question, zmq.NOBLOCK)
        for _ in range(MAX_FRAMES):
            self._wait(poller)
            self._read_monitor()
            letter = inbox.read()
            if isinstance(letter, bool) or letter.body is None:
                continue
            try:
                complaint = self._listening.complaint(letter.part)
            except OSError:  # closed already
                continue
            if complaint:
                raise StatusUnavailable(f"no status from {self._where}: {complaint}")
            status = self._read(letter.body.bytes)
            if status is not None:
                return status
            time.sleep(max(0.0, min(ASK_AGAIN_S, self._deadline - time.monotonic())))
            self._socket.send(self._question, zmq.NOBLOCK)
        raise StatusUnavailable(f"no status from {self._where}: it sent something other than a status")

    def _wait(self, poller: zmq.Poller) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            if poller.poll(max(1, round(min(left, REPEAT_S) * 1000))):
                return
            with contextlib.suppress(zmq.Again):
                self._socket.send(self._question, zmq.NOBLOCK)
        why = (
            "it closes the connection: no control channel listens there, or its CURVE keys don't match ours"
            if self._hung_up
            else "check the address, and that the worker runs"
        )
        raise StatusUnavailable(f"no status from {self._where} within {self._timeout_s:g} s: {why}")

    def _read_monitor(self) -> None:
        for _ in range(MAX_FRAMES):
            if not int(self._monitor.get(zmq.EVENTS)) & zmq.POLLIN:
                return
            report = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            self._hung_up = True
            if report["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise StatusUnavailable(f"no status from {self._where}: it refuses our CURVE key")
            if report["event"] == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                raise StatusUnavailable(
                    f"no status from {self._where}: not a ZeroMQ port, or only one side uses CURVE (control.curve_*)"
                )

    def _read(self, frame: bytes) -> dict[str, Any] | None:
        """The status in ``frame``; None if the request must be sent again later."""
        try:
            message = decode(frame)
        except (WireError, RecursionError) as error:
            version = foreign_version(frame)
            text = version_refusal(version, them="it").reason if version is not None else str(error)
            raise StatusUnavailable(f"no status from {self._where}: {plain(text, 300)}") from None
        if isinstance(message, Refused):
            if message.field == "status" and "less often" in message.reason:
                return None
            raise StatusUnavailable(f"no status from {self._where}: {plain(message.reason or message.field, 400)}")
        if not isinstance(message, StatusReply):
            raise StatusUnavailable(f"no status from {self._where}: it answered with a {message.kind}")
        try:
            status = json.loads(message.status)
        except (ValueError, RecursionError):
            status = None
        if not isinstance(status, dict):
            raise StatusUnavailable(f"no status from {self._where}: its answer is not a JSON object")
        return status
