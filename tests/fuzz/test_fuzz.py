"""What arrives from outside never crashes what reads it. Long runs: ``python -m tests.fuzz``."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.fuzz.seeds import mutated, seeds
from tests.fuzz.targets import TARGETS, target

TRIES = {"wire": 6000, "exports": 6000, "topology": 500, "http": 150, "pool": 300, "params": 500}


def found(name: str) -> Callable[[bytes], None]:
    if name == "params":
        pytest.importorskip("vllm")
    return target(name)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_kept_input_passes(name: str) -> None:
    """Well-formed inputs, and each that ever found a bug."""
    run = found(name)
    for data in seeds(name):
        try:
            run(data)
        except BaseException as error:
            raise AssertionError(f"{name}: {data!r}") from error


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_changed_inputs_end_in_the_errors_that_are_promised(name: str) -> None:
    run = found(name)
    inputs, chance = seeds(name), random.Random(1)
    for _ in range(TRIES[name]):
        data = mutated(inputs, chance)
        try:
            run(data)
        except BaseException as error:
            raise AssertionError(f"{name}: {data!r}") from error
