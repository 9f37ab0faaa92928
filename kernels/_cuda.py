"""The CUDA calls that the GPU kernels need: error checking, memory, handles for other processes.

cupy is imported on the first call. Functions make their device the calling thread's current device and leave it so.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

IPC_HANDLE_BYTES = 64
HOST_ALLOC_PORTABLE_MAPPED = 1 | 2
HOST_REGISTER_PORTABLE_MAPPED = 1 | 2
CAPTURE_MODE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
MEMCPY_DEFAULT = 4
IPC_LAZY_PEER_ACCESS = 1
HIGH_PRIORITY = -100  # CUDA clamps it to the highest priority of the device
MAX_ERROR = 600  # characters; compiler output is long
PEER_ACCESS_ALREADY_ENABLED = 704  # cudaErrorPeerAccessAlreadyEnabled
POINTER_ATTRIBUTE_IPC_CAPABLE = 10  # CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE

NO_CUPY = "the GPU kernels need cupy ({error}): pip install 'pdtransport[cu13]', or [cu12] for CUDA 12"
NOT_EXPORTABLE = (
    "memory at {base:#x} can't be mapped by other processes: it was not made by cudaMalloc; with PyTorch, take "
    "expandable_segments out of PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF)"
)
NO_PEER_ACCESS = (
    "GPU {device} has no peer access to GPU {uuid}, which holds the peer's memory: use GPUs that reach each other "
    "(nvidia-smi topo -p2p r), or another link"
)
NOT_OPENED = (
    "can't map another process' memory on GPU {device}: {error}; both must run on one host, in different processes, "
    "see the GPU (CUDA_VISIBLE_DEVICES, peer access) and, in containers, share the IPC and PID namespaces"
)


class GpuError(RuntimeError):
    """A CUDA call or a kernel failed; the text is one line that says which operation it was."""


@functools.cache
def _import_cupy() -> Any:
    import cupy

    return cupy


def cupy() -> Any:
    """The cupy module.

    Raises:
        GpuError: it is not installed, or does not fit this machine.
    """
    try:
        return _import_cupy()
    except (ImportError, OSError, RuntimeError) as error:
        raise GpuError(NO_CUPY.format(error=one_line(error))) from None


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise GpuError(f"no NVIDIA driver: {error}") from None
    pointer = ctypes.c_void_p
    for name, arguments in {
        "cuMemGetAddressRange_v2": (pointer, pointer, ctypes.c_uint64),
        "cuPointerGetAttribute": (pointer, ctypes.c_int, ctypes.c_uint64),
        "cuLaunchHostFunc": (pointer, pointer, pointer),
        "cuIpcCloseMemHandle": (ctypes.c_uint64,),
        "cuThreadExchangeStreamCaptureMode": (pointer,),
        "cuInit": (ctypes.c_uint,),
        "cuDeviceGet": (pointer, ctypes.c_int),
        "cuDeviceGetUuid_v2": (pointer, ctypes.c_int),
        "cuGetErrorString": (ctypes.c_int, pointer),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    if code := library.cuInit(0):
        raise GpuError(f"the NVIDIA driver does not start (CUDA driver error {code})")
    return library


def driver(doing: str, function: str, *arguments: Any) -> None:
    """Call a function of libcuda.

    Raises:
        GpuError: the call failed; the text begins with ``doing``.
    """
    library = _driver()
    code = getattr(library, function)(*arguments)
    if code:
        text = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(text))
        raise GpuError(f"{doing}: {(text.value or b'?').decode()} (CUDA driver error {code})")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:MAX_ERROR] or type(error).__name__


@contextmanager
def cuda(doing: str) -> Iterator[Any]:
    """Gives cupy.cuda and turns its errors into :class:`GpuError`."""
    module = cupy()
    try:
        yield module.cuda
    except GpuError:
        raise
    except (RuntimeError, MemoryError, OSError, module.cuda.compiler.CompileException) as error:
        raise GpuError(f"{doing}: {one_line(error)}") from None


@contextmanager
def on(device: int, doing: str) -> Iterator[Any]:
    """As :func:`cuda`, with ``device`` current.

    The previous device is not restored: that could create a context, hundreds of megabytes large, on a device which
    this process does not use.
    """
    with cuda(doing) as api:
        api.Device(device).use()
        yield api


def _maybe_on(device: int | None, doing: str) -> AbstractContextManager[Any]:
    return cuda(doing) if device is None else on(device, doing)


def pinned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Allocate zeroed pinned host memory that every device can access at its own address.

    It is freed with the array's last view.

    Raises:
        GpuError: there is no such memory left.
    """
    with cuda(f"allocating {nbytes} bytes of pinned host memory") as api:
        memory = api.PinnedMemory(max(nbytes, 1), HOST_ALLOC_PORTABLE_MAPPED)
        array = np.frombuffer(api.PinnedMemoryPointer(memory, 0), dtype=np.uint8, count=nbytes)
    array[:] = 0
    return array


