"""Turns a topology into a plan of what will run: ports, command lines, environment. Starts nothing."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdtransport.errors import PDTransportError
from pdtransport.launch.cores import format_cores, share_out
from pdtransport.launch.rundir import POOL_KEY, default_folder
from pdtransport.launch.topology import Role, Topology
from pdtransport.pool.cli import options
from pdtransport.pool.settings import HttpSettings, PoolSettings
from pdtransport.pool.tiers.keyed_digest import wants_key
from pdtransport.settings import PoolUse
from pdtransport.system.hosts import is_loopback

CURVE_KEYS = ("curve_public_key_file", "curve_secret_key_file", "curve_server_key")
DIGEST_KEY = "pool.digest"  # in the topology's default folder: chunks signed with it outlive a run
HOST = "127.0.0.1"  # servers and control channels listen here; only the router may face outwards
# Ports are picked below Linux's default range for outgoing connections, which could otherwise take a port before a
# server binds it.
PICK_PORTS = (20000, 32000)
KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|_KEY$|APIKEY", re.IGNORECASE)


class PlanError(PDTransportError):
    """The topology is valid but does not fit this machine."""


@dataclass(frozen=True)
class Instance:
    """One vLLM server."""

    name: str
    role: str
    tp: int
    port: int
    control_host: str
    control_port: int  # of rank 0; rank r listens on control_port + r
    engine_id: str
    cores: tuple[tuple[int, ...], ...]  # one entry per worker; empty: a GPU instance
    gpus: tuple[int, ...]
    argv: tuple[str, ...]
    env: Mapping[str, str]  # in addition to pdlaunch's own environment

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def place(self) -> str:
        """Where it runs: ``CPU 0-3|4-7`` (one part per worker) or ``GPU 0,1``."""
        if self.gpus:
            return "GPU " + ",".join(map(str, self.gpus))
        return "CPU " + "|".join(map(format_cores, self.cores))

    @property
    def control_ports(self) -> range:
        return range(self.control_port, self.control_port + self.tp)


@dataclass(frozen=True)
class RouterPlan:
    host: str
    port: int
    admin_host: str
    admin_port: int | None  # None: /pd/* is served on the main port
    argv: tuple[str, ...]

    @property
    def url(self) -> str:
        """The router's URL from this machine."""
        return _url(self.host, self.port)

    @property
    def admin_url(self) -> str:
        return self.url if self.admin_port is None else _url(self.admin_host, self.admin_port)


@dataclass(frozen=True)
class PoolPlan:
    name: str
    dir: Path
    memory_dir: Path
    url: str  # URL of the HTTP API; empty: there is none
    argv: tuple[str, ...]
    new_key: Path | None = None  # key file of the HTTP API for the router, made at start
    digest_key: Path | None = None  # key file of the chunks' digests, made at start if missing
    # The router's pool_hint; empty: as in the topology.
    hint: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    name: str
    model: str
    served_names: tuple[str, ...]  # answers contain the first one
    instances: tuple[Instance, ...]
    router: RouterPlan
    pool: PoolPlan | None = None

    @property
    def served_name(self) -> str:
        return self.served_names[0]

    def of(self, role: str) -> list[Instance]:
        return [instance for instance in self.instances if instance.role == role]

    def public(self) -> dict[str, Any]:
        """Plain data for people and for ``--json``; secrets are masked."""
        return {
            "name": self.name,
            "model": self.model,
            "served_name": self.served_name,
            "served_names": list(self.served_names),
            "router": {
                "url": self.router.url,
                "admin_url": self.router.admin_url,
                "command": list(self.router.argv),
            },
            "pool": None
            if self.pool is None
            else {
                "name": self.pool.name,
                "dir": str(self.pool.dir),
                "url": self.pool.url,
                "command": list(self.pool.argv),
            },
            "instances": [
                {
                    "name": instance.name,
                    "role": instance.role,
                    "url": instance.url,
                    "control": [f"{instance.control_host}:{port}" for port in instance.control_ports],
                    "engine_id": instance.engine_id,
                    "cpu": [format_cores(cores) for cores in instance.cores],
                    "gpus": list(instance.gpus),
                    "command": list(instance.argv),
                    "environment": {key: masked(key, value) for key, value in sorted(instance.env.items())},
                }
                for instance in self.instances
            ],
        }


