"""Content keys of tokens under a salt: equal on every host and in every process, and stable over time.

A key is a BLAKE2b hash with fixed personalisation over length-prefixed parts: no two different inputs share an
encoding, and nothing depends on ``PYTHONHASHSEED``.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KEY_BYTES = 32
MAX_TOKEN = (1 << 32) - 1  # token ids travel as u32
_REQUEST = b"pdt-request-1"  # personalisation: bump the number if the encoding ever changes
_BLOCK = b"pdt-block-1"
_CHUNK = b"pdt-chunk-1"
_ADAPTER = b"pdt-adapter-1"


def prompt_digest(tokens: Sequence[int], *, salt: str = "", extra: Sequence[str] = ()) -> bytes:
    """Digest of a whole prompt, 32 bytes.

    Args:
        tokens: token ids, each within 0 .. 2**32 - 1; any integer sequence or one-dimensional integer array.
        salt: separates tenants; the same tokens under another salt have another digest.
        extra: anything else that the KV depends on (adapters, images), in order.

    Raises:
        ValueError: a token id is out of range or not an integer.
    """
    state = _start(_REQUEST, salt, extra)
    packed = _pack(tokens)
    state.update(_length(len(packed) // 4))
    state.update(packed)
    return state.digest()


def with_adapter(prompt_digest: bytes, adapter: str) -> bytes:
    """Digest of a prompt that is computed with an adapter, 32 bytes.

    The first half comes from the prompt, the second from the adapter: a comparison shows which one differs.

    Args:
        prompt_digest: :func:`prompt_digest` of the prompt, without the adapter.
        adapter: the adapter's content digest.
    """
    half = KEY_BYTES // 2
    return prompt_digest[:half] + hashlib.blake2b(adapter.encode(), digest_size=half, person=_ADAPTER).digest()


def block_keys(tokens: Sequence[int], block_size: int, *, salt: str = "", extra: Sequence[str] = ()) -> list[bytes]:
    """Keys of the prompt's whole blocks, 32 bytes each. A block's key covers all tokens up to its end.

    Two prompts share exactly the keys of the whole blocks of their common prefix. A last partial block has no key.

    Raises:
        ValueError: ``block_size`` is below 1, or a token id is out of range or not an integer.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}, it must be at least 1")
    root = _start(_BLOCK, salt, extra)
    root.update(_length(block_size))
    key = root.digest()
    packed, step = memoryview(_pack(tokens)), 4 * block_size
    keys = []
    for end in range(step, len(packed) + 1, step):
        state = hashlib.blake2b(key, digest_size=KEY_BYTES, person=_BLOCK)
        state.update(packed[end - step : end])
        key = state.digest()
        keys.append(key)
    return keys


@dataclass(frozen=True)
class KeySpace:
    """Everything that the bytes of a stored chunk depend on besides its tokens. Key spaces never share a chunk.

    ``shard`` names the part of the model's KV that a chunk holds ("heads 0-4 of 8, layers 0-32"): workers of different
    tensor-parallel sizes find each other's chunks if their shards are the same. ``salt`` separates tenants. ``codec``
    names a lossy codec that chunks may have passed through; empty: their bytes are exact.

    Raises:
        ValueError: ``model``, ``dtype``, ``layout`` or ``shard`` is empty, or ``chunk_tokens`` is below 1.
    """

    model: str
    revision: str
    dtype: str
    layout: str
    shard: str
    chunk_tokens: int
    lora: str = ""
    salt: str = ""
    extra: tuple[str, ...] = ()
    codec: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "dtype", "layout", "shard"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: chunks of different {name}s would be taken for one another")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}, it must be at least 1")


class Media(NamedTuple):
    """An image or sound in the prompt: index of its first placeholder token, and the hash of its content."""

    first_token: int
    content: str


def chunk_keys(
    space: KeySpace,
    tokens: Sequence[int],
    *,
    media: Sequence[Media] = (),
    tail: bool = True,
    after: bytes | None = None,
) -> list[bytes]:
    """Storage keys of the prompt's chunks, 32 bytes each. A chunk's key covers all tokens up to its end.

    Two prompts share exactly the keys of the chunks of their common prefix; different media change the keys from the
    chunk in which they begin. A last partial chunk has the key of just its tokens: a longer prompt does not find it.

    Args:
        media: in order of ``first_token``.
        tail: whether a last partial chunk gets a key.
        after: key of the whole chunk before ``tokens``; None: ``tokens`` begin the prompt.

    Raises:
        ValueError: a token id is out of range or not an integer, or ``media`` is out of order or outside ``tokens``.
    """
    packed = memoryview(_pack(tokens))
    places = [piece.first_token for piece in media]
    if places != sorted(places) or (places and not 0 <= places[0] <= places[-1] < len(packed) // 4):
        raise ValueError(f"media must begin within the {len(packed) // 4} tokens, in order, not at {places}")
    facts = (space.model, space.revision, space.dtype, space.layout, space.shard, space.lora, *space.extra)
    root = _start(_CHUNK, space.salt, facts)
    root.update(_length(space.chunk_tokens))
    if space.codec:  # last, so that keys of exact chunks stay as they were before there were codecs
        _feed(root, space.codec)
    key, keys, seen = root.digest() if after is None else after, [], 0
    for first in range(0, len(packed) // 4, space.chunk_tokens):
        piece = packed[4 * first : 4 * (first + space.chunk_tokens)]
        if len(piece) < 4 * space.chunk_tokens and not tail:
            break
        state = hashlib.blake2b(key, digest_size=KEY_BYTES, person=_CHUNK)
        state.update(_length(len(piece) // 4))
        state.update(piece)
        while seen < len(media) and places[seen] < first + space.chunk_tokens:
            state.update(_length(places[seen] - first))
            _feed(state, media[seen].content)
            seen += 1
        key = state.digest()
        keys.append(key)
    return keys


def _start(person: bytes, salt: str, extra: Sequence[str]) -> hashlib.blake2b:
    """A hash over salt and extras, each prefixed with its length."""
    state = hashlib.blake2b(digest_size=KEY_BYTES, person=person)
    _feed(state, salt)
    state.update(_length(len(extra)))
    for part in extra:
        _feed(state, part)
    return state


def _feed(state: hashlib.blake2b, text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    state.update(_length(len(raw)))
    state.update(raw)


def _length(count: int) -> bytes:
    return count.to_bytes(8, "little")


def _pack(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32."""
    if isinstance(tokens, np.ndarray):
        return _pack_array(tokens)
    try:
        packed = array("I", tokens)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers within 0..{MAX_TOKEN}: {error}") from None
    if packed.itemsize != 4:  # on exotic ABIs only
        return _pack_array(np.asarray(tokens))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _pack_array(tokens: np.ndarray) -> bytes:
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(f"token ids must be one row of integers, not {tokens.dtype} of shape {tokens.shape}")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > MAX_TOKEN):
        raise ValueError(f"token ids must be integers within 0..{MAX_TOKEN}")
    return tokens.astype("<u4").tobytes()
