"""Which pages of vLLM's KV cache can be moved as they lie: all others are refused at start, by name of the layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from pdtransport.errors import SettingsError  # noqa: E402
from pdtransport.vllm.geometry import _geometry  # noqa: E402

BLOCKS, TOKENS, CONTENT = 5, 4, 8
CONFIG: Any = SimpleNamespace(model_config=SimpleNamespace(get_total_num_kv_heads=lambda: 2))


def cache(heads: int, padded: bool, tokens_first: bool = False) -> Any:
    """``[blocks, heads, tokens, content]``; ``padded``: four more elements behind each token's content."""
    width = CONTENT + 4 if padded else CONTENT
    if tokens_first:
        return torch.zeros(BLOCKS, TOKENS, heads, width)[..., :CONTENT].transpose(1, 2)
    return torch.zeros(BLOCKS, heads, TOKENS, width)[..., :CONTENT]


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_dense_pages_are_taken_as_they_lie(heads: int, tokens_first: bool) -> None:
    """Both orders of heads and tokens, and one head, where the order means nothing."""
    made = _geometry({"layer": cache(heads, False, tokens_first)}, CONFIG, 0, 1)
    assert (made.heads, made.block_size, made.slot_bytes) == (heads, TOKENS, CONTENT * 4)
    assert made.heads_first is (heads == 1 or not tokens_first)


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_pages_with_gaps_are_refused(heads: int, tokens_first: bool) -> None:
    """Bytes between two tokens would be moved in place of the next token's. With one head (latent attention), too."""
    with pytest.raises(SettingsError, match="layer layer has KV pages of shape"):
        _geometry({"layer": cache(heads, True, tokens_first)}, CONFIG, 0, 1)
