"""The disk tier with I/O by NIXL's storage plugins: POSIX, or another plugin that handles files.

Chunks pass through host memory with every plugin. The tier's entry point is ``nixl``.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pdtransport.errors import SettingsError
from pdtransport.pool.settings import DiskSettings
from pdtransport.pool.tiers.base import TierError, address_of
from pdtransport.pool.tiers.disk import STRETCH, DiskTier
from pdtransport.settings import one_line

MODULES = ("nixl._api", "nixl_cu13._api", "nixl_cu12._api")
MAX_LOST = 16  # buffers given up since NIXL did not release their transfers; at this many the tier refuses all I/O
LOOK_S = 0.0001  # between polls of a transfer in flight


class NixlOptions(BaseModel):
    """Options of the tier: ``--tier-option nixl.NAME=VALUE``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(description="Directory for chunk files, used by this pool alone; created if missing.")
    plugin: Annotated[str, Field(pattern=r"^[A-Z0-9_]{1,32}$")] = Field(
        "POSIX", description="NIXL's plugin. Plugins other than POSIX (GDS, GDS_MT, HF3FS) are unmeasured."
    )
    threads: int = Field(4, ge=1, le=64, description="Chunks that are read or written at once.")


class NixlTier(DiskTier):
    """Stores chunks below ``options["path"]``.

    Raises:
        SettingsError: the package or the plugin can't be loaded, an option is wrong, the directory can't be written.
    """

    name = "nixl"

    def __init__(self, options: dict[str, Any]) -> None:
        try:
            its = NixlOptions.model_validate(options)
        except ValidationError as error:
            raise SettingsError(f"tier nixl: {one_line(error)}") from None
        self._api, self._plugin = _api(), its.plugin
        self._agents = itertools.count()
        self._lost: list[Any] = []  # agents and buffers of transfers that NIXL did not release
        self._agent()
        super().__init__(DiskSettings(path=its.path, bytes=1 << 20, threads=its.threads, direct="off"))
        self._staged = True

    def _agent(self) -> Any:
        """Make an agent. Each serves one thread.

        Raises:
            SettingsError: the plugin does not start, or does not move files.
        """
        name = f"pdpool-{os.getpid()}-{next(self._agents)}"
        agent = self._api.nixl_agent(name, self._api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        known = ", ".join(sorted(agent.get_plugin_list()))
        try:
            agent.create_backend(self._plugin, {})
            fits = {"DRAM_SEG", "FILE_SEG"} <= set(agent.get_backend_mem_types(self._plugin))
        except Exception as error:  # noqa: BLE001 - the bindings' own
            raise SettingsError(
                f"tier nixl: plugin {self._plugin} does not start ({error}; available: {known}): choose another one "
                "with nixl.plugin, or install the libraries that it needs"
            ) from None
        if not fits:
            raise SettingsError(
                f"tier nixl: plugin {self._plugin} does not support files: choose another one with nixl.plugin"
            )
        return agent

    def _to_file(self, fd: int, nbytes: int, offset: int) -> None:
        self._move("WRITE", fd, nbytes, offset)

    def _from_file(self, fd: int, nbytes: int, offset: int) -> None:
        self._move("READ", fd, min(nbytes, STRETCH), offset)

    def _move(self, way: str, fd: int, nbytes: int, offset: int) -> None:
        """Move bytes between this thread's buffer and a file; returns when no transfer is in flight.

        Raises:
            TierError: the transfer failed.
        """
        if len(self._lost) >= MAX_LOST:
            raise TierError(f"{MAX_LOST} transfers did not end: restart the pool")
        mine: tuple[Any, Any] | None = getattr(self._local, "agent", None)
        buffer = self._buffer()
        if mine is None:
            agent = self._agent()
            memory = agent.get_reg_descs([(address_of(buffer), STRETCH, 0, "")], mem_type="DRAM")
            agent.register_memory(memory)
            mine = self._local.agent = agent, memory
        agent, handle = mine[0], None
        file = agent.get_reg_descs([(offset, nbytes, fd, "")], mem_type="FILE")
        try:
            agent.register_memory(file)
            ours = agent.get_xfer_descs([(address_of(buffer), nbytes, 0)], mem_type="DRAM")
            handle = agent.initialize_xfer(way, ours, file.trim(), agent.name)
            state = agent.transfer(handle)
            while state == "PROC":
                time.sleep(LOOK_S)
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise TierError(f"it ended as {state}")
        except Exception as error:  # noqa: BLE001
            raise TierError(f"NIXL's plugin {self._plugin} could not {way.lower()}: {error}") from None
        finally:
            self._end(mine, handle, file, buffer)

    def _end(self, mine: tuple[Any, Any], handle: Any, file: Any, buffer: memoryview) -> None:
        """Release a transfer's handle.

        If NIXL fails to, the transfer may still be in flight: its buffer is kept forever, and the thread gets a new
        one.

        Raises:
            TierError: NIXL failed to release the transfer.
        """
        try:
            if handle is not None:
                mine[0].release_xfer_handle(handle)
            mine[0].deregister_memory(file)
        except Exception as error:  # noqa: BLE001
            self._local.agent = self._local.buffer = None
            self._lost.append((mine, handle, buffer))
            raise TierError(f"NIXL's plugin {self._plugin} did not release a transfer: {error}") from None


def _api() -> Any:
    problems = []
    for name in MODULES:
        try:
            found = importlib.import_module(name)
            ours = logging.getLogger("nixl")  # it logs to standard output, where pdpool prints that it is ready
            ours.handlers, ours.propagate = [], True
            ours.setLevel(logging.WARNING)
            return found
        except ImportError as error:
            problems.append(str(error))
    raise SettingsError(f"tier nixl: its package can't be loaded ({problems[0]}): pip install 'pdtransport[pool-nixl]'")
