"""What arrays the Transport API takes: numpy's, torch's, anything with DLPack, on the host or a GPU; all in place."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pdtransport import InvalidCall, KVGeometry, PDTransportError
from pdtransport.kv.arrays import _Managed, _Versioned

SHAPE = (2, 3, 4, 5, 16)  # layers, blocks, heads, tokens, slot


def check(geometry: KVGeometry, address: int, item_bytes: int, device: int = -1) -> None:
    slot = SHAPE[4] * item_bytes
    page = SHAPE[2] * SHAPE[3] * slot
    assert [layer.address for layer in geometry.layers] == [address, address + SHAPE[1] * page]
    assert {layer.block_stride for layer in geometry.layers} == {page}
    assert (geometry.num_blocks, geometry.heads, geometry.block_size) == SHAPE[1:4]
    assert (geometry.slot_bytes, geometry.heads_first, geometry.device) == (slot, True, device)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "int64", "V2"])
def test_numpy_arrays_of_any_dtype(dtype: str) -> None:
    array = np.zeros(SHAPE, dtype)
    check(KVGeometry.of_array(array), array.ctypes.data, array.itemsize)


@pytest.mark.parametrize(
    "dtype", ["uint8", "float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]
)
def test_torch_tensors_of_any_dtype(dtype: str) -> None:
    """bfloat16 and fp8 too, which numpy does not know: bytes are moved, not numbers."""
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(SHAPE, dtype=torch.uint8).to(getattr(torch, dtype))
    check(KVGeometry.of_array(tensor), tensor.data_ptr(), tensor.element_size())
    storage = torch.zeros((4, *SHAPE), dtype=torch.uint8)
    inside = storage[2]  # of a bigger allocation
    check(KVGeometry.of_array(inside), storage.data_ptr() + 2 * inside.numel(), 1)


class Exporting:
    """An array of some other library, which knows DLPack alone, of one version."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0), *, version: tuple[int, int] | None = None):
        self.array, self.device, self.version = array, device, version
        self.asked: dict[str, Any] = {}

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **how: Any) -> Any:
        if self.version is None and "max_version" in how:
            raise TypeError("unexpected keyword argument 'max_version'")
        self.asked = how
        managed = _Managed() if self.version is None else _Versioned()
        if isinstance(managed, _Versioned) and self.version is not None:
            managed.major, managed.minor = self.version
            managed.flags = 0 if self.array.flags.writeable else 1
        tensor = managed.tensor
        tensor.data, tensor.byte_offset = self.array.ctypes.data - 8, 8
        tensor.device_type, tensor.device_id = self.device
        tensor.ndim, tensor.type_code, tensor.bits, tensor.lanes = self.array.ndim, 4, 16, 1  # bfloat16
        tensor.shape = (ctypes.c_int64 * 5)(*self.array.shape)
        self.kept = managed
        name = b"dltensor" if self.version is None else b"dltensor_versioned"
        make = ctypes.pythonapi.PyCapsule_New
        make.argtypes, make.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object
        self.name = name  # a capsule does not copy it
        return make(ctypes.addressof(managed), name, None)


@pytest.mark.parametrize("version", [None, (1, 0), (1, 1), (1, 7)])
@pytest.mark.parametrize(("device", "number"), [((1, 0), -1), ((3, 0), -1), ((2, 0), 0), ((2, 5), 5)])
def test_anything_with_dlpack(device: tuple[int, int], number: int, version: tuple[int, int] | None) -> None:
    """Host memory, pinned or not, and any GPU's; of a GPU no stream is waited for, since no value is looked at."""
    other = Exporting(np.zeros(SHAPE, np.uint16), device, version=version)
    check(KVGeometry.of_array(other), other.array.ctypes.data, 2, number)
    assert other.asked.get("stream") == (-1 if device[0] == 2 else None)


