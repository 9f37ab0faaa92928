"""Bugs in the drivers of the protocol (``pdtransport/transfer``), which the simulator must find."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from pdtransport.kv.groups import CacheGroups
from pdtransport.transfer.consumer import ConsumerDriver
from pdtransport.transfer.engine import TransferEngine
from pdtransport.transfer.peers import Peers
from pdtransport.transfer.producer import ProducerDriver

Patch = pytest.MonkeyPatch


def rewritten(owner: Any, name: str, old: str, new: str) -> Callable[[Patch], None]:
    """Let ``new`` stand where ``old`` stands in a method's source."""

    def apply(patch: Patch) -> None:
        source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
        if source.count(old) != 1:
            raise ValueError(f"{owner.__name__}.{name} holds {old!r} {source.count(old)} times, not once")
        found: dict[str, Any] = {}
        code = "from __future__ import annotations\n" + source.replace(old, new)
        exec(code, vars(sys.modules[owner.__module__]), found)
        patch.setattr(owner, name, found[name])

    return apply


# Name, method, what stands there, what stands there instead.
_BUGS: list[tuple[str, type, str, str, str]] = [
    (
        "half_computed_block_is_final",
        CacheGroups,
        "final_blocks",
        "tokens // group.block_size for",
        "-(-tokens // group.block_size) for",
    ),
    ("prepared_for_other_pages", ProducerDriver, "_push", "early.pages == pages", "True"),
    (
        "pages_of_before_a_preemption",
        ProducerDriver,
        "pages_ready",
        "source.pages = pages\n",
        "source.pages = [old + new[len(old) :] for old, new in zip(source.pages, pages)]\n",
    ),
    ("withdrawn_batch_stays_in_the_queue", ProducerDriver, "_unstage", "push.id != action.id", "True"),
    (
        "batch_without_a_slot_is_forgotten",
        ProducerDriver,
        "push_some",
        "busy.add(push.id.peer)\n            waiting.append(push)",
        "pass",
    ),
    ("offer_is_never_withdrawn", ProducerDriver, "_unstage", "channel.release(key)", "pass"),
    ("key_is_used_twice", ProducerDriver, "_push", "self._next_key + 1", "self._next_key"),
    ("anyone_speaks_of_a_transfer", ProducerDriver, "_owned", "source.owner is owner", "True"),
    ("anyone_cancels_a_transfer", ConsumerDriver, "cancel", "sink.owner is owner", "True"),
    ("fence_forgets_what_the_link_places", ConsumerDriver, "_fence", "if sink else []", "if False else []"),
    (
        "pages_are_counted_from_block_0",
        ConsumerDriver,
        "_runs",
        "what.first_block - wanted.first_block",
        "what.first_block",
    ),
    (
        "heads_of_all_prefill_workers",
        ConsumerDriver,
        "_runs",
        "asked.head_lo, asked.head_hi",
        "self._groups[what.group].head_lo, self._groups[what.group].head_hi",
    ),
    ("token_stays_in_the_driver", ConsumerDriver, "_end", "ready.first_token if ready else None", "None"),
    ("granted_before_all_are_there", ConsumerDriver, "fetch", "len(found) == len(producers)", "True"),
    ("peer_that_went_is_granted_pages", ConsumerDriver, "_grant", "channel is None", "False"),
    ("what_decode_waits_for_is_let_go", ProducerDriver, "let_go", '"granted" not in source.record.events', "True"),
    ("what_decode_waited_for_before_is_let_go", ProducerDriver, "open", 'record.mark("granted")', "pass"),
    ("refused_peer_keeps_its_exclusions", Peers, "want", "peer.excluded.clear()", "pass"),
    ("closed_in_silence", ConsumerDriver, "end_all", "tell(sink.on_end,", "(lambda *_: None)(sink.on_end,"),
    (
        "pages_of_other_weights_are_kept",
        TransferEngine,
        "change_fingerprint",
        "self.producer.cancel_all(Code.REFUSED, reason) | ",
        "",
    ),
    ("end_of_a_request_is_not_reported", ConsumerDriver, "_end", "if sink.wanted.blocks:", "if False:"),
    (
        "loss_is_kept_from_decode",
        TransferEngine,
        "_on_event",
        "self.consumer.peer_lost(event.peer, event.reason)",
        "pass",
    ),
    (
        "loss_is_kept_from_prefill",
        TransferEngine,
        "_on_event",
        "self.producer.peer_lost(event.peer, event.reason)",
        "pass",
    ),
    ("sender_is_waited_for_for_ever", Peers, "tick", "now >= p.answer_by", "False"),
    ("scratch_is_never_given_back", Peers, "tick", "now >= p.answering_until", "False"),
    ("refusal_is_for_ever", Peers, "want", "self._clock() < peer.refused_until", "True"),
    ("measurement_goes_over_another_link", Peers, "_confirm", "self._end_answering(peer)", "pass"),
    ("waiters_of_a_lost_peer_wait_on", Peers, "down", "self._fail_waiters(endpoint, (Code.PEER_LOST, reason))", "pass"),
]

DRIVER_BUGS = {name: rewritten(*where) for name, *where in _BUGS}
