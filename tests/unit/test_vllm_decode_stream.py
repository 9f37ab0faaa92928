"""The detokenizer that looks at a prompt's end alone gives the text that it gives after all of the prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

pytest.importorskip("vllm")
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import detokenizer as theirs

from pdtransport.settings import Settings
from pdtransport.vllm.patches.decode_stream import KEPT, shorten_priming
from tests.rig.servers import TINY_LM

PLAIN = theirs.FastIncrementalDetokenizer.__init__


def tiny_lm() -> Tokenizer:
    return Tokenizer.from_file(str(Path(TINY_LM) / "tokenizer.json"))


def byte_fallback() -> Tokenizer:
    """As SentencePiece's: unknown characters in bytes, words begin with a mark, the first one's space is dropped."""
    words = {f"▁{word}": n for n, word in enumerate(("the", "page", "of", "a", "prompt", "crosses"))}
    pieces = {**words, **{f"<0x{byte:02X}>": 100 + byte for byte in range(256)}, "s": 400, "▁": 401, "<unk>": 402}
    made = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def word_pieces() -> Tokenizer:
    vocab = {word: n for n, word in enumerate(("[UNK]", "page", "##s", "##ing", ".", ",", "do", "n't", "'", "we", "!"))}
    made = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens([AddedToken("[SEP]", special=True)])
    return made


def text(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int], skip_special: bool) -> list[str]:
    """What each of the answer's tokens adds."""
    params = SamplingParams(skip_special_tokens=skip_special)
    request: Any = SimpleNamespace(request_id="r", prompt_token_ids=list(prompt), sampling_params=params)
    detokenizer = theirs.FastIncrementalDetokenizer(SimpleNamespace(_tokenizer=tokenizer), request)  # type: ignore[arg-type]
    return [detokenizer.decode_next(token) for token in answer]


@pytest.fixture
def shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs.FastIncrementalDetokenizer, "__init__", PLAIN)
    assert shorten_priming(Settings())
    assert shorten_priming(Settings()), "a second call is as good as the first"


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("make", [tiny_lm, byte_fallback, word_pieces])
def test_the_same_text_token_by_token(make: Any, skip_special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For prompts that end anywhere, within a character too, and for answers of any tokens."""
    tokenizer = make()
    ids = sorted(tokenizer.get_vocab().values())
    dice = random.Random(7)
    cases = [
        ([dice.choice(ids) for _ in range(dice.randrange(1, 5 * KEPT))], [dice.choice(ids) for _ in range(24)])
        for _ in range(150)
    ]
    plain = [text(tokenizer, prompt, answer, skip_special) for prompt, answer in cases]
    monkeypatch.setattr(theirs.FastIncrementalDetokenizer, "__init__", PLAIN)
    shorten_priming(Settings())
    assert [text(tokenizer, prompt, answer, skip_special) for prompt, answer in cases] == plain


class Counting:
    """A stream that remembers what it was primed with."""

    primed: ClassVar[list[int]] = []

    def __init__(self, ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        type(self).primed.append(len(ids))


@pytest.mark.usefixtures("shortened")
def test_a_long_prompt_is_not_decoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the text's equality would show nothing."""
    monkeypatch.setattr(theirs.tokenizers.decoders, "DecodeStream", Counting)
    monkeypatch.setattr(Counting, "primed", [])
    long = tiny_lm().encode("Pages cross from prefill to decode. " * 100).ids
    text(tiny_lm(), long, [], True)
    assert Counting.primed == [len(long), KEPT]
    text(tiny_lm(), long[: 2 * KEPT], [], True)
    assert Counting.primed[2:] == [2 * KEPT], "a short one is taken as it is"


@pytest.mark.usefixtures("shortened")
def test_a_prompt_that_ends_within_a_character_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_fallback()
    monkeypatch.setattr(theirs.tokenizers.decoders, "DecodeStream", Counting)
    monkeypatch.setattr(Counting, "primed", [])
    text(tokenizer, [1] * 200 + [100 + 0xE2], [], True)
    assert Counting.primed == [201]


@pytest.mark.usefixtures("shortened")
def test_prompts_without_tokens_pass() -> None:
    """A prompt of embeddings has no ids."""
    detokenizer: Any = SimpleNamespace(stream=None)
    from pdtransport.vllm.patches.decode_stream import _shorten

    _shorten(detokenizer, SimpleNamespace(prompt_token_ids=None))
    assert detokenizer.stream is None
