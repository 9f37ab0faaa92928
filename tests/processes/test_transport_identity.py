"""What pages depend on changes while transfers are under way: nothing computed before is used as of after."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from pdtransport import Settings, Transport, prompt_digest
from pdtransport.kv.geometry import KVGeometry
from pdtransport.transfer.outcome import Outcome
from pdtransport.transport import Handle

SHAPE = (2, 32, 2, 16, 64)  # layers, blocks, heads, tokens, bytes
TOKENS = 64
PAGES = [3, 4, 5, 6]
WAIT_S = 20.0
REASON = "weights: reload_weights changed them here"


class Pair:
    """A prefill and a decode worker with the same weights."""

    def __init__(self, stack: ExitStack, order: str) -> None:
        settings = Settings.parse(
            {"links": {"order": [order], "probe_bytes": 0}, "control": {"port": 0}, "deadlines": {"hold_s": 30}}
        )
        self.memory = [np.full(SHAPE, fill, dtype=np.uint8) for fill in (1, 255)]
        self.prefill, self.decode = (
            stack.enter_context(
                Transport(KVGeometry.of_array(kv), settings, engine=name, fingerprint={"weights": "safetensors:old"})
            )
            for name, kv in zip(("prefill", "decode"), self.memory, strict=True)
        )

    def start(self) -> tuple[Handle, Handle]:
        """A transfer of which prefill has only half its pages: ``(its offer, decode's receipt)``."""
        transfer, digest = secrets.token_hex(8), prompt_digest(range(TOKENS))
        receipt = self.decode.receive(transfer, digest, TOKENS, PAGES, host="127.0.0.1", port=self.prefill.port)
        offer = self.prefill.offer(transfer, digest, TOKENS)
        offer.ready(PAGES, TOKENS // 2)
        deadline = time.monotonic() + WAIT_S
        while not self.memory[1][:, PAGES[0]].any() or (self.memory[1][:, PAGES[0]] == 255).all():
            assert time.monotonic() < deadline, "the first pages did not come"
            time.sleep(0.005)
        return offer, receipt

    def hand_over(self) -> tuple[Outcome, Outcome]:
        """How a whole transfer ended on both sides."""
        transfer, digest = secrets.token_hex(8), prompt_digest(range(TOKENS))
        receipt = self.decode.receive(transfer, digest, TOKENS, PAGES, host="127.0.0.1", port=self.prefill.port)
        offer = self.prefill.offer(transfer, digest, TOKENS)
        offer.ready(PAGES, TOKENS)
        offer.finish()
        got = receipt.future.result(WAIT_S)
        if not got.ok:
            offer.cancel()
        return offer.future.result(WAIT_S), got


@contextmanager
def pair(order: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, order)


@pytest.mark.parametrize("order", ["cma", "ucx"])
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_change_ends_what_is_under_way_and_peers_are_judged_anew(order: str, side: str) -> None:
    """Transfers of the old weights end on both sides with a reason that names them; the next ones are refused by name
    of the field, until the other side has the same weights: then they go through again."""
    with pair(order) as both:
        offer, receipt = both.start()
        changed = getattr(both, side)
        changed.change_fingerprint({"weights": "loaded:new"}, REASON, WAIT_S)
        assert (offer if side == "prefill" else receipt).future.done(), "it still runs when the change is made"
        offer.ready(PAGES, TOKENS)  # the engine goes on computing
        offer.finish()
        for handle in (offer, receipt):
            outcome = handle.future.result(WAIT_S)
            assert not outcome.ok
            assert "weights" in outcome.reason, outcome
        for attempt in range(3):
            _, got = both.hand_over()
            assert not got.ok
            assert "weights" in got.reason, got
            if not attempt and got.code == "peer_lost":
                continue  # it met the moment at which the peers part
            assert got.code == "refused"
            assert "weights differs" in got.reason
            assert "loaded:new" in got.reason
            assert "safetensors:old" in got.reason
        other = both.decode if side == "prefill" else both.prefill
        other.change_fingerprint({"weights": "loaded:new"}, REASON, WAIT_S)
        deadline = time.monotonic() + WAIT_S
        outcomes = both.hand_over()
        while not all(each.ok for each in outcomes) and time.monotonic() < deadline:
            time.sleep(0.2)  # a refusal is repeated for a while
            outcomes = both.hand_over()
        assert all(each.ok for each in outcomes), outcomes
        assert both.prefill.status()["fingerprint"]["weights"] == "loaded:new"
        assert not any(both.prefill.status()["live"].values())
        assert not any(both.decode.status()["live"].values())


@pytest.mark.parametrize("order", ["cma", "ucx"])
def test_a_change_back_lets_pairs_go_on(order: str) -> None:
    """Weights that are the old ones again (sleep and wake, the same files reloaded) are handed over again."""
    with pair(order) as both:
        assert all(each.ok for each in both.hand_over())
        both.prefill.change_fingerprint({"weights": "loaded:new"}, REASON, WAIT_S)
        both.prefill.change_fingerprint({"weights": "safetensors:old"}, REASON, WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while not all(each.ok for each in both.hand_over()):
            assert time.monotonic() < deadline, "equal weights are refused"
            time.sleep(0.2)


@pytest.mark.parametrize("order", ["cma", "ucx"])
def test_pages_that_are_taken_away_are_let_go_of(order: str) -> None:
    """An engine that goes to sleep gives its KV memory back: when the call returns nothing uses a page."""
    with pair(order) as both:
        offer, receipt = both.start()
        both.prefill.change_fingerprint({}, "weights: the engine goes to sleep", WAIT_S)
        assert offer.future.done()
        both.decode.change_fingerprint({}, "weights: the engine goes to sleep", WAIT_S)
        assert receipt.future.done()
        assert not any(both.prefill.status()["live"].values())
        assert not any(both.decode.status()["live"].values())
