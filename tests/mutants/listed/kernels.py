"""Bugs in the C kernels."""

from __future__ import annotations

from tests.mutants.place import Mutant, bugs

BUGS: list[Mutant] = [
    *bugs(
        "kernels/csrc/stripes.h",
        "kernels",
        (
            "checksum_finds_swapped_stripes_equal",
            "stripe_value",
            "plain + number * GOLDEN",
            "plain",
            "every_instruction_set_gives_the_same_checksum",
        ),
    ),
]