class CudaArray:
    """An array that knows ``__cuda_array_interface__`` alone, as a namespace of cupy's or torch's names."""

    def __init__(self, device: Any, strides: tuple[int, ...] | None = None, read_only: bool = False) -> None:
        self.device = device
        self.__cuda_array_interface__ = {
            "shape": SHAPE, "typestr": "<f2", "data": (0x7F00_0000_0000, read_only), "strides": strides, "version": 3,
        }  # fmt: skip


def named(**names: Any) -> Any:
    return type("Device", (), names)()


@pytest.mark.parametrize("device", [named(id=3), named(index=3, type="cuda")])
@pytest.mark.parametrize("strides", [None, (1920, 640, 160, 32, 2)])
def test_cuda_array_interface(device: Any, strides: tuple[int, ...] | None) -> None:
    check(KVGeometry.of_array(CudaArray(device, strides)), 0x7F00_0000_0000, 2, 3)


def torch_of(make: Callable[[Any], Any]) -> Callable[[], Any]:
    return lambda: make(pytest.importorskip("torch"))


def frozen() -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array.flags.writeable = False
    return array


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (lambda: np.zeros(SHAPE[1:]), "expected an array of shape"),
    "torch rank": (torch_of(lambda torch: torch.zeros(4)), "expected an array of shape"),
    "view": (lambda: np.zeros(SHAPE)[:, :2], "C-contiguous"),
    "transposed": (torch_of(lambda torch: torch.zeros(SHAPE).transpose(2, 3)), "C-contiguous"),
    "reversed": (lambda: np.zeros(SHAPE)[::-1], "C-contiguous"),
    "gpu view": (lambda: CudaArray(named(id=0), (1920, 640, 32, 160, 2)), "C-contiguous"),
    "read-only": (frozen, "read-only"),
    "read-only gpu": (lambda: CudaArray(named(id=0), None, read_only=True), "read-only"),
    "read-only DLPack": (lambda: Exporting(frozen(), version=(1, 0)), "read-only"),
    "gradient": (torch_of(lambda torch: torch.zeros(SHAPE, requires_grad=True)), "require gradient"),
    "meta": (torch_of(lambda torch: torch.zeros(SHAPE, device="meta")), "meta"),
    "sparse": (torch_of(lambda torch: torch.zeros(SHAPE).to_sparse()), "strided"),
    "other device": (lambda: Exporting(np.zeros(SHAPE, np.uint16), (10, 0)), "DLPack type 10"),
    "newer DLPack": (lambda: Exporting(np.zeros(SHAPE, np.uint16), version=(2, 0)), r"DLPack 2\.0"),
    "odd slots": (lambda: np.zeros((1, 1, 1, 1, 9), np.uint8), "multiple of 8"),
    "empty": (lambda: np.zeros((0, 3, 4, 5, 16), np.uint8), "needs layers"),
    "list": (lambda: [[1.0]], "not list"),
    "nothing": (lambda: None, "not NoneType"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_cannot_be_handed_over_is_refused_in_one_line(what: str) -> None:
    make, says = REFUSED[what]
    with pytest.raises(InvalidCall, match=says) as caught:
        KVGeometry.of_array(make())
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, PDTransportError)
    assert isinstance(caught.value, ValueError)


def test_the_array_lives_as_long_as_its_geometry() -> None:
    """The geometry of a temporary array names memory that stays: without a reference a transfer of it ends the
    process."""
    array = np.full(SHAPE, 7, np.uint8)
    gone = weakref.ref(array)
    geometry = KVGeometry.of_array(array)
    del array
    gc.collect()
    assert gone() is not None
    assert all(region.owner is gone() for region in geometry.regions())
    del geometry
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("size", [1, 64])
def test_a_temporary_tensor_keeps_its_memory(size: int) -> None:
    """Also that of an export which the library takes back once nobody holds it."""
    torch = pytest.importorskip("torch")
    shape = (2, 3, 4, 5, 16 * size)
    geometry = KVGeometry.of_array(torch.full(shape, 7, dtype=torch.uint8))
    others = [torch.full(shape, 9, dtype=torch.uint8) for _ in range(50)]
    region = geometry.regions()[0]
    assert set(ctypes.string_at(region.address, region.nbytes)) == {7}
    del others
