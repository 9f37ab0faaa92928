"""Peers are compatible or refused by the name of the field that differs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdtransport.kv.fingerprint import MISSING, REMEDIES, Fingerprint, compare, plain

# a busy machine is no fault of the code
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FACTS: dict[str, str | int | bool] = {
    "protocol_version": 1,
    "model": "tiny-lm",
    "revision": "",
    "weights": "",  # of which a digest would make names unimportant
    "model_config": "cd34",
    "dtype": "bfloat16",
    "kv_cache_dtype": "auto/bfloat16",
    "block_size": 32,
    "kv_layout": "HNC",
    "attention_backend": "CPU_ATTN:amx",
    "layers": 4,
    "kv_heads": 4,
    "kv_slot_bytes": 256,
    "layer_names": "ef56",
    "attention_kinds": "FullAttentionSpec/SlidingWindowSpec:64",
    "tp_size": 1,
}
values = st.one_of(st.text(max_size=5), st.integers(-2, 40), st.booleans())
fingerprints = st.dictionaries(st.sampled_from([*FACTS, "tp_rank", "x", "y"]), values, max_size=8)


def differing(ours: Fingerprint, yours: Fingerprint) -> str:
    mismatch = compare(ours, yours)
    return mismatch.field if mismatch else ""


def test_equal_fingerprints_are_compatible() -> None:
    assert compare(FACTS, dict(reversed(FACTS.items()))) is None


@pytest.mark.parametrize("field", [name for name in FACTS if name != "tp_size"])
def test_each_differing_field_is_named_with_both_values_and_its_remedy(field: str) -> None:
    mismatch = compare(FACTS, {**FACTS, field: "other"})
    assert mismatch is not None
    assert (mismatch.field, mismatch.yours) == (field, "other")
    text = mismatch.text("prefill", "decode")
    assert text.startswith(f"{field} differs: prefill has {mismatch.ours}, decode has other; ")
    assert text.endswith(REMEDIES[field])


def test_the_text_that_people_read() -> None:
    mismatch = compare({"block_size": 32}, {"block_size": 16})
    assert mismatch is not None
    wanted = "block_size differs: prefill has 32, decode has 16; start both with the same --block-size"
    assert mismatch.text("prefill", "decode") == wanted


@pytest.mark.parametrize("field", FACTS)
def test_a_field_that_one_side_lacks_is_a_mismatch(field: str) -> None:
    less = {name: value for name, value in FACTS.items() if name != field}
    for ours, yours in ((FACTS, less), (less, FACTS)):
        mismatch = compare(ours, yours)
        assert mismatch is not None
        # without kv_heads, equal sizes of tensor parallelism still need no bridge
        assert mismatch.field == field
        assert MISSING in (mismatch.ours, mismatch.yours)


def test_the_most_telling_field_is_named_first() -> None:
    other = dict.fromkeys(FACTS, "other")
    for field in REMEDIES:
        if field in FACTS:
            assert differing(FACTS, other) == field
            other[field] = FACTS[field]  # type: ignore[assignment]
    assert differing({"zebra": 1, "apple": 1}, {"zebra": 2, "apple": 2}) == "apple"


def test_true_is_not_one() -> None:
    assert differing({"flag": True}, {"flag": 1}) == "flag"


@pytest.mark.parametrize(
    ("heads", "ours", "yours", "bridged"),
    [
        (4, 1, 2, True),
        (4, 2, 1, True),
        (4, 4, 1, True),
        (4, 8, 1, True),  # two ranks share a head
        (1, 4, 8, True),  # latent attention: every rank holds all
        (6, 2, 3, True),
        (4, 3, 1, False),
        (4, 1, 3, False),
        (6, 4, 1, False),
        (4, 0, 1, False),
        (4, -2, 1, False),
        (4, "2", 1, False),
        (4, True, 2, False),
        (0, 1, 2, False),
        (True, 1, 2, False),
        (None, 1, 2, False),
        ("8/1", 2, 4, True),  # of two cache groups, the second is whole on every rank
        ("8/4", 1, 8, True),
        ("8/3", 1, 2, False),
        ("8/", 1, 2, False),
        ("8/x", 1, 2, False),
    ],
)
def test_another_tp_size_is_bridged_where_heads_split_evenly(
    heads: int | str | None, ours: int, yours: int, bridged: bool
) -> None:
    shared: dict[str, Any] = {} if heads is None else {"kv_heads": heads}
    for mine, theirs in ((ours, yours), (yours, ours)):
        assert differing({**shared, "tp_size": mine}, {**shared, "tp_size": theirs}) == ("" if bridged else "tp_size")


def test_ranks_are_not_compared() -> None:
    assert compare({"tp_rank": 0}, {"tp_rank": 1}) is None
    assert compare({"tp_rank": 0}, {}) is None


@PATIENT
@given(fingerprints, fingerprints)
def test_both_sides_find_the_same_field(ours: Fingerprint, yours: Fingerprint) -> None:
    one, other = compare(ours, yours), compare(yours, ours)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert (one.field, one.ours, one.yours) == (other.field, other.yours, other.ours)


@PATIENT
@given(fingerprints)
def test_everything_is_compatible_with_itself(facts: Fingerprint) -> None:
    assert compare(facts, dict(facts)) is None


@PATIENT
@given(st.text(), st.text(), st.text())
def test_what_a_peer_wrote_stays_one_line_of_bounded_length(field: str, ours: str, yours: str) -> None:
    mismatch = compare({field: ours}, {field: yours + "!"})
    if mismatch is not None:
        text = mismatch.text()
        assert text.isprintable()
        assert len(text) <= 1000


def test_plain_shortens_visibly() -> None:
    assert plain("a\nb\0c", 10) == "a?b?c"
    assert plain("x" * 20, 10) == "x" * 9 + "…"
    assert plain("x" * 10, 10) == "x" * 10


def test_names_count_only_where_equal_weights_have_no_digest() -> None:
    """What a model's folder is called on a host is nobody's business; without a digest, name and revision must do."""
    elsewhere = {**FACTS, "model": "other", "revision": "r"}
    for weights in ("", "cd34"):
        assert differing({**FACTS, "weights": weights}, {**elsewhere, "weights": weights}) == (
            "" if weights else "model"
        )
    assert differing({**FACTS, "weights": "ab12"}, {**elsewhere, "weights": "other"}) == "weights"
    assert differing(FACTS, {**elsewhere, "weights": "other"}) == "weights"
    nameless = {name: value for name, value in FACTS.items() if name != "weights"}
    assert differing(nameless, {**nameless, "revision": "r"}) == "revision"
