"""What UCX says of lanes and memory domains, in words and in decisions."""

from __future__ import annotations

import pytest

from pdtransport.links.ucx import query
from pdtransport.links.ucx.gpu import DeviceBytes
from pdtransport.links.ucx.lanes import carrier, why_not_direct


@pytest.mark.parametrize(
    ("lanes", "host", "direct"),
    [
        (["posix", "cma"], "shared memory", "transport unknown"),
        (["tcp"], "tcp", "transport unknown"),
        (["posix", "cma", "cuda_copy", "cuda_ipc"], "shared memory", "cuda_ipc"),
        (["tcp", "cuda_copy"], "tcp", "transport unknown"),
        (["rc_mlx5", "tcp"], "rc_mlx5+tcp", "rc_mlx5"),
        ([], "transport unknown", "transport unknown"),
    ],
)
def test_a_carrier_is_named_for_the_memory_that_moves(lanes: list[str], host: str, direct: str) -> None:
    """A lane that carries only the other kind of memory is not what carries the bytes."""
    assert (carrier(lanes), carrier(lanes, direct=True)) == (host, direct)


@pytest.mark.parametrize(
    ("lanes", "domains", "why"),
    [
        (["posix", "cuda_ipc"], ["cuda_cpy", "cuda_ipc"], ""),
        (["rc_mlx5"], ["cuda_cpy", "cuda_ipc", "mlx5_0"], ""),
        (["posix", "cuda_ipc"], ["cuda_cpy"], "can't be shared by CUDA IPC"),
        (["rc_mlx5", "cuda_copy"], ["cuda_cpy", "cuda_ipc"], "nvidia_peermem or dmabuf"),
        (["tcp", "cuda_copy"], ["cuda_cpy", "cuda_ipc"], "by tcp alone"),
        (["posix", "cma", "cuda_copy"], ["cuda_cpy", "mlx5_0"], "by shared memory alone"),
        ([], [], "transport unknown"),
    ],
)
def test_gpu_memory_is_sent_directly_only_where_a_lane_takes_it(lanes: list[str], domains: list[str], why: str) -> None:
    """UCX itself would copy it through small host buffers over any lane, and call that CUDA support."""
    reason = why_not_direct(lanes, domains)
    assert (why in reason) if why else reason == ""


def test_a_remote_key_names_its_memory_domains() -> None:
    """By the numbers that UCX prints; a key that is too short to say names none."""
    info = "#     md 0  :  component 0  self\n#   md 5  :  component 3  cuda_ipc \n# resource 5 : md 5 dev 0"
    assert query._domains((0b100001).to_bytes(8, "little") + b"\x01\xff", info) == ["self", "cuda_ipc"]
    assert query._domains(b"\x01", info) == []


def test_ucx_takes_gpu_memory_by_its_address() -> None:
    """The binding reads address and length and touches nothing: there may be no GPU, nor CUDA."""
    array = pytest.importorskip("ucxx._lib.arr").Array(DeviceBytes(0x7000, 4096, None))
    assert (array.cuda, array.nbytes, array.contiguous) == (True, 4096, True)
