"""Keys of stored chunks: the same for ever and everywhere; different for whatever KV depends on."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdtransport.kv.keys import KeySpace, Media, block_keys, chunk_keys

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SPACE = KeySpace("tiny-lm", "r1", "bfloat16", "NHC", "heads 0-2 of 2", 4)

# Written down once. If one of these changes, nothing that was stored is found again: bump the personalisation instead.
GOLDEN = [
    "d52eb3ae671d608175122277e6ce839f5a1f14dd13954c3d351eaad9b05eb264",
    "51b7877c8139c44f38a1530f47916057475ad725ecf5248a73772606b1f66ac3",
    "1d827a8c6bdd76a7a1c3eba441fe23c4abb2e730cc8ca21f3ae42bd869a08f65",
]
GOLDEN_EVERYTHING = "fe42f7fb941639826196c0725887d44538c64f7b0838ecfa8221b61c7c13bc9f"

tokens_ = st.lists(st.integers(0, 5), max_size=20)


def test_golden_chunk_keys() -> None:
    """What was stored last year is found today; whole chunks have the same keys with and without the tail."""
    assert [key.hex() for key in chunk_keys(SPACE, range(11))] == GOLDEN
    assert [key.hex() for key in chunk_keys(SPACE, range(11), tail=False)] == GOLDEN[:2]
    everything = dataclasses.replace(SPACE, lora="l", salt="t", extra=("x",))
    assert [key.hex() for key in chunk_keys(everything, range(4), media=[Media(1, "img")])] == [GOLDEN_EVERYTHING]


def test_keys_do_not_depend_on_the_hash_seed() -> None:
    """Two processes find each other's chunks whatever their PYTHONHASHSEED."""
    script = (
        "from pdtransport.kv.keys import *; "
        "print(chunk_keys(KeySpace('tiny-lm', 'r1', 'bfloat16', 'NHC', 'heads 0-2 of 2', 4), range(11))[-1].hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert found == {GOLDEN[-1] + "\n"}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(KeySpace)])
def test_whatever_kv_depends_on_changes_every_key(field: str) -> None:
    """Another model, revision, dtype, layout, shard, adapter, salt or chunk size never hits."""
    value = {"chunk_tokens": 2, "extra": ("y",)}.get(field, "other")
    other = dataclasses.replace(SPACE, **{field: value})
    assert not set(chunk_keys(SPACE, range(8))) & set(chunk_keys(other, range(8)))


def test_fields_can_not_be_mistaken_for_one_another() -> None:
    """The same text in another field, or split otherwise, is another space."""
    variants = [
        dataclasses.replace(SPACE, lora="a"),
        dataclasses.replace(SPACE, salt="a"),
        dataclasses.replace(SPACE, extra=("a",)),
        dataclasses.replace(SPACE, extra=("a", "")),
        dataclasses.replace(SPACE, codec="a"),
        dataclasses.replace(SPACE, codec="a", extra=("a",)),
        dataclasses.replace(SPACE, revision="r1a"),
        SPACE,
    ]
    assert len({chunk_keys(space, [1])[0] for space in variants}) == len(variants)


@PATIENT
@given(tokens_, tokens_, tokens_, st.integers(1, 5))
def test_prompts_share_the_keys_of_their_common_prefix_only(
    prefix: list[int], a: list[int], b: list[int], size: int
) -> None:
    """A key is equal exactly where all tokens up to the chunk's end are, the partial tail included."""
    space = dataclasses.replace(SPACE, chunk_tokens=size)
    one, other = chunk_keys(space, prefix + a), chunk_keys(space, prefix + b)
    assert len(one) == -(-len(prefix + a) // size)
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        end = (index + 1) * size
        assert (left == right) == ((prefix + a)[:end] == (prefix + b)[:end])


def test_a_picture_changes_the_chunks_from_where_it_begins() -> None:
    """Same placeholder tokens, other picture: the text before it is shared, nothing after."""
    plain = chunk_keys(SPACE, range(12))
    one = chunk_keys(SPACE, range(12), media=[Media(5, "cat")])
    other = chunk_keys(SPACE, range(12), media=[Media(5, "dog")])
    moved = chunk_keys(SPACE, range(12), media=[Media(6, "cat")])
    assert plain[0] == one[0] == other[0] == moved[0]
    for index in (1, 2):
        assert len({keys[index] for keys in (plain, one, other, moved)}) == 4


@pytest.mark.parametrize("place", range(12))
def test_a_picture_counts_from_the_chunk_on_in_which_it_begins(place: int) -> None:
    """Prompts with one beginning share what lies before the picture, up to the very token in front of it."""
    plain = chunk_keys(SPACE, range(12))
    keys = chunk_keys(SPACE, range(12), media=[Media(place, "cat")])
    before = place // SPACE.chunk_tokens
    assert keys[:before] == plain[:before]
    assert not set(keys[before:]) & set(plain)


@pytest.mark.parametrize("first", [0, 4, 8])
def test_keys_go_on_from_the_chunk_before(first: int) -> None:
    """An answer's chunks have the keys that the next turn's prompt will have."""
    whole = chunk_keys(SPACE, range(14), tail=False)
    keys = chunk_keys(SPACE, range(first), tail=False)
    assert keys + chunk_keys(SPACE, range(first, 14), tail=False, after=keys[-1] if keys else None) == whole


def test_chunk_keys_are_no_block_keys() -> None:
    """Keys of two kinds never meet."""
    assert block_keys(range(4), 4)[0] != chunk_keys(SPACE, range(4))[0]


@pytest.mark.parametrize("field", ["model", "dtype", "layout", "shard"])
def test_an_empty_fact_is_an_error(field: str) -> None:
    """A forgotten fact can't make two models share chunks."""
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SPACE, **{field: ""})


@pytest.mark.parametrize("media", [[Media(2, "a"), Media(1, "b")], [Media(-1, "a")], [Media(8, "a")]])
def test_media_out_of_place_is_an_error(media: list[Media]) -> None:
    """A picture that no chunk would take in is refused, not ignored."""
    with pytest.raises(ValueError, match="media"):
        chunk_keys(SPACE, range(8), media=media)
    with pytest.raises(ValueError, match="chunk_tokens"):
        dataclasses.replace(SPACE, chunk_tokens=0)
