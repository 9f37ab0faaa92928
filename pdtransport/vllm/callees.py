"""Whom decode's workers call for a request: what its parameters name, checked, and as an address."""

from __future__ import annotations

import time
from collections.abc import Callable

from pdtransport.control.reach import Reach
from pdtransport.settings import ControlSettings
from pdtransport.vllm.params import ConsumeParams


class Callees:
    """Never waits, as a scheduler must not.

    Args:
        settings: with the rule, ``control.peers``.
        heads: attention heads of the model, over which tensor-parallel workers divide; 0: not known.
        strict: requests come with such parameters (decode), so there must be a rule.
        clock: monotonic seconds.

    Raises:
        SettingsError: there is none, or it can't be kept.
    """

    def __init__(
        self, settings: ControlSettings, heads: int, *, strict: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._reach = Reach(settings, strict=strict, clock=clock)
        self._heads = heads

    def why_not(self, params: ConsumeParams) -> str:
        """Why nobody is called for these parameters; empty while nothing speaks against it."""
        found = self.find(params)
        return found if isinstance(found, str) else ""

    def find(self, params: ConsumeParams) -> ConsumeParams | str | None:
        """The parameters with the address that may be called as their host; or why it may not be; None: its name is
        being looked up, ask again."""
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
