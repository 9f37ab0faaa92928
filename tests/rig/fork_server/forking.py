"""vLLM's own server, whose engine and workers are forked from it: what the rig runs in place of vLLM's module.

On the CPU vLLM starts each of a server's three processes anew, and each imports all of vLLM, one after the other: most
of what a start costs. Here the first one imports it, without garbage collection, and the others are forked, as vLLM
does on a GPU. It prescribes another way on the CPU only because OpenMP reads a worker's cores when it is loaded; here
the worker takes them itself. From then on it is vLLM as installed.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PRELOAD = "LD_PRELOAD"
OPENMP = "libgomp"


def preload_openmp() -> None:
    """Start this process again with the OpenMP that vLLM gives to its workers: torch's own."""
    torch = find_spec("torch")
    assert torch is not None
    assert torch.submodule_search_locations is not None
    root = Path(torch.submodule_search_locations[0])
    (library, *_) = [*root.parent.glob(f"torch.libs/{OPENMP}*.so*"), *root.glob(f"lib/{OPENMP}*.so*")]
    os.environ[PRELOAD] = ":".join(filter(None, [os.environ.get(PRELOAD), str(library)]))
    os.execv(sys.executable, [sys.executable, *sys.argv])


if OPENMP not in os.environ.get(PRELOAD, ""):
    preload_openmp()

gc.disable()

import torch  # noqa: E402
import vllm.model_executor.models.llama  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401
from vllm.entrypoints.launchers.api_server.entry import main  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.v1.engine import utils  # noqa: E402
from vllm.v1.executor import multiproc_executor  # noqa: E402
from vllm.v1.executor.multiproc_executor import WorkerProc  # noqa: E402

gc.freeze()
gc.enable()

assert utils.get_mp_context is multiproc_executor.get_mp_context, "vLLM starts its processes in another way"
assert callable(registry._run_in_subprocess)
utils.get_mp_context = multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
# What a model's class can do is seen in another process, lest CUDA begin here, and kept for later starts.
registry._run_in_subprocess = lambda look: look()

work = WorkerProc.worker_main


def on_its_cores(*args: Any, **kwargs: Any) -> None:
    """What OpenMP does with these variables while it is loaded."""
    os.sched_setaffinity(0, set(map(int, os.environ["GOMP_CPU_AFFINITY"].split())))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work(*args, **kwargs)


WorkerProc.worker_main = staticmethod(on_its_cores)

if __name__ == "__main__":
    main()
