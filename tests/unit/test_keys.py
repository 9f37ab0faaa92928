"""Content keys: the same for ever and everywhere; different for whatever differs."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdtransport.kv.keys import KEY_BYTES, MAX_TOKEN, block_keys, prompt_digest

# a busy machine is no fault of the code
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

tokens_ = st.lists(st.integers(0, MAX_TOKEN), max_size=70)

# Written down once. If one of these changes, nothing that was stored under old keys is found again, and two versions
# of pdtransport refuse each other's requests: bump the personalisation in keys.py and the protocol version instead.
GOLDEN = [
    (([], "", ()), "d61587d18395fc8d654958641884b5466794b577c8ebcafdb602611948fb1b39"),
    (([0, 1, 2, 3, 4], "", ()), "0ed30bb2c86a811798ebce9ff69fcf069ccd46182d1b4ac18ba1dc58f097f4f5"),
    (([1, 2, 3], "t", ("a", "b")), "81bb266722d3a06f503172db8b753e1181e4cbc4e822730c9dea835138643972"),
]
GOLDEN_BLOCKS = [
    "6c062d07eccef7dcafaeb242302706df4b4102c1c53b45739cc903b52960a4a5",
    "db00c4709f01abf6a858d33b8f60d314f99f0a5310c3c875337f60df1f2110bb",
]


@pytest.mark.parametrize(("given_", "wanted"), GOLDEN)
def test_golden_prompt_digests(given_: tuple[list[int], str, tuple[str, ...]], wanted: str) -> None:
    tokens, salt, extra = given_
    assert prompt_digest(tokens, salt=salt, extra=extra).hex() == wanted


def test_golden_block_keys() -> None:
    assert [key.hex() for key in block_keys(range(8), 4)] == GOLDEN_BLOCKS
    assert [key.hex() for key in block_keys(range(11), 4)] == GOLDEN_BLOCKS


def test_keys_do_not_depend_on_the_hash_seed() -> None:
    script = "from pdtransport.kv.keys import *; print(prompt_digest([1, 2], salt='s', extra=('x',)).hex())"
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
    assert found == {prompt_digest([1, 2], salt="s", extra=("x",)).hex() + "\n"}


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda t: np.array(t, dtype=np.int32), lambda t: np.array(t)[:]]
)
def test_the_container_does_not_matter(kind: type) -> None:
    tokens = [5, 0, 31999, 128000]
    assert prompt_digest(kind(tokens)) == prompt_digest(tokens)
    assert block_keys(kind(tokens), 2) == block_keys(tokens, 2)


def test_a_strided_array_is_hashed_by_its_values() -> None:
    assert prompt_digest(np.arange(20)[::2]) == prompt_digest(range(0, 20, 2))


@PATIENT
@given(tokens_, tokens_, st.text(max_size=4), st.text(max_size=4))
def test_whatever_differs_has_another_key(a: list[int], b: list[int], salt: str, other: str) -> None:
    assert (prompt_digest(a, salt=salt) == prompt_digest(b, salt=other)) == ((a, salt) == (b, other))
    assert len(prompt_digest(a)) == KEY_BYTES


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"salt": "ab"}, {"extra": ("ab",)}),
        ({"extra": ("ab",)}, {"extra": ("a", "b")}),
        ({"extra": ("a", "")}, {"extra": ("a",)}),
        ({"salt": "a", "extra": ("b",)}, {"salt": "ab"}),
        ({"extra": ("\x01\0\0\0",)}, {}),
        ({"extra": ("a", "b")}, {"extra": ("b", "a")}),
    ],
)
def test_parts_can_not_be_mistaken_for_one_another(one: dict, other: dict) -> None:
    assert prompt_digest([1], **one) != prompt_digest([1], **other)
    assert block_keys([1], 1, **one) != block_keys([1], 1, **other)


@PATIENT
@given(tokens_, tokens_, tokens_, st.integers(1, 9))
def test_prompts_share_the_block_keys_of_their_common_prefix_only(
    prefix: list[int], a: list[int], b: list[int], block: int
) -> None:
    one, other = block_keys(prefix + a, block), block_keys(prefix + b, block)
    assert len(one) == (len(prefix) + len(a)) // block
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        end = (index + 1) * block
        assert (left == right) == ((prefix + a)[:end] == (prefix + b)[:end])


def test_a_block_key_is_no_prompt_digest_and_depends_on_the_block_size() -> None:
    assert block_keys([1], 1)[0] != prompt_digest([1])
    assert block_keys([1, 2], 1)[-1] != block_keys([1, 2], 2)[-1]
    assert block_keys([1, 2], 2, salt="a") != block_keys([1, 2], 2, salt="b")


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [MAX_TOKEN + 1],
        [1.5],
        ["1"],
        [None],
        np.array([-1]),
        np.array([1 << 32]),
        np.array([1.0]),
        np.array([[1]]),
    ],
)
def test_what_is_no_token_is_an_error(tokens: list) -> None:
    with pytest.raises(ValueError, match="token ids must be"):
        prompt_digest(tokens)
    with pytest.raises(ValueError, match="token ids must be"):
        block_keys(tokens, 1)


def test_a_block_of_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="block_size"):
        block_keys([1], 0)


def test_the_largest_token_is_a_token() -> None:
    assert prompt_digest([MAX_TOKEN]) == prompt_digest(np.array([MAX_TOKEN], dtype=np.uint64))
