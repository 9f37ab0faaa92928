"""The pool's index and frames: what was put in is found, in any order of coming and going."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdtransport.pool.core.frames import Frames, frame_runs, frames_for
from pdtransport.pool.core.index import Index, key_rows

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


@PATIENT
@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 30), max_size=8)), max_size=30))
def test_many_are_added_and_removed_at_once(steps: list[tuple[bool, set[int]]]) -> None:
    """As one by one; what does not fit as a whole changes nothing; a new entry's columns are zero."""
    index, model = Index(16), {}
    for adding, numbers in steps:
        if adding:
            new = sorted(numbers - model.keys())
            rows = key_rows(b"".join(map(key, new)))
            if len(model) + len(new) > 16:
                with pytest.raises(IndexError, match="no room"):
                    index.add_all(rows)
            else:
                entries = index.add_all(rows)
                assert not any(index.nbytes[entry] or index.tiers[entry] for entry in entries)
                model.update(zip(new, entries, strict=True))
                index.nbytes_column[entries], index.tier_column[entries] = 5, 1
        elif old := numbers & model.keys():
            index.remove_all([model.pop(number) for number in old])
    asked = key_rows(b"".join(map(key, range(31))))
    assert index.find(asked).tolist() == [model.get(number, -1) for number in range(31)]
    assert len(index) == len(model)


@PATIENT
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=120))
def test_the_index_is_a_dictionary(steps: list[tuple[bool, int]]) -> None:
    """After any adds and removes, exactly the keys that are in are found, each under the entry it was given."""
    index, model = Index(16), {}
    for adding, number in steps:
        if number in model and not adding:
            index.remove(model.pop(number))
        elif number not in model and adding:
            if len(model) == 16:
                with pytest.raises(IndexError, match="full"):
                    index.add(key(number))
            else:
                model[number] = index.add(key(number))
                index.nbytes[model[number]] = number + 1
    asked = key_rows(b"".join(map(key, range(31))))
    assert index.find(asked).tolist() == [model.get(number, -1) for number in range(31)]
    with pytest.MonkeyPatch.context() as patch:  # the same in numpy
        patch.setattr("pdtransport.pool.core.index._C", None)
        assert index.find(asked).tolist() == [model.get(number, -1) for number in range(31)]
    assert len(index) == len(model)
    for number, entry in model.items():
        assert index.key(entry) == key(number)
        assert index.nbytes[entry] == number + 1


@pytest.mark.parametrize("at_once", [False, True])
def test_an_entry_that_is_used_again_knows_nothing_of_the_key_before(at_once: bool) -> None:
    """No chunk inherits another one's codec, pins or tenant: who stores exact bytes never gets lossy ones."""
    index = Index(1)
    columns = (index.tiers, index.nbytes, index.checksum, index.refs, index.state, index.pin, index.form, index.group)
    entry = index.add(key(1))
    for column in columns:
        column[entry] = 1
    if at_once:
        index.remove_all([entry])
    else:
        index.remove(entry)
    assert index.add(key(2)) == entry
    assert [column[entry] for column in columns] == [0] * len(columns)


def test_keys_that_share_words_are_told_apart() -> None:
    """All 32 bytes count: keys that agree in their first 24 are different keys."""
    index = Index(64)
    keys = [bytes(24) + number.to_bytes(8, "little") for number in range(64)]
    entries = [index.add(each) for each in keys]
    assert index.find(key_rows(b"".join(keys))).tolist() == entries
    for gone in (0, 63, 31):
        index.remove(entries[gone])
        entries[gone] = -1
    assert index.find(key_rows(b"".join(keys))).tolist() == entries


@pytest.mark.parametrize("numpy", [False, True])
def test_a_prefix_ends_where_a_key_is_in_no_tier_that_counts(numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are counted up to the first that is not there, or only in tiers out of reach; those in memory, apart."""
    if numpy:
        monkeypatch.setattr("pdtransport.pool.core.index._C", None)
    index = Index(64)
    for number, tiers in enumerate((1, 3, 2, 1, 4, 1, 0)):
        index.tiers[index.add(key(number))] = tiers
    rows = key_rows(b"".join(map(key, range(8))))
    assert index.prefix(rows, 7, 1) == (6, 4)
    assert index.prefix(rows, 3, 1) == (4, 3)
    assert index.prefix(rows, 1, 1) == (2, 2)
    assert index.prefix(rows[6:], 7, 1) == index.prefix(rows[7:], 7, 1) == index.prefix(rows[:0], 7, 1) == (0, 0)


@pytest.mark.parametrize("shift", [0, 64, 128, 192])
def test_chosen_keys_do_not_fall_into_one_chain(shift: int) -> None:
    """A client that counts its keys up, in whichever word, does not slow the others' lookups down."""
    index = Index(4096)
    for number in range(4096):
        index.add((number << shift).to_bytes(32, "little"))
    assert longest_chain(index) < 64


def longest_chain(index: Index) -> int:
    chains = np.bincount(index._buckets(index._keys).astype(np.int64))
    return int(chains.max())


def test_what_is_no_row_of_keys_is_an_error() -> None:
    """A cut-off key is not padded to another one."""
    with pytest.raises(ValueError, match="multiple"):
        key_rows(bytes(33))
    assert len(Index(1).find(key_rows(b""))) == 0


def test_frames_are_given_to_one_owner_at_a_time() -> None:
    """Whatever comes and goes, no frame has two owners, and all can be had again: nothing is lost to fragmentation."""
    chance, frames, owned = random.Random(1), Frames(64), []
    for _ in range(2000):
        if owned and chance.random() < 0.5:
            frames.give_back(owned.pop(chance.randrange(len(owned))))
        else:
            got = frames.take(chance.randint(1, 20))
            if got is not None:
                owned.append(got)
        ids = np.frombuffer(b"".join(owned), dtype=np.uint32)
        assert len(set(ids.tolist())) == len(ids) == 64 - frames.free
    for each in owned:
        frames.give_back(each)
    assert frames.take(64) is not None
    with pytest.raises(ValueError, match="more frames"):
        Frames(1).give_back(bytes(4))


def test_runs_of_chunks_end_where_the_chunks_do() -> None:
    """Each chunk covers exactly its bytes; frames that don't fit the sizes are an error."""
    ids = np.array([3, 0, 9], dtype=np.uint32).tobytes()
    assert frame_runs(1000, ids, 4096, [4096 + 8, 16]).tolist() == [
        [1000 + 3 * 4096, 4096],
        [1000, 8],
        [1000 + 9 * 4096, 16],
    ]
    with pytest.raises(ValueError, match="frames"):
        frame_runs(0, ids, 4096, [8])
    assert frames_for(1, 4096) == 1
    assert frames_for(4097, 4096) == 2
