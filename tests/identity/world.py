"""Servers whose weights, configurations and adapters the rig knows by content, and what changes them at run time.

Labels (paths, names) and contents move independently of each other here; which pairs are equal is read from the files
at the moment at which vLLM reads them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.identity import contents
from tests.identity.makers import Model, write_adapter
from tests.rig.client import Client
from tests.rig.fixtures import pair_spec
from tests.rig.pooled import pooled
from tests.rig.servers import MODEL_NAME, Server, ServerSpec

CAPACITY = 2  # adapters that a server keeps in memory; with more names in use it reads some again from their files
LORA_FLAGS = ("--enable-lora", "--max-lora-rank", "16", "--max-loras", "1", "--max-cpu-loras", str(CAPACITY))
CACHE_BYTES = 64 << 20
LOOKUP_S = 5.0  # a busy machine's pool may answer late; what comes too late is not found
FOLDERS = ("x", "y", "z")  # of adapters, shared by all servers


@dataclass(frozen=True)
class Content:
    """What keys and values depend on beside the tokens and the tenant's salt: digests of what is loaded."""

    weights: str
    config: str
    adapter: str = ""

    def differs(self, other: Content) -> tuple[str, ...]:
        """Names of the parts that differ."""
        return tuple(name for name in ("weights", "config", "adapter") if getattr(self, name) != getattr(other, name))


@dataclass
class Registered:
    """An adapter's name as a server has it. vLLM reads one that was loaded in place again at each step.

    Args:
        number: what the server's memory of adapters goes by; a name that was unloaded and loaded again has a new one.
    """

    folder: str
    number: int
    in_place: bool


@dataclass
class Instance:
    """A running server and what it has loaded."""

    server: Server
    model: Model
    root: Path
    weights: str
    config: str
    started: str = ""  # the weights that it was started with
    adapters: dict[str, Registered] = field(default_factory=dict)
    memory: OrderedDict[int, str] = field(default_factory=OrderedDict)  # number -> content, least recently used first
    numbers: int = 0

    def __post_init__(self) -> None:
        self.started = self.weights

    @property
    def reloaded(self) -> bool:
        """Its weights are others than it was started with."""
        return self.weights != self.started

    def content(self, adapter: str = "") -> Content:
        """What a request under this adapter's name ("": none) would be computed with now."""
        return Content(self.weights, self.config, self._adapter(adapter) if adapter else "")

    def used(self, adapter: str) -> None:
        """A request has run under this adapter's name."""
        if not adapter:
            return
        number = self.adapters[adapter].number
        self.memory[number] = self._adapter(adapter)
        self.memory.move_to_end(number)
        while len(self.memory) > CAPACITY:
            self.memory.popitem(last=False)

    def _adapter(self, name: str) -> str:
        known = self.adapters[name]
        if known.in_place or known.number not in self.memory:
            return self.on_disk(name)
        return self.memory[known.number]

    def moved(self, adapter: str) -> bool:
        """The files hold something else than the server read from them last. One that was loaded in place is read again
        by the next step: until then the server can't know."""
        last = self.memory.get(self.adapters[adapter].number) if adapter else None
        return last is not None and last != self.on_disk(adapter)

    def on_disk(self, adapter: str) -> str:
        """What the files hold now that an adapter's name stands for."""
        return contents.adapter(adapter_folder(self.root, self.adapters[adapter].folder))

    # -- what is done to it -----------------------------------------------------------------------------------------

    async def load(self, client: Client, name: str, folder: str) -> None:
        """Give a name to an adapter's folder; one that has the name already is replaced in place."""
        in_place = name in self.adapters
        body = {
            "lora_name": name,
            "lora_path": str(adapter_folder(self.root, folder)),
            "load_inplace": in_place,
        }
        async with client.post(f"{self.server.url}/v1/load_lora_adapter", body):
            pass
        if not in_place:
            self.numbers += 1
        number = self.adapters[name].number if in_place else self.numbers
        self.adapters[name] = Registered(folder, number, in_place)
        self.used(name)

    async def unload(self, client: Client, name: str) -> None:
        async with client.post(f"{self.server.url}/v1/unload_lora_adapter", {"lora_name": name}):
            pass
        del self.adapters[name]

    async def reload(self, client: Client, folder: Path | None = None) -> None:
        """Load weights into the running engine, from ``folder`` or again from its own; its caches are left alone."""
        body: dict[str, Any] = {"method": "reload_weights"}
        if folder is not None:
            body["kwargs"] = {"weights_path": str(folder)}
            self.model = replace(self.model, folder=str(folder.relative_to(self.root)))
        async with client.post(f"{self.server.url}/collective_rpc", body):
            pass
        self.weights = contents.weights(self.root / self.model.folder)
        self.memory.clear()  # vLLM's worker drops its adapters then

    async def forget(self, client: Client) -> None:
        """Empty its prefix cache."""
        async with client.post(f"{self.server.url}/reset_prefix_cache", {}):
            pass


def adapter_folder(root: Path, folder: str) -> Path:
    return root / "adapters" / folder


def put_adapter(root: Path, folder: str, name: str) -> None:
    """Write one of ``makers.ADAPTERS`` into a folder that servers may have loaded another one from."""
    write_adapter(adapter_folder(root, folder), name)


def spec_of(number: int, model: Model, root: Path, pool: Path | None = None) -> ServerSpec:
    """A server of both roles, which computes what it can't take; its first name is its own, its second one common.

    Args:
        pool: directory of the pool that it has.
    """
    spec = pair_spec(
        f"identity-{number}",
        "kv_both",
        cores=str(number % 2),
        load_failure_policy="recompute",
        model=root / model.folder,
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=4,
        kv_cache_bytes=CACHE_BYTES,
        args=(*LORA_FLAGS, *model.args(), "--served-model-name", f"model-of-{number}", MODEL_NAME),
    )
    spec = replace(spec, env={**spec.env, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"})
    return pooled(pool, spec, lookup_s=LOOKUP_S) if pool else spec


def instance_of(server: Server, model: Model, root: Path) -> Instance:
    return Instance(server, model, root, contents.weights(root / model.folder), model.config_content(root))
