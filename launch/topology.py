"""The model of a ``topology.yaml`` (apiVersion ``pdtransport/v1``). :mod:`pdtransport.launch.reading` loads one.

``transport:`` is :class:`pdtransport.settings.Settings` and ``router:`` is
:class:`pdtransport.router.settings.RouterSettings`, without the fields that pdlaunch sets for each instance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pdtransport.errors import SettingsError
from pdtransport.launch.cores import MAX_CORE, parse_cores
from pdtransport.links.registry import check_links
from pdtransport.pool.settings import PoolSettings, parse_size
from pdtransport.router.settings import RouterSettings
from pdtransport.settings import Section, Settings

API_VERSION = "pdtransport/v1"
MAX_INSTANCES = 64  # instances of a role on one machine
MAX_FLAGS = 256
MAX_NAMES = 64  # served names of the model

# vLLM flags that pdlaunch sets itself, and the topology key for their value.
OWN_FLAGS: Mapping[str, str] = {
    "model": "model.id",
    "revision": "model.revision",
    "served-model-name": "model.served_name",
    "dtype": "model.dtype",
    "block-size": "model.block_size",
    "max-model-len": "model.max_model_len",
    "tensor-parallel-size": "roles.<role>.tp",
    "port": "roles.<role>.port",
    "host": "no key: servers listen on 127.0.0.1, and clients reach them through the router (router.host)",
    "kv-transfer-config": "transport and kv_load_failure_policy",
}
# Flags with a secret value, and the environment variable that vLLM reads instead.
SECRET_FLAGS: Mapping[str, str] = {"api-key": "the variable VLLM_API_KEY", "hf-token": "the variable HF_TOKEN"}
FLAG_ALIASES = {"tp": "tensor-parallel-size", "tensor-parallel": "tensor-parallel-size"}

# Flags that shape KV pages or their content: prefill and decode must agree on them.
SHARED_FLAGS = ("kv-cache-dtype", "attention-backend", "quantization", "hf-overrides", "load-format", "tokenizer")

# Environment variables that pdlaunch sets itself.
OWN_ENV: Mapping[str, str] = {
    "VLLM_CPU_OMP_THREADS_BIND": "roles.<role>.cpu",
    "CUDA_VISIBLE_DEVICES": "roles.<role>.gpus",
    "PDTRANSPORT_CONTROL_HOST": "transport.control.host",
    "PDTRANSPORT_CONTROL_PORT": "roles.<role>.control_port",
}

Count = Annotated[int, Strict()]
Port = Annotated[int, Strict(), Field(ge=0, le=65535)]
Name = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]


def wrong(text: str, key: str | None = None) -> PydanticCustomError:
    """A validation error whose text is shown unchanged; ``key``: it concerns this key of the mapping."""
    return PydanticCustomError("topology", "{text}", {"text": text, "key": key})


def _flags(raw: Any) -> Any:
    """Check vLLM flags, given by long names without leading dashes: ``max-num-seqs: 8``, ``enforce-eager: true``."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise wrong("a mapping of vLLM flags, such as {max-num-seqs: 8, enforce-eager: true}")
    if len(raw) > MAX_FLAGS:
        raise wrong(f"{len(raw)} flags; at most {MAX_FLAGS}")
    flags: dict[str, Any] = {}
    for key, value in raw.items():
        name = key.replace("_", "-")
        if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9.-]*", name):
            raise wrong("not a vLLM flag; write its long name without leading dashes, such as max-num-seqs", key)
        canonical = FLAG_ALIASES.get(name, name)
        own = canonical.removeprefix("no-")
        if own in OWN_FLAGS:
            raise wrong(f"pdlaunch sets --{own} itself, from {OWN_FLAGS[own]}", key)
        if canonical in SECRET_FLAGS:
            text = (
                f"command lines are visible to all users of a machine: set {SECRET_FLAGS[canonical]} for pdlaunch "
                "instead"
            )
            raise wrong(text, key)
        if name in flags:
            raise wrong("given twice, once with - and once with _", key)
        flags[name] = value
    return flags


