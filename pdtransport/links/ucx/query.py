"""Queries to UCX and ucxx that the Python bindings don't wrap.

An endpoint's transports, support for GPU memory, requests left on a closed endpoint. Each query has an "unknown" result
for libraries that can't answer it.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

LIBRARY = "libucp.so.0"
UCXX_LIBRARY = "libucxx.so"  # already loaded by the binding
CANCELING_SIZE = "_ZNK4ucxx8Endpoint16getCancelingSizeEv"  # size_t ucxx::Endpoint::getCancelingSize() const
OK = 0

TRANSPORTS_FIELD = 1 << 3  # UCP_EP_ATTR_FIELD_TRANSPORTS
MAX_LANES = 16
MEMORY_TYPES_FIELD = 1 << 2  # UCP_ATTR_FIELD_MEMORY_TYPES
CUDA_MEMORY = 1 << 1  # bit of UCS_MEMORY_TYPE_CUDA
ADDRESS_AND_LENGTH = 0b11  # UCP_MEM_MAP_PARAM_FIELD_ADDRESS, _LENGTH

# A packed remote key begins with a little-endian bitmap of the memory domains that it is valid for.
KEY_MAP_BYTES = 8
DOMAIN_LINE = re.compile(r"\bmd\s+(\d+)\s*:\s*component\s+\d+\s+(\S+)")


class _TransportEntry(ctypes.Structure):
    _fields_ = (("transport", ctypes.c_char_p), ("device", ctypes.c_char_p))


class _EndpointAttributes(ctypes.Structure):
    """``ucp_ep_attr_t`` of UCX 1.13 and later."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local", ctypes.c_char * 128),
        ("remote", ctypes.c_char * 128),
        ("entries", ctypes.POINTER(_TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    )


class _ContextAttributes(ctypes.Structure):
    """``ucp_context_attr_t`` of UCX 1.10 and later."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("request_size", ctypes.c_size_t),
        ("thread_mode", ctypes.c_int),
        ("memory_types", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("device_counter_size", ctypes.c_size_t),
    )


class _MapParameters(ctypes.Structure):
    """``ucp_mem_map_params_t`` of UCX 1.13 and later."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("flags", ctypes.c_uint),
        ("prot", ctypes.c_uint),
        ("memory_type", ctypes.c_int),
        ("exported", ctypes.c_void_p),
    )


def _library() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


def still_canceling(endpoint: int) -> int:
    """Number of requests of a closed ``ucxx::Endpoint`` that have not ended yet.

    The query also releases those that have ended. Without it, ucxx keeps every request that was in flight when its
    endpoint was closed, and each such request keeps the endpoint and the whole worker.
    """
    try:
        ask = getattr(ctypes.CDLL(UCXX_LIBRARY), CANCELING_SIZE)
    except (OSError, AttributeError):
        return 0
    ask.restype, ask.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
    return int(ask(endpoint))


def lanes(endpoint: int) -> list[str]:
    """Transports of an endpoint, e.g. ``["posix", "cma"]``, in the order of its lanes."""
    entries = (_TransportEntry * MAX_LANES)()
    attributes = _EndpointAttributes(
        field_mask=TRANSPORTS_FIELD,
        entries=ctypes.cast(entries, ctypes.POINTER(_TransportEntry)),
        num_entries=MAX_LANES,
        entry_size=ctypes.sizeof(_TransportEntry),
    )
    query = getattr(_library(), "ucp_ep_query", None)
    if query is None or query(ctypes.c_void_p(endpoint), ctypes.byref(attributes)) != OK:
        return []
    names = [entries[i].transport for i in range(min(attributes.num_entries, MAX_LANES))]
    return list(dict.fromkeys(name.decode("ascii", "replace") for name in names if name))


def takes_cuda_memory(context: int) -> bool:
    """True if a memory domain of the context supports CUDA memory."""
    attributes = _ContextAttributes(field_mask=MEMORY_TYPES_FIELD)
    query = getattr(_library(), "ucp_context_query", None)
    if query is None or query(ctypes.c_void_p(context), ctypes.byref(attributes)) != OK:
        return False
    return bool(attributes.memory_types & CUDA_MEMORY)


def domains_of(context: int, info: str, address: int, nbytes: int) -> list[str]:
    """Memory domains for which a remote key of this memory is valid.

    ``info`` is UCX's printed description of the context, which maps domain numbers to names.
    """
    ucp = _library()
    if ucp is None:
        return []
    handle, memory, key, length = ctypes.c_void_p(context), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
    parameters = _MapParameters(field_mask=ADDRESS_AND_LENGTH, address=address, length=nbytes)
    if ucp.ucp_mem_map(handle, ctypes.byref(parameters), ctypes.byref(memory)) != OK:
        return []
    try:
        if ucp.ucp_rkey_pack(handle, memory, ctypes.byref(key), ctypes.byref(length)) != OK:
            return []
        try:
            return _domains(ctypes.string_at(key, length.value), info)
        finally:
            ucp.ucp_rkey_buffer_release(key)
    finally:
        ucp.ucp_mem_unmap(handle, memory)


def _domains(key: bytes, info: str) -> list[str]:
    if len(key) <= KEY_MAP_BYTES:
        return []
    good = int.from_bytes(key[:KEY_MAP_BYTES], "little")
    return [name for number, name in DOMAIN_LINE.findall(info) if good >> int(number) & 1]
