"""A worker's weights as loaded: whatever changes them is seen, wherever kernels keep them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from pdtransport.engine import weight_sums  # noqa: E402
from pdtransport.engine.weight_sums import MARK, changed_names, loaded_weights, tensor_sum  # noqa: E402
from pdtransport.kernels import reference  # noqa: E402


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.qkv = torch.nn.Parameter(torch.rand(33, 17, generator=generator), requires_grad=False)
        self.norm = torch.nn.Parameter(torch.rand(5, generator=generator).to(torch.bfloat16), requires_grad=False)
        self.turned = torch.nn.Parameter(torch.rand(8, 6, generator=generator).t(), requires_grad=False)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.register_buffer("odd", torch.arange(11, dtype=torch.uint8))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])


def test_equal_weights_have_equal_sums() -> None:
    """Two workers that hold the same bytes agree, and so does one with itself."""
    one, other = loaded_weights([Model()]), loaded_weights([Model()])
    assert one.checksum == other.checksum
    assert len(one.checksum) == 32
    assert not one.unseen
    assert one.nbytes == 2 * (33 * 17 * 4 + 5 * 2 + 48 * 4 + 4 + 11)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "one bit of a parameter": lambda layer: layer.qkv.data.view(torch.int32)[7, 3].bitwise_xor_(1),
    "the end of an odd one": lambda layer: layer.odd[10].add_(1),
    "a small parameter": lambda layer: layer.norm.data[4].add_(1),
    "a strided parameter": lambda layer: layer.turned.data[5, 7].add_(1),
    "a buffer": lambda layer: layer.scale.fill_(3.0),
    "a whole parameter": lambda layer: setattr(
        layer, "qkv", torch.nn.Parameter(torch.zeros(33, 17), requires_grad=False)
    ),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_whatever_changes_is_seen(what: str) -> None:
    """Also behind torch's version counters (``.data``), and it is named."""
    model = Model()
    before = loaded_weights([model])
    CHANGES[what](model.layers[1])
    after = loaded_weights([model])
    assert after.checksum != before.checksum
    (name,) = changed_names(before.sums, after.sums)
    assert name.startswith("layers.1.")


def test_the_sums_are_the_kernels_of_the_pages() -> None:
    """The reference in numpy says the same of the same bytes."""
    tensor = torch.arange(100, dtype=torch.int16)[:99]
    raw = tensor.numpy().tobytes()
    value = reference.block_checksum(np.frombuffer(raw[:192], dtype=np.uint8))
    assert f'"{int(value):016x}{raw[192:].hex()}"' in tensor_sum(tensor)


def test_sums_by_a_kernel_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is summed on a GPU, tensors of a size at once, is what the host sums; odd places take the host's way."""
    from pdtransport.kernels import pages

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    whole = torch.arange(4096, dtype=torch.uint8)
    memory = [whole[:800], whole[800:1600], whole[3:1003], whole[1600:1605], whole[1600:2413]]
    launches: list[int] = []

    def checksum(runs: Any, blocks: int) -> Any:
        launches.append(blocks)
        return pages.checksum(runs, blocks)

    assert weight_sums._sums_by_kernel(memory, checksum) == weight_sums._sums_on_cpu(memory)
    assert sorted(launches) == [1, 2]


class Packed(torch.nn.Module):
    """As vLLM leaves a linear layer on a CPU: an empty parameter, and what its kernel made of the weight."""

    def __init__(self, holder: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        self.cpu_linear = lambda x: (holder, x)


class MatmulHandler:
    pass


def test_what_a_kernel_packed_is_seen() -> None:
    """A packed tensor is summed; of a handle, what was noted when it was made."""
    assert loaded_weights([Packed(torch.ones(64))]).checksum != loaded_weights([Packed(torch.zeros(64))]).checksum
    noted = []
    for value in ("a", "a", "b"):
        handler = MatmulHandler()
        setattr(handler, MARK, value)
        noted.append(loaded_weights([Packed(handler)]))
    assert not any(each.unseen for each in noted)
    assert noted[0].checksum == noted[1].checksum != noted[2].checksum


@pytest.mark.parametrize(
    "model",
    [
        lambda: Packed(MatmulHandler()),
        lambda: Packed("no weights"),
        lambda: torch.nn.Linear(4, 4, device="meta"),
    ],
)
def test_what_nobody_sees_is_told(model: Callable[[], torch.nn.Module]) -> None:
    """Weights whose bytes can't be read are named: equal sums then say nothing."""
    assert loaded_weights([model()]).unseen


def test_the_draft_model_counts() -> None:
    """Its layers have KV too."""
    assert loaded_weights([Model(), Layer()]).checksum != loaded_weights([Model()]).checksum


def test_the_kernel_of_vllm_on_cpus_is_noted() -> None:
    """vLLM's own layer on a CPU, whose weight is gone into oneDNN: a reload with other bytes is seen."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    from pdtransport.settings import Settings
    from pdtransport.vllm.patches.packed_weights import see_packed_weights

    if not getattr(ops, "_supports_onednn", False):
        pytest.skip("this build of vLLM has no oneDNN")
    see_packed_weights(Settings())
    seen = []
    for value in (1.0, 1.0, 1.5):
        layer = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        layer.weight.data.fill_(1.0)
        layer.weight.data[5, 5] = value
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        seen.append(loaded_weights([layer]))
    assert not any(each.unseen for each in seen), seen[0].unseen
    assert seen[0].checksum == seen[1].checksum != seen[2].checksum


@pytest.mark.gpu
def test_a_gpu_sums_as_the_host_does(cupy: Any) -> None:
    """Parameters in GPU memory: the kernel's sums are the host's, for all sizes, dtypes and strides."""
    model = Model()
    here = loaded_weights([model])
    there = loaded_weights([model.cuda()])
    assert there.sums == here.sums
    model.layers[1].qkv.data[7, 3].add_(1)
    assert len(changed_names(here.sums, loaded_weights([model]).sums)) == 1