def masked(key: str, value: str) -> str:
    return "********" if _SECRET.search(key) else value


class Ports:
    """Free TCP ports of this machine. Each port is given out once; fixed ports are reserved first."""

    def __init__(self, low: int = PICK_PORTS[0], high: int = PICK_PORTS[1]) -> None:
        self._low, self._high = low, high
        self._taken: set[int] = set()

    def reserve(self, ports: Sequence[int]) -> None:
        self._taken.update(ports)

    def pick(self, count: int = 1, host: str = HOST) -> int:
        """The first of ``count`` consecutive free ports on ``host``.

        Raises:
            PlanError: there are none.
        """
        span = self._high - self._low - count + 1
        offset = random.randrange(max(span, 1))
        for step in range(max(span, 0)):
            first = self._low + (offset + step) % span
            wanted = range(first, first + count)
            if self._taken.isdisjoint(wanted) and first_busy(host, wanted) is None:
                self.reserve(wanted)
                return first
        raise PlanError(
            f"no {count} consecutive free ports between {self._low} and {self._high}: set the ports in the topology"
        )


def first_busy(host: str, ports: Sequence[int]) -> int | None:
    """The first of ``ports`` that can't be listened on now; None if all are free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        for port in ports:
            probe = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except OSError:
                return port
    return None


Command = Callable[[Topology, Instance, str], Sequence[str]]


def vllm_command(topology: Topology, instance: Instance, weights: str) -> list[str]:
    """The server's command line.

    It runs vLLM as a module: the `vllm` script needs a distribution named vllm, and the CPU build has another name.
    """
    model, role = topology.model, topology.by_role()[instance.role]
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    argv += ["--model", weights, "--served-model-name", *topology.served_names]
    argv += ["--host", HOST, "--port", str(instance.port)]
    named = {
        "revision": model.revision,
        "dtype": model.dtype,
        "block-size": model.block_size,
        "max-model-len": model.max_model_len,
        "tensor-parallel-size": instance.tp if instance.tp > 1 else None,
    }
    for name, value in {**named, **topology.flags(role)}.items():
        argv += _flag(name, value)
    return [*argv, "--kv-transfer-config", json.dumps(kv_transfer_config(topology, instance))]


def kv_transfer_config(topology: Topology, instance: Instance) -> dict[str, Any]:
    extra = topology.transport.model_dump(mode="json", exclude_unset=True)
    here = {"host": instance.control_host, "port": instance.control_port}
    # All instances listen on the host in the topology, so pages may be fetched from that host only.
    extra["control"] = {"peers": [instance.control_host], **extra.get("control", {}), **here}
    return {
        "kv_connector": "PDTransportConnector",
        "kv_role": KV_ROLES[instance.role],
        "engine_id": instance.engine_id,
        "kv_load_failure_policy": topology.kv_load_failure_policy,
        "kv_connector_extra_config": extra,
    }


def _flag(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if value is True:
        return [f"--{name}"]
    if value is False:
        return [f"--no-{name}"]
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, (list, dict)) else str(value)]


def make_plan(
    topology: Topology,
    base: Path,
    *,
    run_folder: Path | None = None,
    ports: Ports | None = None,
    command: Command = vllm_command,
) -> Plan:
    """Lay ``topology`` out on this machine.

    Args:
        base: folder to which the topology's paths are relative.
        run_folder: folder for the run's logs.
        ports: source of free ports.
        command: makes a server's command line.

    Raises:
        PlanError: not enough free ports.
    """
    topology = resolved(topology, base)
    ports = ports or Ports()
    ports.reserve([port for role in topology.by_role().values() for port in _fixed(role)])
    ports.reserve([port for port in (topology.router.port, topology.router.admin_port) if port])
    if topology.pool is not None and topology.pool.http is not None:
        ports.reserve([topology.pool.http.address[1]])
    pool = _pool(topology, ports, run_folder or default_folder(topology.name))
    folder = topology.model_folder(base)
    model = str(folder) if folder else topology.model.id
    cores = _cores(topology)
    instances = []
    for name, role in topology.by_role().items():
        for index in range(role.count):
            bare = _bare(topology, name, role, index, cores, ports)
            argv = tuple(command(topology, bare, model))
            env = _environment(topology, role, bare, local=folder is not None)
            instances.append(Instance(**{**bare.__dict__, "argv": argv, "env": env}))
    router = _router(topology, instances, ports, pool.hint if pool else {})
    return Plan(topology.name, model, topology.served_names, tuple(instances), router, pool)


def _bare(
    topology: Topology, name: str, role: Role, index: int, cores: dict[tuple[str, int], list[int]], ports: Ports
) -> Instance:
    host = topology.transport.control.host
    return Instance(
        name=f"{name}-{index}",
        role=name,
        tp=role.tp,
        port=role.port + index if role.port else ports.pick(),
        control_host=host,
        control_port=role.control_port + index * role.tp if role.control_port else ports.pick(role.tp, host),
        engine_id=f"{topology.name}-{name}-{index}",
        cores=tuple(tuple(cores[name, index * role.tp + rank]) for rank in range(role.tp)) if not role.gpus else (),
        gpus=role.gpus[index * role.tp : (index + 1) * role.tp] if role.gpus else (),
        argv=(),
        env={},
    )


def _fixed(role: Role) -> list[int]:
    fixed = list(range(role.port, role.port + role.count)) if role.port else []
    return fixed + (
        list(range(role.control_port, role.control_port + role.count * role.tp)) if role.control_port else []
    )


def _cores(topology: Topology) -> dict[tuple[str, int], list[int]]:
    """Cores of each worker of each CPU role. Roles without cores of their own share the remaining cores evenly."""
    shares: dict[tuple[str, int], list[int]] = {}
    loose: list[tuple[str, int]] = []
    free = sorted(os.sched_getaffinity(0))
    for name, role in topology.by_role().items():
        if role.gpus:
            continue
        workers = [(name, worker) for worker in range(role.count * role.tp)]
        if role.cpu is None:
            loose += workers
            continue
        shares.update(zip(workers, share_out(role.cpu, len(workers)), strict=True))
        free = [core for core in free if core not in role.cpu]
    if loose:
        shares.update(zip(loose, share_out(free or sorted(os.sched_getaffinity(0)), len(loose)), strict=True))
    return shares


def _environment(topology: Topology, role: Role, instance: Instance, *, local: bool) -> dict[str, str]:
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        # Prefix hashes must not depend on the process. And clients' idle connections should live longer than vLLM's
        # default of 5 seconds.
        "PYTHONHASHSEED": "0",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
        "PYTHONUNBUFFERED": "1",
    }
    if local:
        env["HF_HUB_OFFLINE"] = "1"
    if instance.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, instance.gpus))
    else:
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(format_cores(cores) for cores in instance.cores)
    return {**env, **topology.environment(role)}


def _router(
    topology: Topology, instances: Sequence[Instance], ports: Ports, pool_hint: Mapping[str, Any]
) -> RouterPlan:
    chosen = topology.router
    port = chosen.port or ports.pick(host=chosen.host)
    admin_port = ports.pick(host=chosen.admin_host) if chosen.admin_port == 0 else chosen.admin_port
    if admin_port is None and not _serves_loopback(chosen.host):
        # /pd/* on the main port answers only loopback clients, and pdlaunch could not reach this host over loopback.
        admin_port = ports.pick(host=chosen.admin_host)
    # The router asks workers for their part of a trace, with the workers' own keys.
    control = topology.transport.control.model_dump(mode="json", exclude_none=True)
    options = {key: control[key] for key in CURVE_KEYS if key in control}
    if control["allow_plaintext"]:
        options["allow_plaintext"] = True
    options |= chosen.model_dump(mode="json", exclude_unset=True, exclude=set(KV_ROLES))
    options |= {"host": chosen.host, "port": port} | ({"pool_hint": pool_hint} if pool_hint else {})
    if admin_port is not None:
        options |= {"admin_port": admin_port}
    argv = [sys.executable, "-m", "pdtransport.router.cli", *_options(options)]
    for role in KV_ROLES:
        servers = [instance for instance in instances if instance.role == role]
        argv += [f"--{role}", *(f"{one.url}@{one.control_host}:{one.control_port}/{one.tp}" for one in servers)]
    return RouterPlan(chosen.host, port, chosen.admin_host, admin_port, tuple(argv))


def _pool(topology: Topology, ports: Ports, run_folder: Path) -> PoolPlan | None:
    settings, new_key, digest_key = topology.pool, None, None
    if settings is None:
        return None
    if settings.digest_key_file is None and wants_key(settings):
        digest_key = default_folder(topology.name) / DIGEST_KEY
        settings = settings.model_copy(update={"digest_key_file": digest_key})
    hints = _wants_hints(topology, settings)
    if hints and settings.http is None:  # the router sends its hints to the pool over HTTP
        new_key = run_folder / POOL_KEY
        settings = settings.model_copy(update={"http": HttpSettings(listen=f"{HOST}:0", key_file=new_key)})
    url, hint = "", {}
    if settings.http is not None:
        host, port = settings.http.address
        port = port or ports.pick(host=host)
        http = settings.http.model_copy(update={"listen": f"{f'[{host}]' if ':' in host else host}:{port}"})
        settings, url = settings.model_copy(update={"http": http}), _url(host, port)
        hint = {"url": url, "key_file": http.key_file, "salt_file": _use(topology).salt_file} if hints else {}
    argv = (sys.executable, "-m", "pdtransport.pool.cli", *options(settings))
    place = settings.memory_dir or settings.dir
    return PoolPlan(settings.name, settings.dir, place, url, argv, new_key, digest_key, hint)


def _wants_hints(topology: Topology, pool: PoolSettings) -> bool:
    """True if the router should send hints to the pool.

    It should if chunks may be in tiers below memory, unless the topology sets ``router.pool_hint`` itself.
    """
    below = pool.disk or pool.redis or pool.s3 or pool.tiers
    use = _use(topology)
    return bool(below) and use.load and use.hint and "pool_hint" not in topology.router.model_fields_set


def _use(topology: Topology) -> PoolUse:
    return topology.transport.pool or PoolUse()


def _serves_loopback(host: str) -> bool:
    return host in {"0.0.0.0", "::", ""} or is_loopback(host)


def _options(settings: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[str]:
    """Settings as options of `pdrouter`; nested names are joined by a dash."""
    options: list[str] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            options += _options(value, (*path, name))
        elif value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            options += ["--" + "-".join((*path, name)).replace("_", "-"), *map(str, values)] if values else []
    return options


def _url(host: str, port: int) -> str:
    """``http://host:port`` of a server that listens on ``host``, as seen from this machine."""
    host = HOST if host in {"0.0.0.0", "::", ""} else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def resolved(topology: Topology, base: Path) -> Topology:
    """The topology with all paths in its settings made absolute; they are relative to the topology file."""

    def fixed(section: Any) -> Any:
        updates: dict[str, Any] = {}
        for name in section.model_fields_set:
            value = getattr(section, name)
            if isinstance(value, Path):
                updates[name] = (base / value.expanduser()).absolute()
            elif hasattr(value, "model_fields_set"):
                updates[name] = fixed(value)
        return section.model_copy(update=updates)

    transport, pool = fixed(topology.transport), topology.pool
    if pool is not None:
        pool = fixed(pool)
        place = {"name": pool.name, "dir": pool.dir}
        use = PoolUse(**place) if transport.pool is None else transport.pool.model_copy(update=place)
        transport = transport.model_copy(update={"pool": use})
    return topology.model_copy(update={"transport": transport, "router": fixed(topology.router), "pool": pool})
