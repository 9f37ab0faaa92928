"""The connector with a page broken after its receipt: what vLLM loads in decode, for the negative control.

``kv_connector_module_path`` names this module. Each receipt looks at the file that ``BROKEN`` names: where it holds the
number of a cache group, the last whole page of that group is zeroed before the engine learns that the pages are there,
as if it had never been written. ``FACTS`` names a file that is told what the cache groups are. KV in host memory only.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pdtransport.kv.groups import GONE, CacheGroups
from pdtransport.transfer.outcome import Outcome
from pdtransport.vllm.cache_groups import HandedGroups
from pdtransport.vllm.connector import PDTransportConnector as Installed
from tests.layouts import BROKEN, FACTS


class PDTransportConnector(Installed):
    """Breaks a page as the file says."""

    def register_kv_caches(self, kv_caches: Any) -> None:
        super().register_kv_caches(kv_caches)
        described, transport = self.worker._described, self.worker._transport
        assert described is not None
        assert transport is not None
        kinds = HandedGroups.of(self._kv_cache_config).kinds
        facts = [
            {
                "kind": kinds[pages.table],
                "layers": len(group.layers),
                "block_size": group.block_size,
                "page_bytes": group.page_bytes,
            }
            for group, pages in zip(described.groups, described.pages, strict=True)
        ]
        Path(os.environ[FACTS]).write_text(json.dumps(facts))
        transport.receive = _breaking(transport.receive, transport.groups)  # type: ignore[method-assign]


def _breaking(receive: Callable[..., Any], groups: CacheGroups) -> Callable[..., Any]:
    def instead(
        transfer: str, digest: bytes, tokens: int, pages: Sequence[list[int]], *, on_end: Any, **more: Any
    ) -> Any:
        def ended(outcome: Outcome) -> None:
            file = Path(os.environ[BROKEN])
            if outcome.ok and file.exists():
                _zero(groups, int(file.read_text()), pages)
            on_end(outcome)

        return receive(transfer, digest, tokens, pages, on_end=ended, **more)

    return instead


def _zero(groups: CacheGroups, group: int, pages: Sequence[list[int]]) -> None:
    held = [page for page in pages[group] if page != GONE]
    geometry = groups[group]
    for address, nbytes in geometry.runs(held[-2:-1] or held, geometry.head_lo, geometry.head_hi).tolist():
        ctypes.memset(address, 0, nbytes)