def register_host(address: int, nbytes: int, device: int) -> None:
    """Pin existing host memory (whole pages), so that every device can access it at its own address.

    It must not be unmapped before :func:`unregister_host`.

    Raises:
        GpuError: it can't be pinned, is pinned already, or devices would see it at another address.
    """
    with on(device, f"registering {nbytes} bytes of host memory") as api, _beside_captures():
        api.runtime.hostRegister(address, nbytes, HOST_REGISTER_PORTABLE_MAPPED)
        seen = api.runtime.pointerGetAttributes(address).devicePointer
        if seen != address:
            api.runtime.hostUnregister(address)
            raise GpuError(f"GPU {device} sees host memory at {seen:#x} instead of {address:#x}")


def unregister_host(address: int, device: int) -> None:
    """Undo :func:`register_host` at ``address``; no kernel may use the memory any more.

    Raises:
        GpuError: it is not registered, or the GPU has failed.
    """
    with on(device, f"unregistering host memory at {address:#x}") as api, _beside_captures():
        api.runtime.hostUnregister(address)


@contextmanager
def _beside_captures() -> Iterator[None]:
    """Calls of this thread do not break the capture of a CUDA graph in another thread."""
    mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
    driver("setting the CUDA graph capture mode", "cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        driver("setting the CUDA graph capture mode", "cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def to_host(address: int, nbytes: int, device: int | None = None, *, beside: bool = False) -> bytes:
    """Read ``nbytes`` bytes of device (or pinned) memory.

    Waits for the work of the default stream, but not for that of a :class:`GpuPages`; with ``beside`` it waits for no
    stream.

    Args:
        device: the device that ``address`` belongs to; None: the thread's current one.

    Raises:
        GpuError: the address is invalid.
    """
    data = np.empty(nbytes, dtype=np.uint8)
    if nbytes:
        with _maybe_on(device, f"reading {nbytes} bytes at {address:#x}") as api:
            if beside:
                stream = api.Stream(non_blocking=True, priority=HIGH_PRIORITY)
                api.runtime.memcpyAsync(data.ctypes.data, address, nbytes, MEMCPY_DEFAULT, stream.ptr)
                stream.synchronize()
            else:
                api.runtime.memcpy(data.ctypes.data, address, nbytes, MEMCPY_DEFAULT)
                api.runtime.streamSynchronize(api.runtime.streamLegacy)
    return data.tobytes()


def from_host(address: int, data: bytes | npt.NDArray[Any], device: int | None = None) -> None:
    """Write ``data`` to device (or pinned) memory; returns when it is written. ``device`` as for :func:`to_host`.

    Raises:
        GpuError: the address is invalid.
    """
    array = np.ascontiguousarray(np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data)
    if array.nbytes:
        with _maybe_on(device, f"writing {array.nbytes} bytes at {address:#x}") as api:
            api.runtime.memcpy(address, array.ctypes.data, array.nbytes, MEMCPY_DEFAULT)
            api.runtime.streamSynchronize(api.runtime.streamLegacy)


def allocation_of(address: int) -> tuple[int, int]:
    """Base and size in bytes of the device allocation that contains ``address``.

    Raises:
        GpuError: there is no device memory of this process at ``address``.
    """
    device_of(address)
    base, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
    doing = f"looking for the allocation of address {address:#x}"
    driver(doing, "cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(nbytes), address)
    return base.value, nbytes.value


def device_of(address: int) -> int:
    """The device whose memory contains ``address``.

    Raises:
        GpuError: it is not device memory known to this process.
    """
    with cuda(f"looking for the device of address {address:#x}") as api:
        attributes = api.runtime.pointerGetAttributes(address)
        if attributes.type not in (api.runtime.memoryTypeDevice, api.runtime.memoryTypeManaged):
            raise GpuError(f"address {address:#x} is not device memory of this process")
        api.Device(attributes.device).use()
        return int(attributes.device)


def ipc_handle(base: int) -> bytes:
    """The handle (64 bytes) with which another process on this host can map the allocation that starts at ``base``.

    Raises:
        GpuError: the allocation can't be exported, with the reason; memory of CUDA's virtual-memory API can't.
    """
    device_of(base)
    capable = ctypes.c_int()
    doing = f"exporting the memory at {base:#x}"
    driver(doing, "cuPointerGetAttribute", ctypes.byref(capable), POINTER_ATTRIBUTE_IPC_CAPABLE, base)
    if not capable.value:
        raise GpuError(NOT_EXPORTABLE.format(base=base))
    with cuda(doing) as api:
        handle: bytes = api.runtime.ipcGetMemHandle(base)
    return handle


def ipc_open(handle: bytes, device: int) -> int:
    """Map another process's allocation on ``device``; returns its address here. Open a handle once per process.

    Raises:
        GpuError: it can't be mapped; the text says what to check.
        ValueError: the handle has the wrong length.
    """
    if len(handle) != IPC_HANDLE_BYTES:
        raise ValueError(f"a CUDA IPC handle has {IPC_HANDLE_BYTES} bytes, not {len(handle)}")
    with on(device, "mapping another process' memory") as api:
        try:
            return int(api.runtime.ipcOpenMemHandle(handle, IPC_LAZY_PEER_ACCESS))
        except RuntimeError as error:
            raise GpuError(NOT_OPENED.format(device=device, error=one_line(error))) from None


def ipc_close(address: int, device: int) -> None:
    """Unmap what :func:`ipc_open` mapped on ``device``; no kernel may use it any more.

    Raises:
        GpuError: it is not mapped, or the GPU has failed.
    """
    doing = f"unmapping another process' memory at {address:#x}"
    with on(device, doing):
        driver(doing, "cuIpcCloseMemHandle", address)  # waits for the GPU; cupy's function would hold the GIL


def device_uuid(device: int) -> str:
    """``GPU-...``, as nvidia-smi prints it: equal in every process, whatever CUDA_VISIBLE_DEVICES is.

    Raises:
        GpuError: there is no such device.
    """
    doing = f"asking for GPU {device}'s UUID"
    number, raw = ctypes.c_int(), (ctypes.c_uint8 * 16)()
    driver(doing, "cuDeviceGet", ctypes.byref(number), device)
    driver(doing, "cuDeviceGetUuid_v2", ctypes.byref(raw), number)
    digits = bytes(raw).hex()
    return "GPU-" + "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


def reach(device: int, uuid: str, ours: bool) -> None:
    """Make sure that kernels on ``device`` can access memory of the GPU with this UUID.

    A GPU that CUDA_VISIBLE_DEVICES hides from this process can't be checked; CUDA IPC reaches it all the same.

    Args:
        ours: the memory was allocated by this process, so peer access is enabled here; for another process's memory
            :func:`ipc_open` does that.

    Raises:
        GpuError: the two GPUs have no peer access, or there is no such device.
    """
    with cuda("counting GPUs") as api:
        count = int(api.runtime.getDeviceCount())
    peer = next((number for number in range(count) if device_uuid(number) == uuid), device)
    if not can_access(device, peer):
        raise GpuError(NO_PEER_ACCESS.format(device=device, uuid=uuid))
    if ours and peer != device:
        with on(device, f"letting GPU {device} use memory of GPU {peer}") as api:
            try:
                api.runtime.deviceEnablePeerAccess(peer)
            except api.runtime.CUDARuntimeError as error:
                if error.status != PEER_ACCESS_ALREADY_ENABLED:
                    raise


def can_access(device: int, peer: int) -> bool:
    """True if kernels on ``device`` can access memory of ``peer``, or the two are the same.

    Raises:
        GpuError: there is no such device.
    """
    if device == peer:
        return True
    with cuda(f"asking whether GPU {device} reaches GPU {peer}") as api:
        return bool(api.runtime.deviceCanAccessPeer(device, peer))
