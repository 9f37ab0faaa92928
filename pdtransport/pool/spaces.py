"""Of what an engine's keys are made, as it tells the pool: enough to look a prompt up, without the secret salt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pdtransport.kv.keys import KeySpace, chunk_keys
from pdtransport.pool.messages import MAX_SPACE

MAX_SHARDS = 1024
_Text = Annotated[str, Field(max_length=MAX_SPACE)]


class Space(BaseModel):
    """One engine's, or that of several alike. A chunk has a part for each of ``shards``; it is there if all are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: _Text
    revision: _Text
    dtype: _Text
    layout: _Text
    shards: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=MAX_SHARDS)]
    chunk_tokens: Annotated[int, Field(ge=1)]
    salted: bool = Field(False, description="Whether the engine has a salt of its own; who has not, can't find keys.")
    served: tuple[_Text, ...] = Field((), description="Names that clients use for the model.")
    tokenizer: _Text = Field("", description="Where the engine has its tokenizer from.")

    def parts(self, tokens: Sequence[int], *, salt: str = "", cache_salt: str = "") -> list[list[bytes]]:
        """For each whole chunk of a prompt, the keys of its parts.

        Args:
            salt: the engine's own (``pool.salt``).
            cache_salt: of the request.

        Raises:
            ValueError: a token id is out of range.
        """
        salted = whole_salt(salt, cache_salt)
        by_shard = [
            chunk_keys(
                KeySpace(
                    model=self.model,
                    revision=self.revision,
                    dtype=self.dtype,
                    layout=self.layout,
                    shard=shard,
                    chunk_tokens=self.chunk_tokens,
                    salt=salted,
                ),
                tokens,
                tail=False,
            )
            for shard in self.shards
        ]
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
