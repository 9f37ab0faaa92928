"""Key spaces: how an engine derives its chunk keys, as it reports to the pool.

Enough to compute the keys of a prompt, except for the secret salt, which engines do not report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pdtransport.kv.keys import KeySpace, chunk_keys
from pdtransport.pool.messages import MAX_SPACE

MAX_SHARDS = 1024
_Text = Annotated[str, Field(max_length=MAX_SPACE)]


class Space(BaseModel):
    """The key space of one engine, or of several with equal settings.

    A chunk has one part, with its own key, for each of ``shards``. It is in the pool if all its parts are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: dict[str, str | int | list[str]] = Field(description="Fields of a KeySpace, but for shard and salt.")
    shards: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=MAX_SHARDS)]
    salted: bool = Field(False, description="Whether the engine has a salt, without which its keys can't be computed.")
    served: tuple[_Text, ...] = Field((), description="Names that clients use for the model.")
    tokenizer: _Text = Field("", description="The tokenizer that the engine loaded.")

    @model_validator(mode="after")
    def _is_one(self) -> Space:
        try:
            self._space(self.shards[0], "")
        except TypeError as error:
            raise ValueError(f"not a key space: {error}") from None
        return self

    @classmethod
    def of(cls, spaces: Sequence[KeySpace], **about: Any) -> Space:
        """Combine key spaces that differ in ``shard`` alone."""
        key = asdict(spaces[0])
        del key["shard"], key["salt"]
        return cls(key=key, shards=tuple(dict.fromkeys(space.shard for space in spaces)), **about)

    @property
    def model(self) -> str:
        return str(self.key["model"])

    @property
    def chunk_tokens(self) -> int:
        return int(str(self.key["chunk_tokens"]))

    def public(self) -> dict[str, Any]:
        """The fields that the HTTP API shows."""
        return {**self.key, "shards": list(self.shards), "salted": self.salted, "served": list(self.served)}

    def _space(self, shard: str, salt: str) -> KeySpace:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.key.items()}
        return KeySpace(**fields, shard=shard, salt=salt)

    def parts(self, tokens: Sequence[int], *, salt: str = "", cache_salt: str = "") -> list[list[bytes]]:
        """The keys of each whole chunk of a prompt, one key for each shard.

        Args:
            salt: the engine's (``pool.salt``).
            cache_salt: the request's.

        Raises:
            ValueError: a token id is out of range.
        """
        salted = whole_salt(salt, cache_salt)
        by_shard = [chunk_keys(self._space(shard, salted), tokens, tail=False) for shard in self.shards]
        return [list(parts) for parts in zip(*by_shard, strict=True)]


def whole_salt(engine: str, request: str) -> str:
    """Combine the engine's and the request's salts; different pairs give different results."""
    return f"{len(engine)}:{engine}{request}"


def parse_spaces(texts: Sequence[str]) -> list[Space]:
    """Parse key spaces that engines reported; invalid ones (of another version) are left out."""
    found = []
    for text in texts:
        try:
            found.append(Space.model_validate_json(text))
        except ValidationError:
            continue
    return found