def _environment(raw: Any) -> Any:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise wrong("a mapping of environment variables, such as {OMP_NUM_THREADS: 4}")
    env: dict[str, str] = {}
    for key, value in raw.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise wrong("not a name of an environment variable", key)
        if key in OWN_ENV:
            raise wrong(f"pdlaunch sets it itself, from {OWN_ENV[key]}", key)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or "\0" in str(value):
            raise wrong("must be text or a number; write true, false and the like in quotes", key)
        env[key] = str(value)
    return env


def _ids(raw: Any) -> Any:
    return parse_cores(raw) if isinstance(raw, str) else raw


_NO_SECRETS = "a topology holds no secrets"
# The real servers get their ports when the plan is made.
_PLACEHOLDERS = {"prefill": ["http://127.0.0.1:1"], "decode": ["http://127.0.0.1:2"]}


def _router(raw: Any) -> Any:
    if not isinstance(raw, dict):
        return _PLACEHOLDERS if raw is None else raw
    for key in _PLACEHOLDERS:
        if key in raw:
            raise wrong("pdlaunch fills in the servers itself; remove it", key)
    for key in ("api_key", "admin_api_key", "upstream_api_key"):
        if raw.get(key) is not None:
            raise wrong(f"{_NO_SECRETS}: put the key into a file and set {key}_file to its path", key)
    return {**raw, **_PLACEHOLDERS}


def _pool(raw: Any) -> Any:
    """Convert sizes with units to bytes; values that are not sizes are left for the model to reject."""
    if not isinstance(raw, dict):
        return {} if raw is None else raw

    def sized(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: sized("bytes" if key == "quotas" else name, each) for name, each in value.items()}
        size = parse_size(value) if key.endswith("bytes") and isinstance(value, str) else None
        return value if size is None else size

    return {key: sized(key, value) for key, value in raw.items()}


Flags = Annotated[dict[str, Any], BeforeValidator(_flags)]
Environment = Annotated[dict[str, str], BeforeValidator(_environment)]
Router = Annotated[RouterSettings, BeforeValidator(_router)]
Pool = Annotated[PoolSettings, BeforeValidator(_pool)]
Ids = Annotated[
    tuple[Annotated[int, Strict(), Field(ge=0, le=MAX_CORE)], ...], BeforeValidator(_ids), Field(min_length=1)
]


Names = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda raw: (raw,) if isinstance(raw, str) else raw),
    Field(min_length=1, max_length=MAX_NAMES),
]


class Model(Section):
    """The model; all instances serve the same one."""

    id: str = Field(
        min_length=1,
        max_length=1024,
        description="Folder (relative to the topology file) or hub id. A value that starts with ./ ../ / or ~ is a "
        "folder.",
    )
    revision: str | None = Field(None, description="Revision of a hub id; one for all instances.")
    served_name: Names | None = Field(
        None, description="Name that clients use, or a list of names, of which answers contain the first. Default: "
                          "the topology's name."
    )  # fmt: skip
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="Data type of the weights.")
    block_size: Annotated[int, Strict()] | None = Field(
        None, ge=1, le=1024, description="Tokens per KV page, equal on all instances. Default: vLLM's own choice."
    )
    max_model_len: Annotated[int, Strict()] | None = Field(
        None, ge=1, description="Longest prompt and answer together, in tokens. Default: the model's own."
    )


class Host(Section):
    """A machine. This version starts processes only on the machine on which pdlaunch runs."""

    via: str = Field("local", description="How pdlaunch starts processes there: local.")

    @field_validator("via")
    @classmethod
    def _only_local(cls, value: str) -> str:
        if value != "local":
            raise wrong(f"{value!r} is not supported: this version launches on one machine; allowed: local")
        return value


class Defaults(Section):
    """Values for all roles; a role's own value takes precedence."""

    args: Flags = Field(
        default_factory=dict,
        description="vLLM flags by their long names, such as `max-num-seqs: 8` or `enforce-eager: true`. A role "
        "removes a flag with null.",
    )
    env: Environment = Field(default_factory=dict, description="Environment variables.")
    start_timeout_s: float = Field(
        900.0, gt=0, le=86400, description="The launch fails if a server is not up after this long."
    )
    stop_timeout_s: float = Field(
        20.0, gt=0, le=600, description="Time for processes to end by themselves before they are killed."
    )


