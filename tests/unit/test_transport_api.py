"""The Python API's own rules, without a second process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pdtransport import KVGeometry, Settings, TransferFailed, Transport, prompt_digest
from pdtransport.io.cuda_events import CudaEventQueue
from pdtransport.kv.fingerprint import compare
from pdtransport.kv.geometry import LayerPages
from pdtransport.kv.groups import CacheGroups
from pdtransport.transport import Offer, fingerprint_of
from tests.rig import twin_gpu
from tests.rig.twin_gpu import TwinEvent


def geometry(**more: Any) -> KVGeometry:
    facts = {
        "layers": (LayerPages("l", 1 << 20, 4096),),
        "num_blocks": 4,
        "block_size": 16,
        "heads": 2,
        "head_lo": 0,
        "total_heads": 2,
        "slot_bytes": 64,
        "heads_first": True,
    }
    return KVGeometry(**{**facts, **more})


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("kv_layout", {"heads_first": False}),
        ("block_size", {"block_size": 32}),
        ("kv_heads", {"total_heads": 4}),
        ("kv_slot_bytes", {"slot_bytes": 128}),
        ("layers", {"layers": (LayerPages("l", 1 << 20, 4096), LayerPages("m", 1 << 21, 4096))}),
    ],
)
def test_whatever_changes_the_stream_of_a_page_is_in_the_fingerprint(field: str, more: dict[str, Any]) -> None:
    """Peers whose pages hold the same bytes in another order refuse each other, by the field's name."""
    mismatch = compare(
        fingerprint_of(CacheGroups.of(geometry()), 1), fingerprint_of(CacheGroups.of(geometry(**more)), 1)
    )
    assert mismatch is not None
    assert mismatch.field == field


def test_a_failed_transfer_raises_however_it_is_waited_for() -> None:
    """Nobody takes pages that did not come for ones that did."""
    kv = np.zeros((1, 4, 2, 16, 64), dtype=np.uint8)
    settings = Settings.parse({"control": {"port": 0}, "links": {"order": ["cma"], "probe_bytes": 0}})
    with Transport(KVGeometry.of_array(kv), settings, engine="d") as transport:
        receipt = transport.receive("t", prompt_digest([1]), 1, [0], host="127.0.0.1", port=1)
        receipt.cancel("enough")
        with pytest.raises(TransferFailed, match=r"t: enough \(cancelled\)"):
            receipt.result(20.0)

        async def wait() -> None:
            await receipt

        with pytest.raises(TransferFailed, match="enough"):
            asyncio.run(wait())


@pytest.mark.parametrize("how", ["cancel", "withdraw"])
def test_pages_that_were_taken_back_are_not_announced_when_their_kernels_end(how: str) -> None:
    """The engine said that they are final behind an event, and took them back before it passed. What waits for the GPU
    is forgotten, or a page of another request would be announced."""
    said: list[str] = []

    def note(name: str) -> Any:
        return lambda *args: said.append(f"{name} {args[2:]}" if name == "pages_ready" else name)

    with twin_gpu.installed():
        cuda_events = CudaEventQueue(0)
        names = ("pages_ready", "prepare", "cancel", "finish")
        transfer_engine = SimpleNamespace(
            cuda_events=cuda_events, producer=SimpleNamespace(**{name: note(name) for name in names})
        )
        transport: Any = SimpleNamespace(
            _call=lambda call: call(transfer_engine),
            _ask=lambda call, timeout_s: call(transfer_engine),
            _checked_pages=lambda pages, blocks, least: (list(pages),),
        )
        offer = Offer(transport, "t", tokens=32, blocks=(2,))
        event = TwinEvent()
        offer.ready([1, 2], 32, after=event)
        offer.finish()
        assert (said, cuda_events.waiting) == (["prepare"], 2)
        offer.cancel() if how == "cancel" else offer.withdraw(1.0)
        event.happen()
        cuda_events.run()
        assert said == ["prepare", "cancel" if how == "cancel" else "pages_ready (([],), 0)"]
        assert cuda_events.waiting == 0
        cuda_events.close()
