"""The list, by room. A bug that was found in use and fits gets an entry here, and the test that now finds it."""

from __future__ import annotations

from tests.mutants.listed import control, kernels, kv, links, pool, protocol, router, transfer, vllm
from tests.mutants.place import Mutant

LISTED: tuple[Mutant, ...] = tuple(
    mutant for room in (control, kernels, kv, links, pool, protocol, router, transfer, vllm) for mutant in room.BUGS
)
