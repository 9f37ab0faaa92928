"""A client's connection to the pool service on its host: one DEALER socket, driven by the client's I/O thread.

A *session* is one connection to one run of the service. It holds a byte of the lock file and maps the pool's memory.
When the service ends, all open requests fail at once, and the next request opens a new session. The old session unmaps
the memory and releases its lock byte when no copy uses it any more.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from pdtransport.control.sockets import Inbox, Letter, Socket, open_socket, watch
from pdtransport.errors import PoolRefusal, PoolUnavailable, SettingsError
from pdtransport.kv.geometry import HOST
from pdtransport.pool import messages
from pdtransport.pool.core.locks import SERVICE_BYTE, LockFile, check_private
from pdtransport.pool.core.shared_memory import Mapping, map_memory, remove_if_stale
from pdtransport.protocol.messages import Message, WireError
from pdtransport.settings import ControlSettings

logger = logging.getLogger(__name__)

RETRY_S = 0.005  # between attempts to send Hello while the socket connects
MAX_ASKED = 1 << 16  # open requests
MAX_FRAMES_A_TURN = 256
POLLIN = int(zmq.POLLIN)  # as an int: using the enum would cost as much as the system call
FOREVER_S = 1e9  # deadline of a request that has no last answer
# When to check, after a disconnect, whether the service left its memory file behind. Several times, since the kernel
# closes the files of a killed process one after the other: the memory file may still be locked at first.
STALE_LOOKS_S = (0.0, 0.1, 1.0)

CONTROL = ControlSettings(max_frame_bytes=messages.MAX_FRAME_BYTES)

Heard = Callable[["ServiceSession | None", "messages.FromPool | PoolUnavailable"], bool]


class ServiceSession:
    """A session with one run of the service. Use ``mapping`` only between :meth:`enter` and :meth:`leave`."""

    def __init__(self, byte: int, let_go: Callable[[], None]) -> None:
        self.byte = byte
        self.mapping: Mapping | None = None
        self.memory: Path | None = None  # path of the mapped file
        self.memory_bytes = self.frame_bytes = self.client_bytes = 0
        self.broken = False  # the session has ended
        self.waits = False  # copies must wait for ``prepared``: memory is being registered, or links opened
        self.prepared = threading.Event()  # preparation has ended, with or without success
        self.problem = ""  # why it failed
        self._let_go = let_go
        self._guard = threading.Lock()
        self._users = 0
        self._closed = False

    def begin(self) -> None:
        """Prepare for copies: called before each operation begins."""
        return

    def enter(self) -> bool:
        """Keep the memory mapped until :meth:`leave`; False if the session has ended."""
        with self._guard:
            if self.broken or self.mapping is None:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        with self._guard:
            self._users -= 1
            self._close_if_idle()

    def end(self) -> None:
        """End the session. Copies in flight run to completion; no new copy begins."""
        with self._guard:
            self.broken = True
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self.broken and self._users == 0 and not self._closed:
            self._closed = True
            if self.mapping is not None:
                self.mapping.close()
            self._let_go()  # releases the lock, so it comes last: afterwards the service reuses the frames


class Asked:
    """An open request.

    ``heard`` is called in the I/O thread with each answer and its session, or with the error that ends the request. It
    returns True if that was the last answer.
    """

    def __init__(self, message: Message, number: int, deadline: float, heard: Heard) -> None:
        self.message, self.number, self.deadline, self.heard = message, number, deadline, heard


class Wire:
    """Sends requests and dispatches answers; driven by a :class:`pdtransport.io.reactor.Reactor`.

    Args:
        device: the GPU that copies (-1: none).
        context: ZeroMQ context to share; by default the wire makes and ends its own.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        client_name: str,
        tenant: str,
        device: int = HOST,
        context: zmq.Context[Socket] | None = None,
    ) -> None:
        self._device = device
        self._lock_path, self._socket_path = directory / f"{name}.lock", directory / f"{name}.sock"
        self._pool, self._client_name, self._tenant = name, client_name, tenant
        self._own_context = context is None
        self._context: zmq.Context[Socket] = context or zmq.Context(1)
        self._socket: Socket | None = None
        self._monitor: Socket | None = None
        self._inbox: Inbox | None = None
        self.session: ServiceSession | None = None  # its mapping is None until the service's Welcome
        self._greeted = False
        self._next_try = 0.0
        self._why = ""
        self._asked: dict[int, Asked] = {}
        self.introduction: messages.Introduce | None = None  # sent at the start of each session
        self._unsent: list[Asked] = []
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    # -- requests ---------------------------------------------------------------------------------------------------

    def ask(self, asked: Asked) -> None:
        """Send a request as soon as there is a session. ``heard`` is called until the last answer or the deadline."""
        if len(self._asked) >= MAX_ASKED:
            asked.heard(None, PoolUnavailable(f"{MAX_ASKED} requests to pool {self._pool} are in progress"))
            return
        self._asked[asked.number] = asked
        if self.session is None or self.session.mapping is None:
            self._unsent.append(asked)
        else:
            self._send(asked.message)

    def tell(self, session: ServiceSession, message: Message) -> None:
        """Send a message that has no answer or belongs to an open request, if ``session`` is still the current one."""
        if session is self.session:
            self._send(message)

    def forget(self, number: int, *, cancel: bool) -> None:
        """End a request: ignore further answers to it.

        Args:
            cancel: also tell the pool to release all that the request holds. No copy may be in flight for it.
        """
        self._asked.pop(number, None)
        unsent = [asked for asked in self._unsent if asked.number != number]
        was_sent, self._unsent = len(unsent) == len(self._unsent), unsent
        if cancel and was_sent and self.session is not None and self.session.mapping is not None:
            self._send(messages.CancelRequest(request=number))

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call ``call`` in the I/O thread at time ``when``."""
        heapq.heappush(self._due, (when, next(self._order), call))

    def _send(self, message: Message) -> None:
        assert self._socket is not None
        try:
            self._socket.send(messages.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError:  # the queue is full: the service hangs; or it is gone, as the monitor reports too
            self._hang_up("it does not read its messages")

    # -- called by the reactor --------------------------------------------------------------------------------------

    def sockets(self) -> list[Socket]:
        return [each for each in (self._socket, self._monitor) if each is not None]

    def descriptors(self) -> list[int]:
        return []

    def arm(self) -> bool:
        return not any(int(each.get(zmq.EVENTS)) & POLLIN for each in self.sockets())

    def next_deadline(self) -> float | None:
        deadlines = [asked.deadline for asked in self._asked.values()]
        if self._unsent:
            deadlines.append(self._next_try)
        if self._due:
            deadlines.append(self._due[0][0])
        return min(deadlines, default=None)

    def turn(self, now: float) -> bool:
        self._read_monitor()
        more = self._read()
        while self._due and self._due[0][0] <= now:
            heapq.heappop(self._due)[2]()
        for asked in [asked for asked in self._asked.values() if asked.deadline <= now]:
            self._end(asked, f"no answer within the deadline{self._why and f' ({self._why})'}")
        self._unsent = [asked for asked in self._unsent if asked.number in self._asked]
        if self._unsent and now >= self._next_try:
            self._next_try = now + RETRY_S
            self._reach()
        return more

    def close(self) -> None:
        if self.session is not None and self.session.mapping is not None and self._socket is not None:
            try:
                self._socket.set(zmq.LINGER, 200)
                self._socket.send(messages.encode(messages.Bye()), zmq.NOBLOCK)
            except zmq.ZMQError:
                pass  # the service sees the released lock as well
        self._hang_up("the client is closed", linger=200)
        if self._own_context:
            self._context.term()

    # -- start and end of a session ---------------------------------------------------------------------------------

    def _reach(self) -> None:
        """Take the next step of connecting: open the sockets, or send Hello."""
        try:
            if self.session is None:
                self._open()
            if not self._greeted:
                assert self._socket is not None
                self._socket.send(messages.encode(self._hello()), zmq.NOBLOCK)
                self._greeted = True
        except zmq.Again:
            pass  # not connected yet
        except SettingsError as error:  # there is no pool: fail waiting requests now, not at their deadlines
            unsent, self._unsent = self._unsent, []
            for asked in unsent:
                self._end(asked, str(error))

    def _hello(self) -> Message:
        assert self.session is not None
        return messages.PoolHello(lock=self.session.byte, name=self._client_name, tenant=self._tenant)

    def _open(self) -> None:
        check_private(self._lock_path.parent)
        lock = LockFile(self._lock_path)
        if not lock.held(SERVICE_BYTE):
            lock.close()
            raise SettingsError(f"no pool {self._pool!r} runs in {self._lock_path.parent}")
        self.session, self._greeted = ServiceSession(lock.take_any(), lock.close), False
        self._socket = open_socket(self._context, zmq.DEALER, CONTROL, ipv6=False)
        self._monitor = watch(self._context, self._socket, zmq.EVENT_DISCONNECTED)
        self._inbox = Inbox(self._socket, addressed=False)
        self._socket.connect(f"ipc://{self._socket_path}")

    def _hang_up(self, why: str, linger: int = 0) -> None:
        """End the session; all requests that were sent fail."""
        session, self.session = self.session, None
        if self._socket is not None and self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(linger)
        self._socket = self._monitor = self._inbox = None
        unsent = {asked.number for asked in self._unsent}
        if session is not None:
            welcome = session.mapping is not None
            session.end()
            if session.memory is not None:
                self._remove_if_stale(session.memory)
            if not welcome:  # no request was sent yet: they stay queued for the next attempt
                self._why = why
                return
        for asked in [asked for asked in self._asked.values() if asked.number not in unsent]:
            self._end(asked, why)

    def _remove_if_stale(self, memory: Path) -> None:
        """Remove the memory file of a service that was killed, which could not remove it itself."""
        now = time.monotonic()
        for after_s in STALE_LOOKS_S:
            self.at(now + after_s, lambda: remove_if_stale(memory))

    def _end(self, asked: Asked, why: str, kind: type[PoolUnavailable] = PoolUnavailable) -> None:
        self._asked.pop(asked.number, None)
        asked.heard(None, kind(f"pool {self._pool}: {why}"))

    # -- incoming messages ------------------------------------------------------------------------------------------

    def _read_monitor(self) -> None:
        for _ in range(MAX_FRAMES_A_TURN):
            if self._monitor is None or not int(self._monitor.get(zmq.EVENTS)) & POLLIN:
                return
            try:
                report = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._on_monitored(report["event"])

    def _on_monitored(self, event: int) -> None:
        if event == zmq.EVENT_DISCONNECTED:
            self._read()  # messages that it sent before it ended
            self._hang_up("it ended")

    def _read(self) -> bool:
        for _ in range(MAX_FRAMES_A_TURN):
            letter = self._inbox.read() if self._inbox is not None else False
            if not letter:
                return False
            if not isinstance(letter, Letter) or letter.body is None:
                continue
            if not self._believed(letter.part):
                continue
            try:
                self._on_frame(letter.body.bytes)
            except WireError as error:
                self._hang_up(str(error))
        return True

    def _believed(self, part: zmq.Frame) -> bool:
        """Whether the sender is trusted. Always True here: the socket's directory is private to this user."""
        return True

    def _on_frame(self, frame: bytes) -> None:
        self._on_message(messages.from_pool(frame))

    def _on_message(self, message: messages.FromPool) -> None:
        if isinstance(message, messages.PoolWelcome):
            self._on_welcome(message)
        elif isinstance(message, messages.PoolRefused) and message.request == 0:
            self._hang_up(message.reason)
        elif isinstance(message, messages.PoolRefused) and message.what == "hello":
            self._hang_up("it lost this client's session")
        elif isinstance(message, messages.PoolRefused):
            refused = self._asked.get(message.request)
            if message.what == "wish" and refused is not None:
                self._end(refused, message.reason, PoolRefusal)
        else:
            asked = self._asked.get(message.request)
            if asked is not None and asked.heard(self.session, message):
                self._asked.pop(asked.number, None)

    def _on_welcome(self, welcome: messages.PoolWelcome) -> None:
        session = self.session
        if session is None or session.mapping is not None:
            return
        try:
            mapping = map_memory(Path(welcome.memory), welcome.nbytes)
        except OSError as error:
            self._hang_up(f"its memory can't be mapped: {error.strerror}")
            return
        session.memory_bytes = mapping.nbytes
        session.frame_bytes, session.client_bytes = welcome.frame_bytes, welcome.client_bytes
        session.mapping, session.memory, self._why = mapping, Path(welcome.memory), ""
        session.waits = self._device != HOST
        threading.Thread(target=_prepare, args=(session, self._device), name="pdpool-prepare", daemon=True).start()
        self._send_unsent(session)

    def _send_unsent(self, session: ServiceSession) -> None:
        if self.introduction is not None:
            self._send(self.introduction)
        unsent, self._unsent = self._unsent, []
        for asked in unsent:
            if asked.number in self._asked and session is self.session:
                self._send(asked.message)


def _prepare(session: ServiceSession, device: int) -> None:
    """Prefault the memory, or register it with CUDA, then set ``session.prepared``.

    Without prefaulting, the first copies would spend a quarter of their time on page faults. Copies of a GPU can't
    begin before the memory is registered.
    """
    try:
        if session.enter():
            assert session.mapping is not None
            try:
                reach_memory(session.mapping, device, lambda: session.broken)
                session.problem = session.mapping.problem
            finally:
                session.leave()
    finally:
        session.prepared.set()


def reach_memory(mapping: Mapping, device: int, stop: Callable[[], bool]) -> None:
    """Prefault the mapping for host copies, or register it with GPU ``device``."""
    if device == HOST:
        mapping.populate(stop)
        return
    mapping.register(device, stop)
    if mapping.problem:
        logger.warning("the pool's chunks are neither stored nor loaded: %s", mapping.problem)


def now_plus(seconds: float) -> float:
    """A deadline on the reactor's clock."""
    return time.monotonic() + seconds
