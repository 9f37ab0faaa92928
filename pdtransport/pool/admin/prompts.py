"""Finds the chunks of a prompt, and the tiers that they are in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdtransport.pool.admin.pool_admin import AdminError, AdminOutcome, Chosen, PoolAdmin
from pdtransport.pool.core.key_spaces import Space

MAX_TOKENS = 1 << 22  # of a prompt


@dataclass(frozen=True)
class PoolPrompt:
    """A prompt's token ids, and what else its chunk keys depend on.

    Attributes:
        model: any name of the model; None: the only model that uses the pool.
        salt: the engine's (``pool.salt``).
        cache_salt: the request's.
    """

    tokens: Sequence[int]
    model: str | None = None
    salt: str = ""
    cache_salt: str = ""

    def __repr__(self) -> str:
        return f"PoolPrompt({len(self.tokens)} tokens)"  # keeps salts and token ids out of logs


@dataclass(frozen=True)
class PromptFound:
    """A prompt's whole chunks under one key space.

    ``tiers``: for each chunk, the slowest tier that a load of it must read from; "" if a part of the chunk is missing.
    """

    space: Space
    tokens: int
    tiers: tuple[str, ...]

    @property
    def there(self) -> int:
        """Number of leading chunks that are in the pool: the prefix that an engine finds."""
        return next((n for n, tier in enumerate(self.tiers) if not tier), len(self.tiers))

    def public(self) -> dict[str, Any]:
        return {
            "model": self.space.model,
            "dtype": self.space.key["dtype"],
            "codec": self.space.key.get("codec", ""),
            "shards": len(self.space.shards),
            "chunk_tokens": self.space.chunk_tokens,
            "prompt_tokens": self.tokens,
            "chunks": len(self.tiers),
            "there": self.there,
            "tokens_there": self.there * self.space.chunk_tokens,
            "by_tier": dict(Counter(tier for tier in self.tiers[: self.there])),
            "tiers": list(self.tiers),
        }


def spaces_for(admin: PoolAdmin, prompt: PoolPrompt) -> list[Space]:
    """The key spaces under which the prompt's chunks may be stored.

    Raises:
        AdminError: there are none, several models match, or the salt is missing or not wanted; the text says what to
            do.
    """
    known = admin.spaces()
    if not known:
        raise AdminError(
            "no engine has reported its key space to this pool: start one that uses it, or choose chunks by key"
        )
    names = {space.model for space in known}
    found = [space for space in known if prompt.model in (None, space.model, *space.served)]
    if not found or (prompt.model is None and len(names) > 1):
        wrong = (
            (f"no engine of model {prompt.model!r} has reported its key space")
            if prompt.model
            else "there are several models"
        )
        raise AdminError(f"{wrong}; choose one: {', '.join(sorted(names))}")
    fitting = [space for space in found if space.salted == bool(prompt.salt)]
    if not fitting:
        raise AdminError(
            "no engine of this model has a salt: leave the salt out"
            if prompt.salt
            else "this model's chunks have a salt: pass the salt of the engines' pool.salt_file"
        )
    return fitting


def _parts(space: Space, prompt: PoolPrompt) -> list[list[bytes]]:
    if len(prompt.tokens) > MAX_TOKENS:
        raise AdminError(f"a prompt of {len(prompt.tokens)} tokens; at most {MAX_TOKENS} are looked up")
    try:
        return space.parts(prompt.tokens, salt=prompt.salt, cache_salt=prompt.cache_salt)
    except ValueError as error:
        raise AdminError(str(error)) from None


def find(admin: PoolAdmin, prompt: PoolPrompt) -> list[PromptFound]:
    """Find the prompt's chunks; returns one result for each matching key space.

    Raises:
        AdminError: as :func:`spaces_for`.
    """
    found = []
    for space in spaces_for(admin, prompt):
        parts = _parts(space, prompt)
        places = iter(admin.look([key for chunk in parts for key in chunk]))
        order = admin.tier_names
        tiers = []
        for chunk in parts:
            fastest = [place.tiers[0] if place.tiers else "" for place in (next(places) for _ in chunk)]
            tiers.append("" if "" in fastest else max(fastest, key=order.index))
        found.append(PromptFound(space, len(prompt.tokens), tuple(tiers)))
    return found


def hint(admin: PoolAdmin, prompt: PoolPrompt) -> AdminOutcome:
    """Begin to read into memory what a request with this prompt will load, and don't wait.

    Returns:
        ``of``: parts of chunks that the request will load and that are below memory; ``done``: those whose read has
        begun.

    Raises:
        AdminError: as :func:`spaces_for`.
    """
    begun = of = 0
    for space in spaces_for(admin, prompt):
        parts = _parts(space, prompt)
        places = iter(admin.look([key for chunk in parts for key in chunk]))
        below: list[bytes] = []
        for chunk in parts:
            found = [next(places) for _ in chunk]
            if not all(place.tiers for place in found):
                break
            below += [place.key for place in found if "memory" not in place.tiers]
        of += len(below)
        begun += admin.hint(below)
    return AdminOutcome(begun, of)


def chunks_of(admin: PoolAdmin, prompt: PoolPrompt) -> Chosen:
    """Choose all parts of the prompt's whole chunks.

    Raises:
        AdminError: as :func:`spaces_for`; or the prompt has no whole chunk.
    """
    spaces = spaces_for(admin, prompt)
    keys = [key for space in spaces for chunk in _parts(space, prompt) for key in chunk]
    if not keys:
        raise AdminError(
            f"the prompt of {len(prompt.tokens)} tokens is shorter than a chunk ({spaces[0].chunk_tokens} tokens)"
        )
    return Chosen(tuple(dict.fromkeys(keys)))
