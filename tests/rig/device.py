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
PDT_MARGIN      nats that a plain server must be sure by for a token to be compared; see ``tests.rig.cases``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Device = Literal["cpu", "cuda"]
GPU_SHARE = 0.04  # --gpu-memory-utilization: must be free at the start, and means nothing once the KV cache has a size
INVARIANT_MARGIN = 0.0
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
def card() -> str:
    """Name of the first NVIDIA GPU as its driver tells it; "" without one."""
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return ""


def environment(device: Device, cores: str, name: str) -> dict[str, str]:
    """What a server called ``name`` on ``device`` needs in its environment; ``cores`` bind a CPU server's threads."""
    env = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        return {**env, "VLLM_CPU_OMP_THREADS_BIND": cores}
    env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # it compiles at first use, and changes no greedy token
    # Servers that start together compile the same graphs: each into a folder of its own, which its next start finds.
    env["VLLM_CACHE_ROOT"] = str(Path(tempfile.gettempdir(), "pdtransport-vllm-cache", name))
    if PLACE.invariant:
        env["VLLM_BATCH_INVARIANT"] = "1"
    return env


def flags(device: Device, eager: bool, asynchronous: bool | None) -> list[str]:
    """Command-line flags that only depend on where a server runs."""
    found: list[Any] = []
    if device == "cuda":
        found += ["--gpu-memory-utilization", str(GPU_SHARE)]
    if asynchronous is not None:
        found.append("--async-scheduling" if asynchronous else "--no-async-scheduling")
    if eager:
        found.append("--enforce-eager")
    return found
