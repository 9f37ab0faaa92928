"""Checksums over a worker's loaded weights: parameters, buffers, and tensors that kernels packed from them.

They show whether weights changed under a running engine, and whether two workers of the same shard hold the same bytes.
The page kernels compute the checksums in place: 15 GB/s per CPU core, memory bandwidth on a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pdtransport.kernels import pages
from pdtransport.kernels.runs import run

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MARK = "pdtransport_checksum"  # attribute on a handle of packed weights: checksum of the tensor it was made from


@dataclass(frozen=True)
class LoadedWeights:
    """Checksums of loaded weights.

    Attributes:
        sums: checksum of each tensor, by name.
        unseen: names of modules or tensors whose weights can't be read. If there are any, equal sums do not mean equal
            weights.
        nbytes: bytes of all tensors that were read.
    """

    sums: Mapping[str, str]
    unseen: Sequence[str] = ()
    nbytes: int = 0

    @property
    def checksum(self) -> str:
        """Checksum over all tensors, 32 hexadecimal digits."""
        text = json.dumps(sorted(self.sums.items()))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass
class _Found:
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)


def loaded_weights(models: Iterable[torch.nn.Module]) -> LoadedWeights:
    """Checksums of a model and, if there is one, its draft model."""
    found = _Found()
    for number, model in enumerate(models):
        prefix = f"{number}." if number else ""
        for name, module in model.named_modules():
            _look(f"{prefix}{name}", module, found)
    by_device: dict[Any, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, tensor in found.tensors:
        by_device[tensor.device].append((name, tensor))
    for device, tensors in by_device.items():
        memory = [_memory(tensor) for _, tensor in tensors]
        sum_them = _sums_on_cpu if device.type == "cpu" else _sums_on_gpu
        for (name, tensor), value in zip(tensors, sum_them(memory), strict=True):
            found.sums[name] = _described(tensor, value)
    return LoadedWeights(found.sums, found.unseen, sum(tensor.nbytes for _, tensor in found.tensors))


def tensor_sum(tensor: torch.Tensor) -> str:
    """Checksum of one tensor in host memory."""
    return _described(tensor, _sums_on_cpu([_memory(tensor.detach())])[0])


def _described(tensor: torch.Tensor, value: str) -> str:
    return json.dumps([str(tensor.dtype), list(tensor.shape), list(tensor.stride()), value])


def _look(name: str, module: torch.nn.Module, found: _Found) -> None:
    """Collect the weights that ``module`` itself holds, without its children."""
    own = [*module._parameters.items(), *module._buffers.items()]
    emptied = False
    for each, tensor in own:
        if tensor is not None:
            emptied |= _take(f"{name}.{each}", tensor, found) and each in module._parameters
    hidden = list(_hidden(module))
    for each, holder in hidden:
        mark = getattr(holder, MARK, None)
        if mark is not None:
            found.sums[f"{name}.{each}"] = str(mark)
        elif _is_tensor(holder):
            _take(f"{name}.{each}", holder, found)
        else:
            found.unseen.append(f"{name}.{each}")
    if emptied and not hidden:
        found.unseen.append(name)


def _take(name: str, tensor: Any, found: _Found) -> bool:
    """Collect one tensor; True if it is empty, in which case its content may have moved elsewhere."""
    partitions = getattr(tensor, "partitions", None)  # vLLM's SharedWeightParameter
    if isinstance(partitions, Mapping):
        for index, each in partitions.items():
            _take(f"{name}.{index}", each, found)
        return False
    flatten = getattr(tensor, "__tensor_flatten__", None)  # a wrapper subclass, such as TorchAO's or DTensor
    if flatten is not None:
        for each in flatten()[0]:
            _take(f"{name}.{each}", getattr(tensor, each), found)
        return False
    if tensor.device.type == "meta" or str(tensor.layout) != "torch.strided":
        found.unseen.append(name)
        return False
    found.tensors.append((name, tensor.detach()))
    return bool(tensor.numel() == 0)


def _hidden(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield packed weights that a module keeps in closures of its functions: tensors, or handles of native memory.

    vLLM does that for CPU kernels and leaves an empty parameter behind.
    """
    for name, value in vars(module).items():
        code, closure = getattr(value, "__code__", None), getattr(value, "__closure__", None)
        if code is None or not closure:
            continue
        for variable, cell in zip(code.co_freevars, closure, strict=True):
            try:
                content = cell.cell_contents
            except ValueError:
                continue
            if _is_tensor(content) or hasattr(content, MARK) or type(content).__name__.endswith("Handler"):
                yield f"{name}.{variable}", content


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of ``tensor`` in memory order; without a copy if it is dense."""
    import torch

    if not tensor.is_contiguous():
        order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
        tensor = tensor.permute(order)
    return tensor.contiguous().view(-1).view(torch.uint8)


def _sums_on_cpu(memory: Sequence[torch.Tensor]) -> list[str]:
    return [_sum_at(each.data_ptr(), each.numel()) for each in memory]


def _sum_at(address: int, nbytes: int) -> str:
    """For host memory: checksum of the whole 8-byte words, followed by the remaining bytes, as hex digits."""
    whole = nbytes // 8 * 8
    words = int(pages.checksum(run(address, whole), 1)[0]) if whole else 0
    return f"{words:016x}{ctypes.string_at(address + whole, nbytes - whole).hex()}"


def _sums_on_gpu(memory: Sequence[torch.Tensor]) -> list[str]:
    from pdtransport.kernels.gpu import GpuError, GpuPages

    try:
        own = GpuPages(int(memory[0].device.index or 0))
    except GpuError as error:  # without cupy
        logger.info("pdtransport: checksums of the weights are computed on the host: %s", error)
        return _sums_by_way_of_the_host(memory)
    try:
        return _sums_by_kernel(memory, lambda runs, blocks: own.checksum(runs, blocks, timed=False).wait())
    finally:
        own.close()


def _sums_by_kernel(memory: Sequence[torch.Tensor], checksum: Callable[[Any, int], Any]) -> list[str]:
    """Compute checksums on the GPU, with one kernel launch for all tensors of the same size."""
    import torch

    torch.cuda.synchronize(memory[0].device)
    sums = [""] * len(memory)
    by_size: dict[int, list[int]] = defaultdict(list)
    for number, each in enumerate(memory):
        whole = each.numel() // 8 * 8
        if each.data_ptr() % 8:
            (sums[number],) = _sums_by_way_of_the_host([each])
        elif whole:
            by_size[whole].append(number)
        else:
            sums[number] = f"{0:016x}{_tail(each)}"
    for whole, numbers in by_size.items():
        runs = np.array([[memory[number].data_ptr(), whole] for number in numbers], dtype=np.uint64)
        for number, value in zip(numbers, checksum(runs, len(numbers)), strict=True):
            sums[number] = f"{int(value):016x}{_tail(memory[number])}"
    return sums


def _tail(memory: torch.Tensor) -> str:
    rest = memory.numel() % 8
    return bytes(memory[-rest:].cpu().tolist()).hex() if rest else ""


def _sums_by_way_of_the_host(memory: Sequence[torch.Tensor]) -> list[str]:
    """The same checksums as the kernel's, but slower."""
    return [_sums_on_cpu([each.cpu()])[0] for each in memory]


def changed_names(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names of tensors whose checksums differ, or that only one side has."""
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
