"""Of what an engine's keys are made, as it tells the pool: enough to look a prompt up, without the secret salt."""

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
    """One engine's, or that of several alike. A chunk has a part for each of ``shards``; it is there if all are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: dict[str, str | int | list[str]] = Field(description="Fields of a KeySpace, but for shard and salt.")
    shards: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=MAX_SHARDS)]
    salted: bool = Field(False, description="Whether the engine has a salt of its own; who has not, can't find keys.")
    served: tuple[_Text, ...] = Field((), description="Names that clients use for the model.")
    tokenizer: _Text = Field("", description="Where the engine has its tokenizer from.")

    @model_validator(mode="after")
    def _is_one(self) -> Space:
        try:
            self._space(self.shards[0], "")
        except TypeError as error:
            raise ValueError(f"no key space: {error}") from None
        return self

    @classmethod
    def of(cls, spaces: Sequence[KeySpace], **about: Any) -> Space:
        """Of parts of the same chunks."""
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
        """For people."""
        return {**self.key, "shards": list(self.shards), "salted": self.salted, "served": list(self.served)}

    def _space(self, shard: str, salt: str) -> KeySpace:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.key.items()}
        return KeySpace(**fields, shard=shard, salt=salt)

    def parts(self, tokens: Sequence[int], *, salt: str = "", cache_salt: str = "") -> list[list[bytes]]:
        """For each whole chunk of a prompt, the keys of its parts.

        Args:
            salt: the engine's own (``pool.salt``).
            cache_salt: of the request.

        Raises:
            ValueError: a token id is out of range.
        """
        salted = whole_salt(salt, cache_salt)
        by_shard = [chunk_keys(self._space(shard, salted), tokens, tail=False) for shard in self.shards]
        return [list(parts) for parts in zip(*by_shard, strict=True)]


def whole_salt(engine: str, request: str) -> str:
    """The salt of a key, of the engine's and the request's; no two pairs are the same."""
    return f"{len(engine)}:{engine}{request}"


def parse_spaces(texts: Sequence[str]) -> list[Space]:
    """What engines told a pool; what can't be read (another version's) is left out."""
    found = []
    for text in texts:
        try:
            found.append(Space.model_validate_json(text))
        except ValidationError:
            continue
    return found
