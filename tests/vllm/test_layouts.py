"""Families of models whose caches are laid out in their own ways, each by a tiny model with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.layouts.families import FAMILIES, Family
from tests.layouts.trial import ENOUGH, TOLERANCE, try_family
from tests.rig.device import PLACE

CI = {"Gemma 4", "gpt-oss", "Llama 4", "Mixtral"}  # windows with pages of other sizes, sinks, chunks, experts
REFUSED = {"Whisper": "CrossAttentionSpec"}
# vLLM's latent attention on CPUs contradicts itself; torchvision, which need not be there; no tokens.
LEFT_OUT = {"DeepSeek V3", "Qwen2-VL", "embedding model"}
SUPPORTED = [family for family in FAMILIES if family.name not in {*REFUSED, *LEFT_OUT}]

pytestmark = pytest.mark.skipif(PLACE.gpu, reason="breaks pages in host memory")


def _in_ci(family: Family) -> object:
    return pytest.param(family, marks=pytest.mark.more if family.name in CI else pytest.mark.long, id=family.name)


@pytest.mark.parametrize("family", map(_in_ci, SUPPORTED))
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


@pytest.mark.long
@pytest.mark.parametrize("family", [each for each in FAMILIES if each.name in REFUSED], ids=lambda each: each.name)
def test_a_family_is_refused_with_our_reason(family: Family, tmp_path: Path) -> None:
    """Its servers end with one line that names what can't be moved."""
    row = try_family(family, tmp_path / "trial")
    assert row.plain == "yes", row
    assert REFUSED[family.name] in row.refused, row
    assert "--kv-transfer-config" in row.refused, row
