"""The only module that knows UCX's Python bindings: ``ucxx``, or ``ucp`` (ucx-py) where only that is installed.

Both are used at their core layer (context, worker, endpoint, tagged messages), driven by explicit progress on the
caller's thread: no asyncio, no progress thread. The ``ucp`` half follows ucx-py 0.4x and is untested, because no
installable build of it exists any more.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pdtransport.errors import LinkUnavailable
from pdtransport.links.ucx import query

# Buffer of a message: a numpy array for host memory, or for GPU memory any object with ``__cuda_array_interface__`` and
# ``nbytes``.
Bytes = npt.NDArray[np.uint8] | Any

CLOSE_S = 0.2  # longest time that closing one endpoint may take

REMEDY = "pip install 'pdtransport[ucx-cu12]' or 'pdtransport[ucx-cu13]' (either works without a GPU)"
MISSING = f"UCX is not installed: {REMEDY}"


class UcxRequest(Protocol):
    """A message in flight; keeps its buffer alive."""

    @property
    def completed(self) -> bool: ...

    def error(self) -> str | None:
        """Why the request failed, or None; only valid once completed."""
        ...


class UcxEndpoint(Protocol):
    """A connection to one peer. Closing it ends its requests."""

    def send(self, data: Bytes, tag: int) -> UcxRequest: ...

    def receive(self, room: Bytes, tag: int) -> UcxRequest:
        """A message shorter than ``room`` completes as well; a longer one is an error."""
        ...

    def lanes(self) -> list[str]:
        """Names of the transports that carry the connection; empty if unknown."""
        ...

    def close(self) -> None: ...


class UcxWorker(Protocol):
    """Receive queues and the progress engine of their messages."""

    address: bytes

    def fileno(self) -> int: ...

    def progress(self) -> None: ...

    def arm(self) -> bool:
        """Call before sleeping on the descriptor; False: there is work to do first."""
        ...

    def connect(self, address: bytes) -> UcxEndpoint: ...

    def receive(self, room: Bytes, tag: int) -> UcxRequest:
        """As :meth:`UcxEndpoint.receive`, but from any peer; ends with the worker."""
        ...

    def close(self) -> None:
        """Call only after its endpoints are closed."""
        ...


class Context(Protocol):
    """UCX, opened once per process. Close it after all its workers: another order crashes at exit."""

    def worker(self) -> UcxWorker: ...

    def takes_gpu_memory(self) -> bool:
        """True if UCX has transports for CUDA memory and a GPU to use them on."""
        ...

    def domains_of(self, address: int, nbytes: int) -> list[str]:
        """Names of the UCX memory domains (``cuda_ipc``, ``mlx5_0``, ...) through which a peer can read this memory.

        Empty if unknown.
        """
        ...

    def close(self) -> None: ...


def open_context(options: dict[str, str]) -> Context:
    """Open UCX with ``options`` (``UCX_`` variables without their prefix), over ``ucxx`` or ``ucp``.

    Raises:
        LinkUnavailable: neither is installed, or UCX does not start.
    """
    for package, module, make in (
        ("ucxx", "ucxx._lib.libucxx", _UcxxContext),
        ("ucp", "ucp._libs.ucx_api", _UcpContext),
    ):
        try:
            with ucx_environment_kept():
                api = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:
            raise LinkUnavailable(f"{package} can't be loaded ({error}): {REMEDY}") from None
        try:
            return make(api, options)
        except Exception as error:  # noqa: BLE001 - each binding has its own exceptions
            raise LinkUnavailable(f"UCX does not start: {error}") from None
    raise LinkUnavailable(MISSING)


@contextmanager
def ucx_environment_kept() -> Iterator[None]:
    """Restore ``UCX_*`` variables that a binding changes on import.

    The changes would affect every other UCX in this process (for example one rendezvous rail, which means one NIC).
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("UCX_")}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("UCX_") and name not in before]:
            del os.environ[name]
        os.environ.update(before)


