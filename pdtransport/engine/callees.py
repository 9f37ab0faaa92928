"""Checks and resolves the prefill host that a request names, before decode's workers connect to it."""

from __future__ import annotations

import time
from collections.abc import Callable

from pdtransport.control.reach import Reach
from pdtransport.engine.params import ConsumeParams
from pdtransport.settings import ControlSettings


class Callees:
    """Resolves prefill hosts under the rule ``control.peers``. Never blocks, since the scheduler calls it.

    Args:
        settings: ``peers`` is the rule.
        heads: attention heads of the model, which a peer's tensor-parallel size must divide; 0: unknown.
        strict: hosts come from requests (decode), so without a rule only this machine may be connected to.
        clock: monotonic seconds.

    Raises:
        SettingsError: ``strict`` without a rule while ``control.host`` is not loopback, or the rule is invalid.
    """

    def __init__(
        self, settings: ControlSettings, heads: int, *, strict: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._reach = Reach(settings, strict=strict, clock=clock)
        self._heads = heads

    def why_not(self, params: ConsumeParams) -> str:
        """Why the host in these parameters must not be connected to; empty if allowed or not known yet."""
        found = self.find(params)
        return found if isinstance(found, str) else ""

    def find(self, params: ConsumeParams) -> ConsumeParams | str | None:
        """Resolve the host in these parameters.

        Returns:
            The parameters with the host replaced by its address; or the reason why the host must not be connected to;
            or None while the host's name is being looked up: ask again.
        """
        if self._heads and self._heads % params.tp_size:
            return f"tp_size: a model of {self._heads} attention heads is not split over {params.tp_size} workers"
        verdict = self._reach.ask(params.remote_host)
        if verdict is None:
            return None
        if verdict.problem:
            return f"remote_host: {verdict.problem}"
        return params.model_copy(update={"remote_host": verdict.address})

    def close(self) -> None:
        self._reach.close()
