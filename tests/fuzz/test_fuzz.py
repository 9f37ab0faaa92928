"""What arrives from outside never crashes what reads it. Long runs: ``python -m tests.fuzz``."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.seeds import mutated, seeds
from tests.fuzz.targets import TARGETS

TRIES = {"wire": 6000, "exports": 6000, "topology": 500}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_kept_input_passes(target: str) -> None:
    """Well-formed inputs, and each that ever found a bug."""
    for data in seeds(target):
        TARGETS[target](data)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_changed_inputs_end_in_the_errors_that_are_promised(target: str) -> None:
    inputs, chance = seeds(target), random.Random(1)
    for _ in range(TRIES[target]):
        data = mutated(inputs, chance)
        try:
            TARGETS[target](data)
        except BaseException as error:
            raise AssertionError(f"{target}: {data!r}") from error