class _Refused:
    """A request that UCX rejected at once."""

    completed = True

    def __init__(self, text: str) -> None:
        self._text = text

    def error(self) -> str | None:
        return self._text


# -- ucxx ----------------------------------------------------------------------------------------------------------


class _UcxxRequest:
    def __init__(self, request: Any, buffer: Any) -> None:
        self._request = request
        self._buffer = buffer

    @property
    def completed(self) -> bool:
        return bool(self._request.completed)

    def error(self) -> str | None:
        try:
            self._request.check_error()
        except Exception as error:  # noqa: BLE001 - a dozen UCXX types, all with a one-line text
            return str(error) or type(error).__name__
        return None


class _UcxxPost:
    """Starts a tagged operation on a numpy array or GPU memory."""

    def __init__(self, api: Any) -> None:
        self._tag = api.UCXXTag
        self._array = importlib.import_module("ucxx._lib.arr").Array

    def __call__(self, operation: Any, memory: Bytes, tag: int) -> UcxRequest:
        buffer = self._array(memory)
        try:
            return _UcxxRequest(operation(buffer, self._tag(tag)), buffer)
        except Exception as error:  # noqa: BLE001 - whatever it is, the request failed
            return _Refused(str(error) or type(error).__name__)


class _UcxxEndpoint:
    def __init__(self, post: _UcxxPost, api: Any, worker: Any, address: bytes, closed: list[Any]) -> None:
        self._post, self._closed = post, closed
        where = api.UCXAddress.create_from_buffer(address)
        # Without peer error handling, a peer that is killed in the middle of a copy crashes this process (UCX calls
        # abort()).
        self._endpoint = api.UCXEndpoint.create_from_worker_address(worker, where, endpoint_error_handling=True)

    def send(self, data: Bytes, tag: int) -> UcxRequest:
        return self._post(self._endpoint.tag_send, data, tag)

    def receive(self, room: Bytes, tag: int) -> UcxRequest:
        # Posted through the endpoint, not the worker, so that closing the endpoint ends it.
        return self._post(self._endpoint.tag_recv, room, tag)

    def lanes(self) -> list[str]:
        return query.lanes(int(self._endpoint.handle))

    def close(self) -> None:
        if self._endpoint is not None:
            endpoint, self._endpoint = self._endpoint, None
            self._closed.append(endpoint)
            endpoint.close_blocking(period=int(CLOSE_S * 1e9 / 2), max_attempts=1)


class _UcxxWorker:
    def __init__(self, post: _UcxxPost, api: Any, context: Any) -> None:
        self._post, self._api = post, api
        self._worker = api.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
        self._worker.init_blocking_progress_mode()
        self.address = bytes(self._worker.address.tobytes())
        self.progress: Callable[[], None] = self._worker.progress
        self._closed: list[Any] = []  # closed endpoints

    def fileno(self) -> int:
        return int(self._worker.epoll_file_descriptor)

    def arm(self) -> bool:
        return bool(self._worker.arm())

    def connect(self, address: bytes) -> UcxEndpoint:
        return _UcxxEndpoint(self._post, self._api, self._worker, address, self._closed)

    def receive(self, room: Bytes, tag: int) -> UcxRequest:
        return self._post(self._worker.tag_recv, room, tag)

    def close(self) -> None:
        if self._worker is not None:
            worker, self._worker = self._worker, None
            self.progress = lambda: None
            for endpoint in self._closed:
                query.still_canceling(int(endpoint.ucxx_ptr))
            self._closed.clear()
            worker.cancel_inflight_requests(period=int(CLOSE_S * 1e9 / 2), max_attempts=1)


