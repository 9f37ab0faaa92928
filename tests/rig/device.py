"""Where the rig's vLLM servers run: on cores of this machine, or, with ``PDT_DEVICE=cuda``, side by side on one GPU.

Environment, all optional, read once:

PDT_DEVICE      cpu (default) or cuda
PDT_EAGER       1: no CUDA graphs on the GPU. The CPU platform never has them.
PDT_ASYNC       1 or 0: vLLM's asynchronous scheduling on or off. Default: vLLM's own choice (on the GPU: on).
PDT_START       together (default) or in-turn: how servers of one fleet start. vLLM refuses to start where less than its
                share of the card is free; the rig asks for a tiny share and names the KV cache's bytes instead.
PDT_INVARIANT   1: vLLM's batch-invariant kernels, with which equal prompts give equal bits in every batch (GPU only).
PDT_DTYPE       bfloat16 or float32. Default: bfloat16, but float32 on processors without AVX-512, where vLLM computes
                bfloat16 four times slower (20 s against 5 s for 32 prompts of 370 tokens and 16 answer tokens each).
PDT_CARDS       GPUs by number, such as 0,1: prefill runs on the first, decode on the second. Each server sees all of
                them, its own first. Default: all servers on the first GPU that is visible.
PDT_MARGIN      nats that a plain server must be sure by for a token to be compared; see ``tests.rig.cases``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Device = Literal["cpu", "cuda"]
GPU_SHARE = 0.04  # --gpu-memory-utilization: must be free at the start, and means nothing once the KV cache has a size
INVARIANT_MARGIN = 0.0
# Ranks sum through NCCL alone, without NVLink multicast, which is not to be used where others share the NVSwitch: a
# program that does can take their GPUs down.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
}
DTYPES = {"bfloat16": 2, "float32": 4}  # bytes an element


@dataclass(frozen=True)
class Place:
    """The environment's choice; see the module's docstring. ``asynchronous`` None leaves it to vLLM."""

    device: Device = "cpu"
    eager: bool = True
    asynchronous: bool | None = None
    together: bool = True
    invariant: bool = False
    dtype: str = "bfloat16"
    margin: float | None = None
    cards: tuple[int, ...] = ()

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Place:
        """Raises ValueError, naming the variable, for a value that means nothing."""
        device = _one_of(env, "PDT_DEVICE", "cpu", "cuda")
        flags = {name: _one_of(env, name, "", "0", "1") for name in ("PDT_EAGER", "PDT_ASYNC", "PDT_INVARIANT")}
        margin = env.get("PDT_MARGIN", "")
        return cls(
            device="cuda" if device == "cuda" else "cpu",
            eager=device == "cpu" or flags["PDT_EAGER"] == "1",
            asynchronous={"1": True, "0": False}.get(flags["PDT_ASYNC"]),
            together=_one_of(env, "PDT_START", "together", "in-turn") == "together",
            invariant=device == "cuda" and flags["PDT_INVARIANT"] == "1",
            dtype=_one_of(env, "PDT_DTYPE", "bfloat16" if device == "cuda" or wide_vectors() else "float32", *DTYPES),
            margin=float(margin) if margin else None,
            cards=numbers(env.get("PDT_CARDS", ""), "PDT_CARDS"),
        )

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def block_size(self) -> int:
        """Tokens a block: vLLM's default on GPUs, and the least that its CPU kernels take."""
        return 16 if self.gpu else 32

    @property
    def single(self) -> bool:
        """Single precision: what order sums are taken in hardly shows."""
        return self.dtype == "float32"

    def margin_or(self, measured: float) -> float:
        """Nats of certainty that make a token comparable: ``PDT_MARGIN``, none with batch-invariant kernels, else
        ``measured``."""
        if self.margin is not None:
            return self.margin
        return INVARIANT_MARGIN if self.invariant else measured


def numbers(text: str, what: str) -> tuple[int, ...]:
    """Different numbers of GPUs, separated by commas; none in an empty text.

    Raises:
        ValueError: something else; ``what`` names where it stands.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) != len(parts):
        raise ValueError(f"{what}={text}: different numbers of GPUs, separated by commas, are needed")
    return tuple(map(int, parts))


def seated(cards: Sequence[int], seat: int) -> tuple[int, ...]:
    """All of ``cards``, that of ``seat`` first (with fewer, seats share them): what a server there sees."""
    first = seat % len(cards) if cards else 0
    return (*cards[first:], *cards[:first])


def _one_of(env: Mapping[str, str], name: str, *values: str) -> str:
    value = env.get(name, "") or values[0]
    if value not in values:
        raise ValueError(f"{name}={value}: one of {', '.join(sorted({v for v in values if v}))} is needed")
    return value


@cache
def wide_vectors() -> bool:
    """The processor has AVX-512."""
    return "avx512f" in Path("/proc/cpuinfo").read_text()


PLACE = Place.of(os.environ)


@cache
def all_cards() -> tuple[str, ...]:
    """Names of all NVIDIA GPUs in the order of the bus, as their driver (or nvidia-smi) tells them."""
    found = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = file.read_text(errors="replace").splitlines()
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")][:1]
    if not found and (program := shutil.which("nvidia-smi")):
        asked = [program, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
        found = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return tuple(found)


def card() -> str:
    """Name of the first NVIDIA GPU; "" without one."""
    return next(iter(all_cards()), "")


def need_cards(count: int) -> None:
    """Skip the test that asks, with the reason, on machines with fewer NVIDIA GPUs."""
    import pytest

    if len(all_cards()) < count:
        pytest.skip(f"{len(all_cards())} NVIDIA GPUs on this machine, {count} are needed")


def environment(device: Device, cores: str, name: str, cards: Sequence[int] = (), tp: int = 1) -> dict[str, str]:
    """What a server called ``name`` on ``device`` needs in its environment; ``cores`` bind a CPU server's threads.

    Args:
        cards: GPUs that it sees, its own first; none leaves that to our own environment.
        tp: tensor-parallel ranks.
    """
    env = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        return {**env, "VLLM_CPU_OMP_THREADS_BIND": cores}
    env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # it compiles at first use, and changes no greedy token
    # Servers that start together compile the same graphs: each into a folder of its own, which its next start finds.
    env["VLLM_CACHE_ROOT"] = str(Path(tempfile.gettempdir(), "pdtransport-vllm-cache", name))
    if PLACE.invariant:
        env["VLLM_BATCH_INVARIANT"] = "1"
    if cards:
        env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, cards))}
    return env | NO_MULTICAST if tp > 1 else env


def flags(device: Device, eager: bool, asynchronous: bool | None, tp: int = 1) -> list[str]:
    """Command-line flags that only depend on where a server runs, and with how many ranks."""
    found: list[Any] = []
    if device == "cuda":
        found += ["--gpu-memory-utilization", str(GPU_SHARE)]
        if tp > 1:
            found += ["--disable-custom-all-reduce", "--compilation-config.pass_config.fuse_allreduce_rms=false"]
    if asynchronous is not None:
        found.append("--async-scheduling" if asynchronous else "--no-async-scheduling")
    if eager:
        found.append("--enforce-eager")
    return found
