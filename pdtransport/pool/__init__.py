"""The shared KV cache pool: chunks in CPU memory and lower tiers, found by their content keys.

Start with ``docs/pool.md``; in the source with ``core/store.py``, the life cycle of a chunk.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdtransport.pool.admin.pool_admin import PoolAdmin
    from pdtransport.pool.client.pool_client import PoolClient
    from pdtransport.pool.server.service import Pool
    from pdtransport.pool.settings import PoolSettings

_HOME = {
    "Pool": "pdtransport.pool.server.service",
    "PoolAdmin": "pdtransport.pool.admin.pool_admin",
    "PoolClient": "pdtransport.pool.client.pool_client",
    "PoolSettings": "pdtransport.pool.settings",
}

__all__ = ["Pool", "PoolAdmin", "PoolClient", "PoolSettings"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pdtransport.pool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