class _UcxxContext:
    def __init__(self, api: Any, options: dict[str, str]) -> None:
        self._post, self._api = _UcxxPost(api), api
        self._context = api.UCXContext(dict(options), feature_flags=(api.Feature.TAG, api.Feature.WAKEUP))

    def worker(self) -> UcxWorker:
        return _UcxxWorker(self._post, self._api, self._context)

    def takes_gpu_memory(self) -> bool:
        # Not UCXContext.cuda_support, which only shows how UCX was built and configured, even without a GPU.
        return query.takes_cuda_memory(int(self._context.handle))

    def domains_of(self, address: int, nbytes: int) -> list[str]:
        return query.domains_of(int(self._context.handle), str(self._context.info), address, nbytes)

    def close(self) -> None:
        self._context = None


# -- ucp (ucx-py), untested ----------------------------------------------------------------------------------------


class _UcpRequest:
    """Request of ucx-py, which reports the end in a callback; an operation that completes at once returns None."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self._error: str | None = None
        self.completed = False

    def ended(self, _request: Any, exception: Exception | None) -> None:
        self._error = str(exception) if exception is not None else None
        self.completed = True

    def error(self) -> str | None:
        return self._error


class _UcpEndpoint:
    def __init__(self, api: Any, array: Any, worker: Any, address: bytes) -> None:
        self._api, self._array, self._worker = api, array, worker
        where = api.UCXAddress.from_buffer(address)
        self._endpoint = api.UCXEndpoint.create_from_worker_address(worker, where, endpoint_error_handling=True)

    def send(self, data: Bytes, tag: int) -> UcxRequest:
        request = _UcpRequest(self._array(data))
        if self._api.tag_send_nb(self._endpoint, request._buffer, data.nbytes, tag, request.ended) is None:
            request.completed = True
        return request

    def receive(self, room: Bytes, tag: int) -> UcxRequest:
        request = _UcpRequest(self._array(room))
        return _ucp_receive(self._api, self._worker, self._endpoint, request, room.nbytes, tag)

    def lanes(self) -> list[str]:
        return query.lanes(int(self._endpoint.handle))

    def close(self) -> None:
        if self._endpoint is not None:
            endpoint, self._endpoint = self._endpoint, None
            endpoint.close()


class _UcpWorker:
    def __init__(self, api: Any, array: Any, context: Any) -> None:
        self._api, self._array = api, array
        self._worker = api.UCXWorker(context)
        self._fd = int(self._worker.init_blocking_progress_mode())
        self.address = bytes(self._worker.get_address())

    def fileno(self) -> int:
        return self._fd

    def progress(self) -> None:
        if self._worker is not None:
            self._worker.progress()

    def arm(self) -> bool:
        return bool(self._worker.arm())

    def connect(self, address: bytes) -> UcxEndpoint:
        return _UcpEndpoint(self._api, self._array, self._worker, address)

    def receive(self, room: Bytes, tag: int) -> UcxRequest:
        return _ucp_receive(self._api, self._worker, None, _UcpRequest(self._array(room)), room.nbytes, tag)

    def close(self) -> None:
        self._worker = None


class _UcpContext:
    def __init__(self, api: Any, options: dict[str, str]) -> None:
        self._api = api
        self._array = importlib.import_module("ucp._libs.arr").Array
        self._context = api.UCXContext(dict(options), feature_flags=(api.Feature.TAG, api.Feature.WAKEUP))

    def worker(self) -> UcxWorker:
        return _UcpWorker(self._api, self._array, self._context)

    def takes_gpu_memory(self) -> bool:
        return query.takes_cuda_memory(int(self._context.handle))

    def domains_of(self, address: int, nbytes: int) -> list[str]:
        return query.domains_of(int(self._context.handle), str(self._context.info()), address, nbytes)

    def close(self) -> None:
        self._context = None


def _ucp_receive(api: Any, worker: Any, endpoint: Any, request: _UcpRequest, nbytes: int, tag: int) -> UcxRequest:
    if api.tag_recv_nb(worker, request._buffer, nbytes, tag, request.ended, ep=endpoint) is None:
        request.completed = True
    return request
