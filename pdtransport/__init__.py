"""KV-cache transport for disaggregated prefill and decode.

The Python API is :class:`Transport`. The other ways to use it are vLLM's ``--kv-transfer-config`` and ``pdlaunch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdtransport.errors import (
        InvalidCall,
        LinkError,
        LinkUnavailable,
        PDTransportError,
        PeerRefused,
        SettingsError,
        TimedOut,
        TransferFailed,
        TransportClosed,
    )
    from pdtransport.kv.geometry import KVGeometry, LayerPages, Region
    from pdtransport.kv.keys import prompt_digest
    from pdtransport.observe.status import PatchStatus, PeerStatus, TransferStatus, TransportStatus
    from pdtransport.settings import Settings
    from pdtransport.transfer.outcome import Outcome
    from pdtransport.transport import Offer, Receipt, Transport

_HOME = {
    "InvalidCall": "pdtransport.errors",
    "KVGeometry": "pdtransport.kv.geometry",
    "LayerPages": "pdtransport.kv.geometry",
    "LinkError": "pdtransport.errors",
    "LinkUnavailable": "pdtransport.errors",
    "Offer": "pdtransport.transport",
    "Outcome": "pdtransport.transfer.outcome",
    "PDTransportError": "pdtransport.errors",
    "PeerRefused": "pdtransport.errors",
    "PatchStatus": "pdtransport.observe.status",
    "PeerStatus": "pdtransport.observe.status",
    "Receipt": "pdtransport.transport",
    "Region": "pdtransport.kv.geometry",
    "Settings": "pdtransport.settings",
    "SettingsError": "pdtransport.errors",
    "TimedOut": "pdtransport.errors",
    "TransferFailed": "pdtransport.errors",
    "TransferStatus": "pdtransport.observe.status",
    "Transport": "pdtransport.transport",
    "TransportClosed": "pdtransport.errors",
    "TransportStatus": "pdtransport.observe.status",
    "prompt_digest": "pdtransport.kv.keys",
}

__all__ = [
    "InvalidCall",
    "KVGeometry",
    "LayerPages",
    "LinkError",
    "LinkUnavailable",
    "Offer",
    "Outcome",
    "PDTransportError",
    "PatchStatus",
    "PeerRefused",
    "PeerStatus",
    "Receipt",
    "Region",
    "Settings",
    "SettingsError",
    "TimedOut",
    "TransferFailed",
    "TransferStatus",
    "Transport",
    "TransportClosed",
    "TransportStatus",
    "prompt_digest",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pdtransport' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
