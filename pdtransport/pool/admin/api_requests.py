"""Request bodies of the HTTP API, and its OpenAPI description, which is generated from the same models."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pdtransport.kv.keys import KEY_BYTES, MAX_TOKEN
from pdtransport.pool.admin.pool_admin import Chosen
from pdtransport.pool.admin.prompts import MAX_TOKENS, PoolPrompt
from pdtransport.pool.messages import MAX_PIN_S, TENANT
from pdtransport.serving.errors import ApiError
from pdtransport.serving.openapi import as_json, document, got, key_scheme, query, refused, wanting
from pdtransport.settings import MAX_SALT, one_line

MAX_LISTED_KEYS = 1 << 18

Key = Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * KEY_BYTES}}}$")]


def _integers(tokens: Any) -> Any:
    """Accept floats with integral values as token ids: in JSON, 1.0 is an integer."""
    if not isinstance(tokens, list):
        return tokens
    return [int(each) if type(each) is float and each.is_integer() else each for each in tokens]


Tokens = Annotated[
    list[Annotated[int, Field(ge=0, le=MAX_TOKEN)]],
    Field(min_length=1, max_length=MAX_TOKENS),
    BeforeValidator(_integers),
]
Text = Annotated[str, Field(max_length=MAX_SALT)]

# Defaults of None are not validated, but an explicit null is: it is refused, as the description says.
_NO_TOKENS: Any = None
_NO_NUMBER: Any = None


class ApiLookup(BaseModel):
    """Names chunks by the prompt that they belong to."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tokens: Tokens = Field(description="The prompt's token ids.")
    model: Text = Field("", description="Any name of the model; needed if engines of several models use the pool.")
    salt: Text = Field("", description="The engines' pool.salt.")
    cache_salt: Text = Field("", description="The request's.")

    def prompt(self) -> PoolPrompt:
        return PoolPrompt(self.tokens, self.model or None, self.salt, self.cache_salt)


class ApiRequest(ApiLookup):
    """Names chunks by exactly one of ``tokens``, ``keys``, ``all`` and ``tenant``."""

    tokens: Tokens = Field(_NO_TOKENS, description="Chunks of the prompt with these token ids.")
    keys: Annotated[list[Key], Field(min_length=1, max_length=MAX_LISTED_KEYS)] = Field(
        _NO_TOKENS, description="Chunks with these keys."
    )
    all: Literal[True] = Field(_NO_TOKENS, description="All chunks.")
    tenant: Annotated[str, Field(pattern=TENANT)] = Field(
        _NO_TOKENS, description='All chunks of this tenant, which must have a quota; "": of all tenants without one.'
    )

    def chosen(self) -> Chosen | None:
        """The chosen chunks; None: those of :meth:`prompt`."""
        if self.keys is not None:
            return Chosen(tuple(map(bytes.fromhex, self.keys)))
        if self.tenant is not None:
            return Chosen(tenant=self.tenant)
        return Chosen() if self.all else None


class PinWish(ApiRequest):
    pin: Literal["hard", "soft"] = Field("hard", description="soft: evicted only when no unpinned chunk can be.")
    for_s: Annotated[float, Field(gt=0, le=MAX_PIN_S)] = Field(
        _NO_NUMBER, description="The pin expires after this many seconds."
    )


class MoveWish(ApiRequest):
    to: Annotated[str, Field(pattern="^[a-z0-9]{1,64}$")] = Field(
        description="A tier's name; below: drop chunks from memory that a lower tier has."
    )


ONE_OF = ("tokens", "keys", "all", "tenant")
ACTIONS: dict[str, tuple[type[ApiRequest], str]] = {
    "pin": (PinWish, "Pin chunks in memory."),
    "unpin": (ApiRequest, "Unpin chunks."),
    "prefetch": (ApiRequest, "Read chunks into memory."),
    "move": (MoveWish, "Move chunks to another tier, out of memory."),
    "clear": (ApiRequest, "Remove chunks from all tiers."),
    "compress": (ApiRequest, "Rewrite chunks in tiers that have been given a codec since."),
}

