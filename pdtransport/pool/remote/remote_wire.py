"""A client's connection to a pool on another host, through the pool's agent.

It has the interface of the connection to a local pool: granted chunks are in frames of mapped memory. Here these are
*staging* frames, in the client's own memory.

* Load: a transport fetches the chunk into staging frames and verifies it. Then the load gets its READ grant and copies
  the chunk into the caller's memory.
* Store: the chunk is copied into staging frames. The agent fetches it from there, then publishes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import zmq

from pdtransport.control import curve
from pdtransport.control.owners import ListenerOwner, owners_for
from pdtransport.control.sockets import Inbox, open_socket, tcp_url, watch
from pdtransport.errors import PDTransportError, SettingsError
from pdtransport.kv.geometry import HOST
from pdtransport.pool import messages
from pdtransport.pool.core.frames import Frames, frames_for
from pdtransport.pool.core.requests import KeyVerdict
from pdtransport.pool.core.shared_memory import Mapping
from pdtransport.pool.local_wire import ServiceSession, Wire, reach_memory
from pdtransport.pool.remote.chunk_transport import open_transport
from pdtransport.pool.remote.remote_messages import (
    RemoteAnswer,
    RemoteHello,
    RemotePing,
    RemotePong,
    RemotePublish,
    RemoteWelcome,
    new_transfer,
    to_remote,
    transfer_digest,
)
from pdtransport.protocol.messages import Message
from pdtransport.settings import Settings
from pdtransport.transfer.outcome import Outcome
from pdtransport.transport import Transport

logger = logging.getLogger(__name__)

SILENCE_S = 10.0  # an agent that is silent for longer is given up, unless control.liveness_s is longer
AGAIN_S = 1.0  # wait before the next attempt to reach an agent

_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_WATCHED = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | _FAILED
_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.%]+\]|[^:/\s]+):(\d{1,5})")


def host_and_port(address: str) -> tuple[str, int]:
    """Parse ``tcp://HOST:PORT``.

    Raises:
        SettingsError: the address is not of that form.
    """
    parts = _ADDRESS.fullmatch(address)
    if parts is None or not 1 <= int(parts[2]) <= 65535:
        raise SettingsError(f"pool.address: {address!r} is not tcp://HOST:PORT (the address of pdpool --listen)")
    return parts[1].strip("[]"), int(parts[2])


def silence_s(settings: Settings) -> float:
    """How long an agent may be silent before it is given up, in seconds."""
    return max(SILENCE_S, settings.control.liveness_s)


class RemoteSession(ServiceSession):
    """A session with an agent. Its transport is opened in a thread of its own, before the first copy."""

    def __init__(self, settings: Settings, device: int) -> None:
        super().__init__(0, lambda: None)
        self.transport: Transport | None = None
        self.staging: Frames | None = None
        self._settings, self._device = settings, device
        self._beginning = False

    def stage(self, nbytes: int, frame_bytes: int) -> None:
        """Create the staging frames. They take up memory only once they are used."""
        count = max(1, nbytes // frame_bytes)
        fd = os.memfd_create("pdpool-staging", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, count * frame_bytes)
            self.mapping = Mapping(fd, count * frame_bytes)
        finally:
            os.close(fd)
        self.staging, self.frame_bytes, self.waits = Frames(count), frame_bytes, True

    def begin(self) -> None:
        with self._guard:
            if self._beginning or self.broken:
                return
            self._beginning = True
        threading.Thread(target=self._prepare, name="pdpool-prepare", daemon=True).start()

    def _prepare(self) -> None:
        try:
            if self.enter():
                try:
                    self._open()
                except Exception as error:  # a link's library may raise anything
                    logger.exception("the pool's chunks can't be moved")
                    self.problem = f"chunks can't be moved: {error!r}"
                finally:
                    self.leave()
        finally:
            self.prepared.set()

    def _open(self) -> None:
        mapping = self.mapping
        assert mapping is not None
        name = f"pool-client-{uuid.uuid4().hex[:12]}"
        try:
            self.transport = open_transport(
                mapping.address,
                mapping.nbytes,
                self.frame_bytes,
                self._settings,
                name,
                0,
                silence_s(self._settings),
            )
        except PDTransportError as error:
            self.problem = f"chunks can't be moved: {error}"
            logger.warning("the pool's chunks are neither stored nor loaded: %s", self.problem)
            return
        if self._device != HOST:  # host memory is not prefaulted: unused frames should take up no memory
            reach_memory(mapping, self._device, lambda: self.broken)
        self.problem = mapping.problem

    def end_transfers(self) -> None:
        """Close the transport; when this returns, no transfer touches the staging frames."""
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.close()

    def _close_if_idle(self) -> None:
        if self.broken and self._users == 0 and not self._closed:
            self.end_transfers()
        super()._close_if_idle()


@dataclass
class _StagedChunks:
    """Chunks that wait for staging frames: one chunk to write, or all chunks of one transfer to fetch."""

    request: int
    places: list[int]
    frames: int
    checksums: bytes
    transfer: str | None


class RemoteWire(Wire):
    """A :class:`Wire` to a pool on another host; driven by a :class:`Reactor`.

    Args:
        settings: keys, links, and the address of this host that the agent can reach (``control.host``).
        copies: open links when connected, not at the first copy.
        post: runs a call in the I/O thread.
    """

    def __init__(
        self,
        host: str,
        port: int,
        settings: Settings,
        client_name: str,
        tenant: str,
        device: int,
        staging_bytes: int,
        copies: bool,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        super().__init__(Path(), f"tcp://{host}:{port}", client_name, tenant, device)
        self._host, self._port, self._settings = host, port, settings
        control = settings.control
        self._keys = curve.load_keys(control)
        if control.needs_keys(host):
            raise SettingsError(
                f"pool.address: {host} is not this machine, and there are no CURVE keys (control.curve_*_key_file; "
                "control.allow_plaintext on a trusted network)"
            )
        self._owners = owners_for(control, keys=self._keys is not None)
        self._listening: ListenerOwner | None = None  # checks who listens at the address; None once that is done
        self._staging_bytes, self._copies = staging_bytes, copies
        self._post = post
        self._beat_s = min(control.heartbeat_s, control.liveness_s / 3)
        self._silence_s = silence_s(settings)
        self._beat_at = self._heard_at = self._not_before = 0.0
        self._waiting: deque[_StagedChunks] = deque()
        self._lent: dict[int, dict[int, bytes]] = {}  # staging frames of granted chunks, by request and place

    # -- start and end of a session ---------------------------------------------------------------------------------

    def _open(self) -> None:
        now = time.monotonic()
        if now < self._not_before:
            raise SettingsError(f"pool {self._pool}: {self._why}")
        control = self._settings.control.model_copy(update={"max_frame_bytes": messages.MAX_FRAME_BYTES})
        self.session, self._greeted = RemoteSession(self._settings, self._device), False
        self._socket = open_socket(self._context, zmq.DEALER, control, ipv6=":" in self._host)
        curve.apply_client(self._socket, self._keys)
        self._monitor = watch(self._context, self._socket, _WATCHED)
        self._inbox = Inbox(self._socket, addressed=False)
        self._listening = ListenerOwner(self._owners, self._port)
        self._heard_at = self._beat_at = now
        try:
            self._socket.connect(tcp_url(self._host, self._port))
        except zmq.ZMQError as error:
            self._hang_up(f"it can't be reached: {error.strerror}")

    def _hello(self) -> Message:
        return RemoteHello(name=self._client_name, tenant=self._tenant, staging_bytes=self._staging_bytes)

    def _hang_up(self, why: str, linger: int = 0) -> None:
        session = self.session
        self._waiting.clear()
        self._lent.clear()
        super()._hang_up(why, linger)
        if session is not None and session.mapping is None:  # no agent: fail waiting requests now
            self._not_before = time.monotonic() + AGAIN_S
            self._why = why
            unsent, self._unsent = self._unsent, []
            for asked in unsent:
                self._end(asked, why)

    def close(self) -> None:
        if isinstance(self.session, RemoteSession):
            self.session.end_transfers()
        super().close()

    def _on_monitored(self, event: int) -> None:
        if event == zmq.EVENT_DISCONNECTED:
            self._read()  # messages that it sent before it ended
            self._hang_up("it ended, or closed the connection")
        elif event == zmq.EVENT_CONNECT_RETRIED:
            self._hang_up("it can't be reached: check that pdpool --listen runs there")
        else:
            self._hang_up("it refuses our CURVE key, or only one side uses CURVE (control.curve_*)")

    # -- time -------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        if self.session is None:
            return super().next_deadline()
        return min(self._beat_at, super().next_deadline() or self._beat_at)

    def turn(self, now: float) -> bool:
        more = super().turn(now)
        if self.session is not None and now >= self._beat_at:
            self._beat_at = now + self._beat_s
            if now - self._heard_at > self._silence_s:
                self._hang_up(f"it was silent for {self._silence_s:g} s")
            elif self.session.mapping is not None:
                super()._send(RemotePing())
        return more

    # -- incoming messages ------------------------------------------------------------------------------------------

    def _believed(self, part: zmq.Frame) -> bool:
        if self._listening is None:
            return True
        try:
            if complaint := self._listening.complaint(part):
                self._hang_up(complaint)
        except OSError:  # the agent disconnected
            return False
        self._listening = None  # one check is enough: a session is one connection
        return not complaint

    def _on_frame(self, frame: bytes) -> None:
        self._heard_at = time.monotonic()
        message = to_remote(frame)
        if isinstance(message, RemoteWelcome):
            self._on_remote_welcome(message)
        elif isinstance(message, RemoteAnswer):
            self._on_remote_answer(message)
        elif not isinstance(message, RemotePong):
            self._on_message(message)

    def _on_remote_welcome(self, welcome: RemoteWelcome) -> None:
        session = self.session
        if not isinstance(session, RemoteSession) or session.mapping is not None:
            return
        self._agent_port = welcome.port
        try:
            session.stage(self._staging_bytes, welcome.frame_bytes)
        except OSError as error:
            self._hang_up(f"no memory for staging: {error.strerror}")
            return
        assert session.mapping is not None
        session.memory_bytes = welcome.nbytes
        session.client_bytes = min(welcome.client_bytes, session.mapping.nbytes)
        self._why = ""
        if self._copies:
            session.begin()
        self._send_unsent(session)

    def _on_remote_answer(self, answer: RemoteAnswer) -> None:
        asked = self._asked.get(answer.request)
        if asked is None or not isinstance(asked.message, messages.Store | messages.Load):
            return  # the request was cancelled, and the agent knows
        sizes = np.frombuffer(asked.message.sizes, dtype="<u4").tolist()
        try:
            places = np.frombuffer(answer.indices, dtype="<u4").tolist()
            checksums = np.frombuffer(answer.checksums, dtype="<u8")
            frames = [frames_for(sizes[place], self._session.frame_bytes) for place in places]
            verdicts = [KeyVerdict(code) for code in answer.verdicts]
            if not len(places) == len(verdicts) == len(checksums):
                raise ValueError("arrays of different lengths")
        except (ValueError, IndexError) as error:
            self._hang_up(f"its answer is malformed: {error}")
            return
        if answer.transfer is not None:
            self._waiting.append(_StagedChunks(answer.request, places, sum(frames), answer.checksums, answer.transfer))
        else:
            refused = [i for i, verdict in enumerate(verdicts) if verdict is not KeyVerdict.WRITE]
            self._tell(answer.request, [places[i] for i in refused], [verdicts[i] for i in refused])
            for place, count, verdict in zip(places, frames, verdicts, strict=True):
                if verdict is KeyVerdict.WRITE:
                    self._waiting.append(_StagedChunks(answer.request, [place], count, bytes(8), None))
        self._admit()

    @property
    def _session(self) -> RemoteSession:
        assert isinstance(self.session, RemoteSession)
        return self.session

    def _tell(
        self, request: int, places: list[int], verdicts: list[KeyVerdict], checksums: bytes = b"", frames: bytes = b""
    ) -> None:
        """Pass verdicts to the operation that made the request, as a local pool would."""
        asked = self._asked.get(request)
        if asked is None or not places:
            return
        asked.heard(
            self.session,
            messages.KeyAnswers(
                request=request,
                indices=_words(places),
                verdicts=bytes(verdicts),
                checksums=checksums or bytes(8 * len(places)),
                frames=frames,
            ),
        )

    # -- staging ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Allocate staging frames for waiting chunks, in order, as far as frames are free."""
        writes: dict[int, list[int]] = {}
        while self._waiting and isinstance(self.session, RemoteSession):
            granted, staging = self._waiting[0], self.session.staging
            assert staging is not None
            if granted.request not in self._asked:
                self._waiting.popleft()
                continue
            if granted.frames > staging.count:
                self._waiting.popleft()
                self._tell(granted.request, granted.places, [KeyVerdict.FULL] * len(granted.places))
                super()._send(messages.ReleaseChunks(request=granted.request, indices=_words(granted.places)))
                continue
            frames = staging.take(granted.frames)
            if frames is None:
                break
            self._waiting.popleft()
            if granted.transfer is None:
                self._lent.setdefault(granted.request, {})[granted.places[0]] = frames
                writes.setdefault(granted.request, []).append(granted.places[0])
            else:
                self._fetch(granted, frames, self.session)
        for request, places in writes.items():
            frames = b"".join(self._lent[request][place] for place in places)
            self._tell(request, places, [KeyVerdict.WRITE] * len(places), frames=frames)

    def _give_back(self, session: RemoteSession, frames: bytes) -> None:
        if session is self.session:
            assert session.staging is not None
            session.staging.give_back(frames)
            self._admit()

    def _moving(self, session: RemoteSession, call: Callable[[Outcome], None]) -> Callable[[Outcome], None] | None:
        """Keep the staging frames mapped until a transfer ends; returns what the transfer must call at its end.

        That runs ``call`` in the I/O thread. None: the session has ended, or no transport is open.
        """
        if session.transport is None or not session.enter():
            return None

        def ended(outcome: Outcome) -> None:
            call(outcome)
            session.leave()

        def on_end(outcome: Outcome) -> None:
            with contextlib.suppress(PDTransportError, RuntimeError):  # the client is closing, which frees everything
                self._post(lambda: ended(outcome))

        return on_end

    def _fetch(self, granted: _StagedChunks, frames: bytes, session: RemoteSession) -> None:
        """Load: fetch these chunks into staging frames."""
        on_end = self._moving(session, partial(self._fetched, granted, frames, session))
        if on_end is None:
            return
        assert session.transport is not None
        assert granted.transfer is not None
        pages = np.frombuffer(frames, dtype=np.uint32).tolist()
        session.transport.receive(
            granted.transfer,
            transfer_digest(granted.transfer),
            len(pages),
            pages,
            host=self._host,
            port=self._agent_port,
            on_end=on_end,
        )

    def _fetched(self, granted: _StagedChunks, frames: bytes, session: RemoteSession, outcome: Outcome) -> None:
        if session is not self.session or granted.request not in self._asked:
            self._give_back(session, frames)
        elif outcome.ok:
            lent = self._lent.setdefault(granted.request, {})
            lent.update(zip(granted.places, self._cut(granted, frames), strict=True))
            self._tell(
                granted.request, granted.places, [KeyVerdict.READ] * len(granted.places), granted.checksums, frames
            )
        else:
            logger.warning("chunks of pool %s did not arrive: %s", self._pool, outcome.reason)
            self._tell(granted.request, granted.places, [KeyVerdict.LOST] * len(granted.places))
            super()._send(messages.ReleaseChunks(request=granted.request, indices=_words(granted.places)))
            self._give_back(session, frames)

    def _cut(self, granted: _StagedChunks, frames: bytes) -> Iterator[bytes]:
        """Split the frames of a transfer by chunk."""
        message = self._asked[granted.request].message
        assert isinstance(message, messages.Load)
        sizes, at = np.frombuffer(message.sizes, dtype="<u4").tolist(), 0
        for place in granted.places:
            end = at + 4 * frames_for(sizes[place], self._session.frame_bytes)
            yield frames[at:end]
            at = end

    # -- messages from operations -----------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        if isinstance(message, messages.Publish):
            self._publish(message)
            return
        super()._send(message)
        session = self.session
        if isinstance(message, messages.ReleaseChunks | messages.CancelRequest) and isinstance(session, RemoteSession):
            places = list(self._lent.get(message.request, ()))
            if isinstance(message, messages.ReleaseChunks):
                places = np.frombuffer(message.indices, dtype="<u4").tolist()
            self._give_back(session, self._take_back(message.request, places))

    def _take_back(self, request: int, places: list[int]) -> bytes:
        """Remove and return the staging frames of these chunks; chunks without frames are skipped."""
        lent = self._lent.get(request, {})
        frames = b"".join(lent.pop(place, b"") for place in places)
        if not lent:
            self._lent.pop(request, None)
        return frames

    def _publish(self, message: messages.Publish) -> None:
        """Store: offer the chunks in staging frames to the agent, which fetches them."""
        session = self._session
        frames = self._take_back(message.request, np.frombuffer(message.indices, dtype="<u4").tolist())
        on_end = self._moving(session, lambda _outcome: self._give_back(session, frames))
        if on_end is None:
            return
        assert session.transport is not None
        transfer, pages = new_transfer(), np.frombuffer(frames, dtype=np.uint32).tolist()
        offer = session.transport.offer(transfer, transfer_digest(transfer), len(pages), on_end)
        offer.ready(pages, len(pages))
        offer.finish()
        super()._send(
            RemotePublish(
                request=message.request,
                indices=message.indices,
                checksums=message.checksums,
                transfer=transfer,
                host=session.transport.host,
                port=session.transport.port,
            )
        )


def _words(places: list[int]) -> bytes:
    return np.array(places, dtype="<u4").tobytes()
