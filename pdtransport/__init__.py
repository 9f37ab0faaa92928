"""KV-cache transport for disaggregated prefill and decode.

The Python API is :class:`Transport`; the other ways in are vLLM's ``--kv-transfer-config`` and ``pdlaunch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdtransport.errors import (
        LinkError,
        LinkUnavailable,
        PDTransportError,
        PeerRefused,
        SettingsError,
        TransferFailed,
    )
    from pdtransport.kv.geometry import KVGeometry, LayerPages, Region
    from pdtransport.kv.keys import request_key
    from pdtransport.outcome import Outcome
    from pdtransport.settings import Settings
    from pdtransport.transport import Offer, Receipt, Transport

_HOME = {
    "KVGeometry": "pdtransport.kv.geometry",
    "LayerPages": "pdtransport.kv.geometry",
    "LinkError": "pdtransport.errors",
    "LinkUnavailable": "pdtransport.errors",
    "Offer": "pdtransport.transport",
    "Outcome": "pdtransport.outcome",
    "PDTransportError": "pdtransport.errors",
    "PeerRefused": "pdtransport.errors",
    "Receipt": "pdtransport.transport",
    "Region": "pdtransport.kv.geometry",
    "Settings": "pdtransport.settings",
    "SettingsError": "pdtransport.errors",
    "TransferFailed": "pdtransport.errors",
    "Transport": "pdtransport.transport",
    "request_key": "pdtransport.kv.keys",
}

__all__ = [
    "KVGeometry",
    "LayerPages",
    "LinkError",
    "LinkUnavailable",
    "Offer",
    "Outcome",
    "PDTransportError",
    "PeerRefused",
    "Receipt",
    "Region",
    "Settings",
    "SettingsError",
    "TransferFailed",
    "Transport",
    "request_key",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pdtransport' has no attribute {name!r}")
