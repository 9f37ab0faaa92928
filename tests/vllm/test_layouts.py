"""Families of models whose caches are laid out in their own ways, each by a tiny model with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.layouts.families import FAMILIES, Family
from tests.layouts.trial import ENOUGH, TOLERANCE, try_family
from tests.rig.device import PLACE

CI = {"Gemma 4", "gpt-oss", "Llama 4", "DeepSeek V3"}  # windows, sinks, chunks, latent attention
REFUSED = {"Whisper": "CrossAttentionSpec"}
NO_ANSWERS = {"embedding model"}
SUPPORTED = [family for family in FAMILIES if family.name not in {*REFUSED, *NO_ANSWERS}]

pytestmark = pytest.mark.skipif(PLACE.gpu, reason="breaks pages in host memory")


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=() if each.name in CI else pytest.mark.long, id=each.name) for each in SUPPORTED],
)
def test_a_family_is_handed_over_whole(family: Family, tmp_path: Path) -> None:
    """Tokens and log-probabilities are those that decode computes alone, at every edge of block, window and chunk; and
    one broken page of any group would show."""
    row = try_family(family, tmp_path / "trial", quick=True)
    assert (row.plain, row.refused, row.failed) == ("yes", "", []), row
    assert row.tokens
    assert not row.tokens.startswith("no"), row
    assert float(row.logprobs) <= TOLERANCE, row
    assert all(row.pages), row
    assert len(row.control) == len(row.groups), row
    assert min(row.control) >= ENOUGH, row
