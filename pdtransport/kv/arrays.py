"""Reads the memory layout of an array of numpy, torch, cupy or any library with DLPack, without importing the library.

Tries, in this order, ``__array_interface__`` (numpy), DLPack (torch, cupy; host or GPU) and
``__cuda_array_interface__``. Takes addresses only: copies no bytes and waits for no stream.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

from pdtransport.errors import InvalidCall

HOST = -1  # the "device" of host memory

_CPU, _CUDA, _CUDA_HOST = 1, 2, 3  # DLDeviceType
_READ_ONLY = 1  # DLManagedTensorVersioned.flags
_NO_WAIT = -1  # DLPack stream argument "don't synchronize": only addresses are read here, no values
_NEWEST = (1, 1)  # newest DLPack version that is supported


@dataclass(frozen=True)
class Layout:
    """An array's memory. ``strides`` in bytes; ``device``: a GPU's number or ``HOST``; ``owner`` keeps it alive."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    device: int
    owner: Any

    @property
    def dense(self) -> bool:
        """Whether the array is C-contiguous."""
        wanted = zip(self.shape, self.strides, dense_strides(self.shape, self.item_bytes), strict=True)
        return all(size == 1 or given == dense for size, given, dense in wanted)


def layout_of(array: Any) -> Layout:
    """The layout of ``array``, which keeps the array alive.

    Raises:
        InvalidCall: not an array, read-only, or on a device that is not supported.
    """
    try:
        if hasattr(array, "__array_interface__"):
            return _of_interface(array, array.__array_interface__, HOST)
        if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
            return _of_dlpack(array)
        if hasattr(array, "__cuda_array_interface__"):
            return _of_interface(array, array.__cuda_array_interface__, _device_number(array))
    except InvalidCall:
        raise
    except Exception as error:  # noqa: BLE001 - whatever another library says of its array
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidCall(f"this {type(array).__name__} can't be handed over in place: {why}") from None
    raise InvalidCall(f"expected an array of numpy, torch, cupy or any with DLPack, not {type(array).__name__}")


def _of_interface(array: Any, interface: dict[str, Any], device: int) -> Layout:
    address, read_only = interface["data"]
    if read_only:
        raise InvalidCall("the array is read-only: pages are written in place, so pass writable memory")
    shape, item_bytes = tuple(interface["shape"]), int(interface["typestr"][2:])
    strides = interface.get("strides")
    return Layout(
        address,
        shape,
        tuple(strides) if strides is not None else dense_strides(shape, item_bytes),
        item_bytes,
        device,
        array,
    )


def _device_number(array: Any) -> int:
    """The number of an array's GPU, which ``__cuda_array_interface__`` does not give."""
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[1])
    number = getattr(array.device, "id", None)  # cupy's name for it
    return int(number if number is not None else array.device.index)


# -- DLPack: dlpack.h of https://github.com/dmlc/dlpack, versions 0 and 1 ----------------------------------------------


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; null: C-contiguous
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


def _of_dlpack(array: Any) -> Layout:
    kind, number = array.__dlpack_device__()
    if int(kind) not in (_CPU, _CUDA, _CUDA_HOST):
        raise InvalidCall(
            f"the array lies on a device of DLPack type {int(kind)}: only host and CUDA memory are supported"
        )
    capsule = _exported(array, {"stream": _NO_WAIT} if int(kind) == _CUDA else {})
    tensor, flags = _read(capsule)
    if flags & _READ_ONLY:
        raise InvalidCall("the array is read-only: pages are written in place, so pass writable memory")
    if tensor.bits * tensor.lanes % 8:
        raise InvalidCall(f"the array's elements of {tensor.bits * tensor.lanes} bits are not whole bytes")
    item_bytes = tensor.bits * tensor.lanes // 8
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = dense_strides(shape, item_bytes)
    if tensor.strides:
        strides = tuple(item_bytes * stride for stride in tensor.strides[: tensor.ndim])
    # A capsule that was not consumed frees the memory when it is destroyed, so the layout keeps it as an owner.
    device = int(number) if int(kind) == _CUDA else HOST
    return Layout((tensor.data or 0) + tensor.byte_offset, shape, strides, item_bytes, device, (array, capsule))


def _exported(array: Any, how: dict[str, Any]) -> Any:
    try:
        return array.__dlpack__(**how, max_version=_NEWEST)
    except TypeError:  # a library that knows only version 0
        return array.__dlpack__(**how)


def _read(capsule: Any) -> tuple[_Tensor, int]:
    """A capsule's tensor (valid as long as the capsule) and flags."""
    valid, pointer = ctypes.pythonapi.PyCapsule_IsValid, ctypes.pythonapi.PyCapsule_GetPointer
    valid.argtypes = pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    valid.restype, pointer.restype = ctypes.c_int, ctypes.c_void_p
    if valid(capsule, b"dltensor"):
        return _Managed.from_address(pointer(capsule, b"dltensor")).tensor, 0
    if valid(capsule, b"dltensor_versioned"):
        found = _Versioned.from_address(pointer(capsule, b"dltensor_versioned"))
        if found.major > _NEWEST[0]:
            raise InvalidCall(f"the array is exported as DLPack {found.major}.{found.minor}, which is not known here")
        return found.tensor, found.flags
    raise InvalidCall("the array's __dlpack__ gives no DLPack capsule")


def dense_strides(shape: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    """Strides of a C-contiguous array, in bytes."""
    return tuple(item_bytes * math.prod(shape[i + 1 :]) for i in range(len(shape)))