class Role(Section):
    """The instances of one role."""

    count: Annotated[int, Strict()] = Field(1, ge=1, le=MAX_INSTANCES, description="Instances.")
    tp: Annotated[int, Strict()] = Field(1, ge=1, le=64, description="Tensor-parallel workers in each instance.")
    port: Port = Field(0, description="HTTP port of instance 0; instance i uses port + i. 0: free ports are picked.")
    control_port: Port = Field(
        0,
        description="Control port of instance 0's rank 0; each instance uses tp consecutive ports. 0: free ports "
        "are picked.",
    )
    cpu: Ids | None = Field(
        None,
        description="CPU cores, `0-7` or `[0, 1]`, distributed over the role's workers in this order. Default: an "
        "even share.",
    )
    gpus: Ids | None = Field(None, description="GPUs, tp per instance in this order. Unset: a CPU role.")
    args: Flags = Field(default_factory=dict, description="vLLM flags, which override those of defaults.")
    env: Environment = Field(
        default_factory=dict, description="Environment variables, which override those of defaults."
    )

    @model_validator(mode="after")
    def _devices(self) -> Role:
        workers = self.count * self.tp
        if self.cpu is not None and self.gpus is not None:
            raise wrong("cpu and gpus exclude each other: a role runs on one kind of device")
        if self.cpu is not None:
            if len(set(self.cpu)) != len(self.cpu):
                raise wrong("cpu lists a core twice")
            if len(self.cpu) % workers:
                raise wrong(
                    f"cpu lists {len(self.cpu)} cores for {workers} workers (count x tp); give each worker the same "
                    "number"
                )
        if self.gpus is not None:
            if len(self.gpus) != workers:
                raise wrong(f"gpus lists {len(self.gpus)} for {workers} workers (count x tp); list one for each")
            for start in range(0, workers, self.tp):
                if len(set(self.gpus[start : start + self.tp])) != self.tp:
                    raise wrong(f"instance {start // self.tp} would get one GPU twice; its tp workers need one each")
        for key, ports in (("port", self.count), ("control_port", workers)):
            if getattr(self, key) and getattr(self, key) + ports - 1 > 65535:
                raise wrong(f"{key} + {ports - 1} is above 65535")
        return self


class Roles(Section):
    """The two roles, one section each."""

    prefill: Role = Field(description="Instances that compute prompts and push their KV pages.")
    decode: Role = Field(description="Instances that receive pages and write answers.")


class Preflight(Section):
    """What `pdlaunch up` proves before it reports success."""

    golden_prompt: bool = Field(
        True, description="Send a prompt through the router and directly to decode, and compare the tokens."
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        max_length=100_000,
        description="Text of the prompt, a few KV pages long; a unique line is put in front, so that no cache has "
        "it. Unset: the source of a program.",
    )
    max_tokens: Annotated[int, Strict()] = Field(16, ge=1, le=4096, description="Tokens to compare.")
    timeout_s: float = Field(120.0, gt=0, le=3600, description="Timeout of one answer.")


def _version(value: Any) -> Any:
    if value != API_VERSION:
        raise wrong(f"{value!r} is not supported by this pdlaunch; allowed: {API_VERSION}")
    return value


