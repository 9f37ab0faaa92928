"""Interprets UCX' lanes to a peer: their description, and whether they can carry GPU memory directly."""

from __future__ import annotations

from collections.abc import Collection, Sequence

SHARED_MEMORY = {"posix", "sysv", "xpmem", "cma", "knem"}
COPIES = {"cuda_copy", "gdr_copy"}  # copies within one process (UCX' own staging), not a way to a peer
HOST_ONLY = SHARED_MEMORY | COPIES | {"tcp", "self"}
CUDA_DOMAINS = {"cuda_ipc", "cuda_cpy", "gdr_copy"}
SELF_DOMAINS = SHARED_MEMORY | {"tcp", "self"}


def carrier(lanes: Sequence[str], direct: bool = False) -> str:
    """The transport that carries the bytes: ``shared memory``, ``tcp``, ``rc_mlx5``, ...

    ``direct``: the bytes are in GPU memory.
    """
    fast = [lane for lane in lanes if lane not in (HOST_ONLY if direct else SHARED_MEMORY | COPIES | {"cuda_ipc"})]
    if any(lane in SHARED_MEMORY for lane in lanes) and not direct:
        return "shared memory"
    return "+".join(fast) or "transport unknown"


def why_not_direct(lanes: Sequence[str], domains: Collection[str]) -> str:
    """Why GPU memory registered with memory ``domains`` can't be sent directly over ``lanes``; "" if it can.

    UCX can send it over any lane, but over most by copying through small host buffers of its own.
    """
    if "cuda_ipc" in lanes and "cuda_ipc" in domains:
        return ""
    adapters = [lane for lane in lanes if lane not in HOST_ONLY and lane != "cuda_ipc"]
    if adapters and set(domains) - CUDA_DOMAINS - SELF_DOMAINS:
        return ""
    if adapters:
        return f"no network adapter behind {'+'.join(adapters)} takes GPU memory (nvidia_peermem or dmabuf is missing)"
    if "cuda_ipc" in lanes:
        return "this GPU memory can't be shared by CUDA IPC"
    return f"UCX reaches the peer by {carrier(lanes)} alone, which takes no GPU memory"
