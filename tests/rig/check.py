"""Does this machine have what the rig and the benchmarks lean on? ``python -m tests.rig.check`` tells within seconds.

One line a fact: ``ok`` or ``NO``, what was looked at, and what was found. Exit status 1 if something is missing that
the device of ``PDT_DEVICE`` needs; what only some runs need is marked ``--``.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from tests.rig.device import PLACE
from tests.rig.ports import HOST, listens
from tests.rig.prompts import Prompts
from tests.rig.servers import group_members

PACKAGES = (
    "numpy",
    "zmq",
    "pydantic",
    "msgpack",
    "aiohttp",
    "yaml",
    "uvloop",
    "setproctitle",
    "tokenizers",
    "pytest",
    "hypothesis",
)


def packages() -> str:
    """Import what pdtransport and its tests import."""
    for name in PACKAGES:
        importlib.import_module(name)
    return f"Python {platform.python_version()}, {len(PACKAGES)} packages"


def transport() -> str:
    """pdtransport itself, with the C kernels."""
    import pdtransport
    from pdtransport.kernels import pages

    importlib.import_module("pdtransport.launch")
    assert pages.BACKEND == "c", "the C kernels are not built: numpy does their work"
    return str(Path(pdtransport.__file__).parent)


def plugin() -> str:
    """The entry point by which vLLM finds the connector."""
    (found,) = {entry.value for entry in entry_points(group="vllm.general_plugins") if entry.name == "pdtransport"}
    return found


def vllm() -> str:
    import vllm as package

    return f"{package.__version__} in {Path(package.__file__).parent}"


def own_listeners() -> str:
    """The rig waits until a server's own process listens: that must be visible here."""
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()
        port = server.getsockname()[1]
        assert listens([os.getpid()], port), "/proc/net/tcp or /proc/PID/fd do not show who listens on a port"
    assert os.getpid() in group_members(os.getpgid(0)), "/proc does not show this process' group"
    return "visible in /proc"


def prompts() -> str:
    """The standard library's sources, of which prompts are made."""
    return f"{len(Prompts(1).one(8000))} tokens of source text"


def shared_memory() -> str:
    room = shutil.disk_usage("/dev/shm")
    return f"{room.free >> 20} of {room.total >> 20} MiB free in /dev/shm"


def cores() -> str:
    return f"{os.cpu_count()} cores, {len(os.sched_getaffinity(0))} of them ours, kernel {platform.release()}"


def peer_memory() -> str:
    """The cma link reads another process' memory."""
    ours = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(ours[0], 1)
        os._exit(0)
    try:
        import ctypes

        class Run(ctypes.Structure):
            _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

        text = ctypes.create_string_buffer(b"peer")  # at the same address in the child
        room = ctypes.create_string_buffer(4)
        libc = ctypes.CDLL(None, use_errno=True)
        here, there = Run(ctypes.addressof(room), 4), Run(ctypes.addressof(text), 4)
        done = libc.process_vm_readv(child, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        assert done == 4, os.strerror(ctypes.get_errno())
    finally:
        os.write(ours[1], b"x")
        os.waitpid(child, 0)
    return "process_vm_readv works"


def card() -> str:
    names = ["name", "memory.total", "memory.used", "driver_version", "compute_mode", "mig.mode.current"]
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr.strip()
    return "; ".join(done.stdout.strip().splitlines())


def torch() -> str:
    import torch as package

    assert package.cuda.is_available(), "torch sees no GPU"
    free, total = package.cuda.mem_get_info()
    sms = package.cuda.get_device_properties(0).multi_processor_count
    return f"{package.__version__}, {free >> 20} of {total >> 20} MiB free, {sms} SMs"


def cupy() -> str:
    """Compiles a kernel, as ours are."""
    import cupy as package

    kernel = package.RawKernel('extern "C" __global__ void one(int* x) { *x = 1; }', "one")
    x = package.zeros(1, dtype="int32")
    kernel((1,), (1,), (x,))
    assert int(x[0]) == 1
    return f"{package.__version__}, CUDA {package.cuda.runtime.runtimeGetVersion()}"


def neighbours() -> str:
    """GPUs use each other's memory, as the cuda_ipc link between two of them needs."""
    import cupy as package

    from pdtransport.kernels.gpu import can_access

    count = package.cuda.runtime.getDeviceCount()
    apart = [f"{a} not {b}'s" for a in range(count) for b in range(count) if not can_access(a, b)]
    assert not apart, f"no peer access: GPU {', '.join(apart)}"
    return f"{count} GPUs, each reaches all"


def ucx() -> str:
    importlib.import_module("ucxx")
    return version_of("ucxx-cu13", "ucxx-cu12")


def nixl() -> str:
    importlib.import_module("nixl")
    return version_of("nixl-cu13", "nixl")


def sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or next(
        (str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), ""
    )
    assert found, "not installed"
    return found


def version_of(*names: str) -> str:
    for name in names:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "version unknown"


NEEDED: tuple[Callable[[], str], ...] = (
    packages,
    transport,
    plugin,
    vllm,
    own_listeners,
    prompts,
    shared_memory,
    cores,
)
NEEDED_ON_GPU: tuple[Callable[[], str], ...] = (card, torch, cupy)
NICE: tuple[Callable[[], str], ...] = (peer_memory, ucx, nixl)
NICE_ON_GPU: tuple[Callable[[], str], ...] = (neighbours, sanitizer)


def main() -> int:
    missing = 0
    needed = (*NEEDED, *(NEEDED_ON_GPU if PLACE.gpu else ()))
    for look in (*needed, *NICE, *(NICE_ON_GPU if PLACE.gpu else ())):
        try:
            mark, text = "ok", look()
        except Exception as error:  # noqa: BLE001  # whatever is wrong with the machine is the answer
            missing += look in needed
            mark, text = "NO" if look in needed else "--", f"{type(error).__name__}: {error}"
        print(f"{mark}  {look.__name__:<14}{text.splitlines()[0] if text else ''}", flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
