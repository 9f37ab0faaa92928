"""Computes checksums of weights before vLLM's CPU kernels pack them into memory that Python can't read.

oneDNN keeps its own copy of a layer's weights, and vLLM drops the original. So each oneDNN handle is marked with the
checksum of the weights that it is made from (hook on ``vllm._custom_ops.create_onednn_mm`` and
``create_onednn_scaled_mm``). Without this hook such weights count as unseen (:mod:`weight_watch`): once something may
have changed them, they match no peer's, and KV is not exchanged.
"""

from __future__ import annotations

import functools
from typing import Any

from pdtransport.settings import Settings
from pdtransport.vllm.patches.base import Patch, expect

MAKERS = ("create_onednn_mm", "create_onednn_scaled_mm")
_HOOKED = "_pdtransport_sums"


def _check() -> None:
    from vllm import _custom_ops as ops

    for name in MAKERS:
        expect(getattr(ops, name), takes=["weight"], uses=["CPUDNNLGEMMHandler", "handler_tensor"])


def _unneeded(settings: Settings, config: object) -> str:
    from vllm import _custom_ops as ops

    return "" if getattr(ops, "_supports_onednn", False) else "this build of vLLM has no oneDNN"


PATCH = Patch(
    "packed_weights",
    _check,
    setting="patches.packed_weights",
    costs="once something may have changed weights that CPU kernels pack, KV is not exchanged",
    unneeded=_unneeded,
)


def see_packed_weights(settings: Settings) -> None:
    """Mark each oneDNN handle that this process makes from now on. Idempotent."""
    if not PATCH.allowed(settings):
        return
    from vllm import _custom_ops as ops

    from pdtransport.engine.weight_sums import MARK, tensor_sum

    for name in MAKERS:
        make = getattr(ops, name)
        if getattr(make, _HOOKED, False):
            continue

        @functools.wraps(make)
        def made(weight: Any, *args: Any, _make: Any = make, **kwargs: Any) -> Any:
            value = tensor_sum(weight)
            handle = _make(weight, *args, **kwargs)
            setattr(handle, MARK, value)
            return handle

        setattr(made, _HOOKED, True)
        setattr(ops, name, made)