class Topology(Section):
    """One disaggregated service."""

    apiVersion: Annotated[str, BeforeValidator(_version)] = Field(description=f"Always {API_VERSION}.")
    name: Name = Field(description="Names the run: letters a-z, digits and dashes.")
    model: Model
    hosts: dict[str, Host] = Field(default_factory=dict, description="Machines. Only {local: {via: local}} for now.")
    defaults: Defaults = Defaults()
    roles: Roles
    transport: Settings = Field(
        Settings(),
        description="How pages move; the same for all instances. control.peers is filled in with the instances' own "
        "host (control.host) unless it is set.",
    )
    router: Router = Field(
        default_factory=lambda: RouterSettings.model_validate(_PLACEHOLDERS),
        description="The router's settings, without prefill and decode, which pdlaunch fills in.",
    )
    pool: Pool | None = Field(
        None,
        description="Start a pool for all instances, which ends with them; sizes such as 64GiB. transport.pool "
        "(optional) sets how instances use it.",
    )
    kv_load_failure_policy: Literal["recompute", "fail"] = Field(
        "recompute",
        description="What decode does with a request whose pages did not arrive: compute the prompt, or "
        "fail the request.",
    )
    preflight: Preflight = Preflight()

    @field_validator("hosts")
    @classmethod
    def _one_host(cls, hosts: dict[str, Host]) -> dict[str, Host]:
        if len(hosts) > 1:
            raise wrong(f"{len(hosts)} hosts ({', '.join(hosts)}): this version launches on one machine; keep one")
        return hosts

    @field_validator("transport")
    @classmethod
    def _for_all_instances(cls, transport: Settings) -> Settings:
        if transport.pool is not None and transport.pool.salt:
            raise wrong(f"{_NO_SECRETS}: put the salt into a file and set pool.salt_file to its path")
        if "port" in transport.control.model_fields_set:
            raise wrong(
                "control.port differs between instances: set roles.<role>.control_port instead, or leave it unset"
            )
        try:
            check_links(transport)
        except SettingsError as error:
            raise wrong(str(error)) from None
        return transport

    @model_validator(mode="after")
    def _one_pool(self) -> Topology:
        use = self.transport.pool
        if self.pool is None:
            return self
        for key in ("name", "dir"):
            if use is not None and key in use.model_fields_set and getattr(use, key) != getattr(self.pool, key):
                raise wrong(f"transport.pool.{key} differs from that of the section pool: remove one of them", "pool")
        if self.kv_load_failure_policy != "recompute" and (use is None or use.load):
            raise wrong("instances that load from a pool recompute what they can't load", "kv_load_failure_policy")
        return self

    @model_validator(mode="after")
    def _same_pages(self) -> Topology:
        prefill, decode = self.flags(self.roles.prefill), self.flags(self.roles.decode)
        for name in SHARED_FLAGS:
            if prefill.get(name) != decode.get(name):
                raise wrong(
                    f"args {name} is {prefill.get(name)!r} in prefill and {decode.get(name)!r} in decode, which makes "
                    "their pages incompatible: set it in defaults.args",
                    "roles",
                )
        return self

    @model_validator(mode="after")
    def _fixed_ports_apart(self) -> Topology:
        taken: dict[int, str] = {}
        for key, port in self._fixed_ports():
            if port in taken:
                raise wrong(f"port {port} is set for {taken[port]} and for {key}; give each its own port, or 0")
            taken[port] = key
        return self

    def _fixed_ports(self) -> list[tuple[str, int]]:
        ports: list[tuple[str, int | None]] = []
        for name, role in self.by_role().items():
            for key, count in (("port", role.count), ("control_port", role.count * role.tp)):
                first = getattr(role, key)
                ports += [(f"roles.{name}.{key}", first + offset) for offset in range(count) if first]
        ports += [(f"router.{key}", getattr(self.router, key)) for key in ("port", "admin_port")]
        if self.pool is not None and self.pool.http is not None:
            ports.append(("pool.http.listen", self.pool.http.address[1]))
        return [(key, port) for key, port in ports if port]

    def by_role(self) -> dict[str, Role]:
        return {"prefill": self.roles.prefill, "decode": self.roles.decode}

    def flags(self, role: Role) -> dict[str, Any]:
        """The role's flags merged over the defaults; null removes a flag."""
        merged = {**self.defaults.args, **role.args}
        return {name: value for name, value in merged.items() if value is not None}

    def environment(self, role: Role) -> dict[str, str]:
        return {**self.defaults.env, **role.env}

    @property
    def served_names(self) -> tuple[str, ...]:
        return self.model.served_name or (self.name,)

    def model_folder(self, base: Path) -> Path | None:
        """The model's folder; None if ``model.id`` is a hub id. ``base`` is the folder of the topology file."""
        folder = Path(self.model.id).expanduser()
        folder = folder if folder.is_absolute() else base / folder
        if self.model.id.startswith((".", "/", "~")) or self.model.id.count("/") > 1 or folder.is_dir():
            return folder.absolute()
        return None
