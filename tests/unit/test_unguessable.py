"""Transfer ids that we make are capabilities: nobody can name a transfer of others by guessing."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pdtransport.engine.params import parse
from pdtransport.router.attempt import Attempt

IDS, BITS = 1000, 128


def of_the_router() -> str:
    unused: Any = None
    dispatch: Any = SimpleNamespace(first=None, prefill=None, decode=SimpleNamespace(begin=lambda tokens: None))
    return Attempt(dispatch, 0, unused, unused, unused, unused, unused).transfer_id


def of_prefill() -> str:
    produce = parse({"do_remote_decode": True}, producer=True, consumer=False).produce
    assert produce is not None
    return str(produce.transfer_id)


MAKERS = [of_the_router, of_prefill]


@pytest.mark.parametrize("make", MAKERS)
def test_an_id_has_128_bits_of_which_none_can_be_known(make: Callable[[], str]) -> None:
    """Neither a seed of the usual generators nor earlier ids tell anything of it, bit by bit."""
    made = []
    for _ in range(IDS):
        random.seed(7)
        np.random.seed(7)
        made.append(make())
    assert len(set(made)) == IDS
    assert all(re.fullmatch(rf"[0-9a-f]{{{BITS // 4}}}", each) for each in made)
    numbers = [int(each, 16) for each in made]
    for bit in range(BITS):
        for values in (numbers, [a ^ b for a, b in itertools.pairwise(numbers)]):
            share = sum(value >> bit & 1 for value in values) / len(values)
            assert 0.4 < share < 0.6, f"bit {bit} is 1 in {share:.0%}"  # 6 standard deviations
