"""Keeps vLLM's API server from detokenizing a whole prompt before it sends the first output token.

``DecodeStream`` decodes all the ids it is primed with when the first token arrives, twice: 13 ms for a prompt of 16,000
tokens, during which the server forwards no tokens of other requests either. The stream needs the prompt only to
separate new text from the end of the prompt's text, and the last tokens suffice for that. Without this hook the first
token of an answer to a long prompt comes that much later.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from pdtransport.settings import Settings
from pdtransport.vllm.patches.base import Patch, expect

logger = logging.getLogger(__name__)

KEPT = 64  # tokens. A character spans a few at most, and decoders look at no more than a word around a token
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def _check() -> None:
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    expect(
        FastIncrementalDetokenizer.__init__,
        takes=["self", "tokenizer", "request"],
        uses=["DecodeStream", "ids", "prompt_token_ids", "stream", "skip_special_tokens", "tokenizer"],
    )
    expect(FastIncrementalDetokenizer.decode_next, takes=["self", "next_token_id"])


PATCH = Patch(
    "short_priming",
    _check,
    setting="short_priming",
    costs="the first token of an answer to 16,000 tokens leaves up to 13 ms later",
)


def shorten_priming(settings: Settings) -> bool:
    """Prime this process's detokenizers with only the last :data:`KEPT` tokens of a prompt.

    Output text does not change: if the last tokens decode to nothing or end within a character, the whole prompt is
    used.

    Returns:
        False if nothing was patched: the hook is switched off, or vLLM is not as expected.
    """
    if not PATCH.allowed(settings):
        return False
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    original = FastIncrementalDetokenizer.__init__
    if getattr(original, "shortens_priming", False):
        return True

    @functools.wraps(original)
    def primed(self: Any, tokenizer: Any, request: Any) -> None:
        original(self, tokenizer, request)
        _shorten(self, request)

    primed.shortens_priming = True  # type: ignore[attr-defined]
    FastIncrementalDetokenizer.__init__ = primed  # type: ignore[method-assign]
    return True


def _shorten(detokenizer: Any, request: Any) -> None:
    ids = request.prompt_token_ids
    if ids is None or len(ids) <= 2 * KEPT or not hasattr(detokenizer, "stream"):
        return
    try:
        last, skip = list(ids[-KEPT:]), detokenizer.skip_special_tokens
        text = detokenizer.tokenizer.decode(last, skip_special_tokens=skip)
        if text and not text.endswith(UNFINISHED):
            detokenizer.stream = type(detokenizer.stream)(ids=last, skip_special_tokens=skip)
    except (AttributeError, OverflowError, TypeError) as error:  # another kind of stream, or invalid token ids
        logger.debug("a prompt of %d tokens stays whole: %s", len(ids), error)