AnyWish = TypeVar("AnyWish", bound=ApiLookup)


def parse(raw: bytes, kind: type[AnyWish]) -> AnyWish:
    """Parse a request body.

    Raises:
        ApiError: 400, the body is not JSON or does not fit the model; one line says where.
    """
    try:
        wish = kind.model_validate_json(raw)
    except ValidationError as error:
        raise ApiError(400, one_line(error), code="bad_wish") from None
    if issubclass(kind, ApiRequest) and sum(name in wish.model_fields_set for name in ONE_OF) != 1:
        raise ApiError(400, f"choose chunks by exactly one of {', '.join(ONE_OF)}", code="bad_wish")
    return wish


def describe() -> dict[str, Any]:
    """The OpenAPI 3.1 description of the API."""
    key, count = wanting("key"), {"type": "integer", "minimum": 0}
    refusals = {
        "401": refused("No key."),
        "4XX": refused(),
        "503": refused("Too many requests are in progress, or the pool does not answer.", retry=True),
        "5XX": refused(),
    }
    rows: dict[str, Any] = {"type": "array", "items": {"type": "object"}}
    state = as_json({"type": "object", "required": ["name", "memory", "tiers", "held", "hits"]})
    spaces = as_json({"type": "object", "required": ["spaces"], "properties": {"spaces": rows}})
    chunks = as_json(
        {"type": "object", "required": ["chunks", "next"], "properties": {"chunks": rows, "next": {"type": "integer"}}}
    )
    found = as_json({"type": "object", "required": ["found"], "properties": {"found": rows}})
    done = as_json({"type": "object", "required": ["done", "of"], "properties": {"done": count, "of": count}})
    paths: dict[str, Any] = {
        "/openapi.json": {"get": got("openapi", "This description.", as_json({"type": "object"}))},
        "/health": {"get": got("health", "Whether the pool answers.", as_json({"type": "object"}))},
        "/pool/status": {"get": got("status", "Sizes, contents and hit rates by tier and tenant.", state)},
        "/pool/spaces": {"get": got("spaces", "Which engines' keys the pool knows.", spaces)},
        "/pool/chunks": {"get": got("chunks", "Chunks, a slice at a time.", chunks)},
        "/pool/lookup": {
            "post": _posted(
                "lookup", "How many chunks of a prompt the pool holds, and in which tiers.", found, ApiLookup
            )
        },
        "/pool/hint": {
            "post": _posted(
                "hint", "A request is coming: start to read its chunks into memory, without waiting.", done, ApiLookup
            )
        },
    }
    paths["/pool/chunks"]["get"]["parameters"] = [
        query(
            "first",
            {"type": "integer", "minimum": 0, "maximum": 999_999_999},
            "Where to continue: `next` of the previous answer.",
        ),
        query(
            "tenant",
            {"type": "string", "pattern": TENANT},
            'Only chunks of this tenant; "": of tenants without a quota.',
        ),
    ]
    for name, (kind, text) in ACTIONS.items():
        paths[f"/pool/{name}"] = {"post": _posted(name, text, done, kind)}
    for path, by_method in paths.items():
        for operation in by_method.values():
            operation["responses"] |= refusals if path.startswith("/pool/") else {"503": refused()}
            operation |= key if path.startswith("/pool/") else {}
    schemes = {"key": key_scheme("A key of the file that --http-key-file names.")}
    return document("pdpool", "The contents of a pool of KV chunks, by tier.", paths, schemes)


def _posted(name: str, text: str, answer: dict[str, Any], kind: type[ApiLookup]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    for described in schema["properties"].values():
        if described.get("default", 0) is None:
            del described["default"]
    if issubclass(kind, ApiRequest):
        schema["oneOf"] = [{"required": [each]} for each in ONE_OF]
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {**got(name, text, answer), "requestBody": body}
