"""Parses a client request, once; the body is never serialized again.

The top level of the body is read member by member, and each member's position in the text is kept. Prefill's body is
joined from those pieces of text; decode's is the client's own bytes with one member inserted at the front. The token
ids of a long prompt are only counted here; only the servers parse them into numbers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import blake2b
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from pdtransport.router.first_token import Api, why_not
from pdtransport.router.tenants import Salter
from pdtransport.serving.errors import ApiError

PATHS: dict[Api, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_PROMPT_KEY: dict[Api, str] = {"completions": "prompt", "chat": "messages"}

# Prefill computes one token and its answer's content is discarded, so members that only shape content are left out.
_NOT_FOR_PREFILL = frozenset(
    {
        "best_of",
        "kv_transfer_params",
        "logprob_token_ids",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "min_tokens",
        "n",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "stream",
        "stream_interval",
        "stream_options",
        "top_logprobs",
    }
)
_FOR_PREFILL: dict[Api, bytes] = {
    "completions": b'"n":1,"stream":false,"max_tokens":1',
    "chat": b'"n":1,"stream":false,"max_tokens":1,"max_completion_tokens":1',
}

_skip_space = re.compile(r"[ \t\n\r]*").match
_value = json.JSONDecoder().raw_decode
# Members of a body's top level; vLLM knows about a hundred. Each is parsed in Python, which blocks the event loop.
MAX_MEMBERS = 1024
# Limits on "[" and "{", and on "," in a body, including those inside strings. Parsing 16 MiB of [],[],... would block
# the event loop for seconds; at these limits it takes a tenth of a second (0.17 s for numbers). No context length needs
# as many.
MAX_LISTS, MAX_COMMAS = 1 << 18, 1 << 21
_DIGEST_BYTES = 16
_LONG_LIST = 1024  # characters; the JSON parser is as fast for shorter lists
CHARS_PER_TOKEN = 4  # rough, for load estimates of text prompts


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a request was not disaggregated: a code for metrics and a sentence for users."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed client request."""

    api: Api
    raw: bytes  # the client's body, with its tenant's cache_salt if it has one
    brace: int  # offset of the byte after the body's opening brace
    prefill_head: bytes  # prefill's body without kv_transfer_params and the closing brace
    drop_null: bytes | None  # the body without the client's `"kv_transfer_params": null`, if it has one
    stream: bool
    model: str
    prompt_tokens: int  # exact for token ids, else an estimate
    prompt_bytes: int
    prefix_keys: tuple[bytes, ...]  # digest of the prompt's first 1, 2, ... chunks
    decode_only_reason: Reason | None  # why a hand-off can't serve the request; None if it can
    not_first: str  # code that says why prefill must not give out the first token; empty if it may
    token_ids: bool  # the client wants token ids in the answer
    prompt_at: tuple[int, int]  # start and end of the prompt in the body's text
    has_ids: bool  # the prompt is token ids
    cache_salt: str | None  # "": none; None: not a string

    def for_prefill(self, params: dict[str, Any], token_ids: bool = False) -> bytes:
        """Prefill's body: one token, not streamed, with ``params`` as its kv_transfer_params.

        ``token_ids``: ask prefill to return the prompt's token ids.
        """
        ids = b',"return_token_ids":true' if token_ids else b""
        return b"".join((self.prefill_head, ids, b',"kv_transfer_params":', _dumps(params), b"}"))

    def prompt_json(self) -> bytes:
        """The prompt's JSON text, as in the body."""
        first, end = self.prompt_at
        return self.raw[first:end] if self.raw.isascii() else self.raw.decode()[first:end].encode()

    def for_decode(self, params: dict[str, Any] | None) -> bytes:
        """Decode's body: the client's bytes with ``params`` as kv_transfer_params."""
        if params is None:
            return self.raw
        member = b'"kv_transfer_params":' + _dumps(params)
        if self.drop_null is not None:
            return b"".join((b"{", member, b"," if self.drop_null else b"", self.drop_null, b"}"))
        return b"".join((self.raw[: self.brace], member, b",", self.raw[self.brace :]))


def _dumps(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def parse(raw: bytes, api: Api, *, chunk_chars: int, chunks: int, salter: Salter | None = None) -> Call:
    """Parse a client's body.

    Args:
        chunk_chars: characters per chunk of ``prefix_keys``.
        chunks: maximum number of chunks.
        salter: maps the client's cache_salt to the one that servers get; belongs to the client's tenant.

    Raises:
        ApiError: 400, the body is not a JSON object, or sets a member that only the router may set.
    """
    text, members = _split(raw)
    _check_reserved(members)
    if salter is not None:
        text, members = _salted(text, members, salter)
        raw = text.encode()
    prompt = members.get(_PROMPT_KEY[api])
    if prompt and api == "completions":
        prompt = _unwrapped(text, prompt)
    prompt_text = text[prompt.start : prompt.end] if prompt else ""
    reason = _decode_only_reason(api, members, prompt)
    model = members["model"].value if "model" in members else None
    cache_salt = members["cache_salt"].value if "cache_salt" in members else None
    return Call(
        api=api,
        raw=raw,
        brace=raw.index(b"{") + 1,
        prefill_head=b"" if reason else _prefill_head(api, text, members, prompt),
        drop_null=_joined(text, members, {"kv_transfer_params"}) if "kv_transfer_params" in members else None,
        stream="stream" in members and bool(members["stream"].value),
        model=model if isinstance(model, str) else "",
        prompt_tokens=_count(prompt.value if prompt else None, prompt_text),
        prompt_bytes=len(prompt_text) if prompt_text.isascii() else len(prompt_text.encode()),
        prefix_keys=_prefix_keys(api, prompt_text, members, chunk_chars, chunks),
        decode_only_reason=reason,
        not_first=why_not(api, {key: member.value for key, member in members.items()}),
        token_ids="return_token_ids" in members and bool(members["return_token_ids"].value),
        prompt_at=(prompt.start, prompt.end) if prompt else (0, 0),
        has_ids=prompt is not None and reason is None and isinstance(prompt.value, (list, _TokenIds)) and api != "chat",
        cache_salt=cache_salt or "" if cache_salt is None or isinstance(cache_salt, str) else None,
    )


@dataclass(frozen=True, slots=True)
class _TokenIds:
    """A prompt of ``count`` token ids. The servers check whether the ids are valid."""

    count: int
    in_list: bool = False  # the only prompt of a list


def _long_prompt(text: str, at: int) -> tuple[_TokenIds, int] | None:
    """The long prompt of token ids that begins at ``at``, and its end; the prompt may be the only item of a list."""
    inner = _after(text, at + 1)
    if text[at : at + 1] != "[" or text[inner : inner + 1] != "[":
        return _token_ids(text, at)
    found = _token_ids(text, inner)
    end = _after(text, found[1]) if found else at
    return (_TokenIds(found[0].count, in_list=True), end + 1) if found and text[end : end + 1] == "]" else None


def _token_ids(text: str, at: int) -> tuple[_TokenIds, int] | None:
    """The long list of token ids that begins at ``at``, and its end.

    None for anything else, and for a list whose commas make it invalid JSON.
    """
    end = text.find("]", at)
    if text[at : at + 1] != "[" or end - at < _LONG_LIST or not text[at:end].isascii():
        return None
    inside = text[at + 1 : end].encode().translate(None, b" ")
    if inside.translate(None, b"0123456789,") or b",," in inside or b"," in (inside[:1], inside[-1:]):
        return None
    return _TokenIds(inside.count(b",") + 1), end + 1


@dataclass(frozen=True, slots=True)
class _Member:
    value: Any
    key_start: int
    start: int
    end: int


def _split(raw: bytes) -> tuple[str, dict[str, _Member]]:
    """The body's text and its top-level members.

    A duplicate key is refused, because servers could differ on its value.
    """
    if raw.count(b"[") + raw.count(b"{") > MAX_LISTS or raw.count(b",") > MAX_COMMAS:
        told = f"more than {MAX_LISTS} lists and objects, or {MAX_COMMAS} commas"
        raise ApiError(400, f"the request body has {told}, which the router does not accept", code="too_many_values")
    try:
        text = raw.decode("utf-8")
        at = _after(text, 0)
        if text[at : at + 1] not in {"{", ""}:
            _value(text, at)  # raises for invalid JSON; otherwise it is not an object
            raise ApiError(400, "the request body must be a JSON object", code="not_an_object")
        return text, _members(text, at)
    except UnicodeDecodeError:
        raise ApiError(400, "the request body is not UTF-8", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise ApiError(
            400,
            f"the request body is not valid JSON: {error.msg} at character {error.pos}",
            code="invalid_json",
        ) from None
    except RecursionError:
        raise ApiError(400, "the request body is nested too deeply", code="invalid_json") from None
    except ValueError:  # an integer with thousands of digits
        raise ApiError(400, "the request body holds a number that is too long", code="invalid_json") from None


def _after(text: str, at: int) -> int:
    match = _skip_space(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, character: str) -> int:
    if text[at : at + 1] != character:
        raise json.JSONDecodeError(f"Expecting '{character}'", text, at)
    return at + 1


def _members(text: str, at: int) -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    at = _after(text, _expect(text, at, "{"))
    if text[at : at + 1] == "}":
        _end(text, at + 1)
        return members
    while True:
        key_start = at
        key, at = scanstring(text, _expect(text, at, '"'), True)
        at = _after(text, _expect(text, _after(text, at), ":"))
        start = at
        value, at = (_long_prompt(text, start) if key == "prompt" else None) or _value(text, start)
        if key in members:
            raise ApiError(400, f"the request body has {key[:64]!r} twice", code="invalid_json", param=key[:64])
        if len(members) >= MAX_MEMBERS:
            raise ApiError(400, f"the request body has more than {MAX_MEMBERS} members", code="too_many_members")
        members[key] = _Member(value, key_start, start, at)
        at = _after(text, at)
        if text[at : at + 1] == "}":
            _end(text, at + 1)
            return members
        at = _after(text, _expect(text, at, ","))


def _unwrapped(text: str, prompt: _Member) -> _Member:
    """The prompt of a list with one prompt (client libraries send these); anything else unchanged."""
    value = prompt.value
    if isinstance(value, list) and len(value) == 1 and _is_prompt(value[0]):
        value = value[0]
    elif isinstance(value, _TokenIds) and value.in_list:
        value = _TokenIds(value.count)
    else:
        return prompt
    start = _after(text, prompt.start + 1)
    return _Member(value, prompt.key_start, start, start + len(text[start : prompt.end - 1].rstrip(" \t\n\r")))


def _is_prompt(value: Any) -> bool:
    return isinstance(value, (str, _TokenIds)) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], int)
    )


def _end(text: str, at: int) -> None:
    at = _after(text, at)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _check_reserved(members: dict[str, _Member]) -> None:
    own = members.get("kv_transfer_params")
    extra = members.get("vllm_xargs")
    smuggled = extra is not None and isinstance(extra.value, dict) and "kv_transfer_params" in extra.value
    if (own is not None and own.value is not None) or smuggled:
        raise ApiError(
            400,
            "kv_transfer_params is set by the router: leave it out, or talk to the servers directly",
            param="kv_transfer_params",
            code="reserved_parameter",
        )


def _salted(text: str, members: dict[str, _Member], salter: Salter) -> tuple[str, dict[str, _Member]]:
    """The body with a new cache_salt, and the new positions of its members."""
    own = members["cache_salt"].value if "cache_salt" in members else None
    if own is not None and (not isinstance(own, str) or not own):
        raise ApiError(400, "cache_salt must be a non-empty string", param="cache_salt", code="invalid_value")
    salt = salter(own or "")
    pieces = [f'"cache_salt":"{salt}"']
    at = 1 + len(pieces[0])
    made = {"cache_salt": _Member(salt, 1, at - len(salt) - 2, at)}
    for key, member in members.items():
        if key != "cache_salt":
            pieces.append(text[member.key_start : member.end])
            shift = at + 1 - member.key_start
            made[key] = _Member(member.value, at + 1, member.start + shift, member.end + shift)
            at = member.end + shift
    return "{" + ",".join(pieces) + "}", made


def _joined(text: str, members: dict[str, _Member], without: frozenset[str] | set[str]) -> bytes:
    kept = (text[member.key_start : member.end] for key, member in members.items() if key not in without)
    return ",".join(kept).encode()


def _prefill_head(api: Api, text: str, members: dict[str, _Member], prompt: _Member | None) -> bytes:
    """Prefill's body up to kv_transfer_params. A prompt sent as a list of one is written without the list."""
    given = members.get("prompt")
    if prompt is None or given is None or api == "chat" or prompt.start == given.start:
        return b"".join((b"{", _joined(text, members, _NOT_FOR_PREFILL), b",", _FOR_PREFILL[api]))
    others = _joined(text, members, _NOT_FOR_PREFILL | {"prompt"})
    single = text[prompt.start : prompt.end].encode()
    return b"".join((b"{", others, b"," if others else b"", b'"prompt":', single, b",", _FOR_PREFILL[api]))


def _decode_only_reason(api: Api, members: dict[str, _Member], prompt: _Member | None) -> Reason | None:
    """Why a hand-off can't serve the request; None if it can.

    A hand-off carries one prompt's pages to one sequence, and no prompt logprobs.
    """

    def given(key: str) -> Any:
        return members[key].value if key in members else None

    for key in ("n", "best_of"):
        if given(key) not in (None, 1):
            return Reason(key, f"{key} asks for several sequences and a hand-off serves one")
    if given("use_beam_search"):
        return Reason("beam_search", "beam search needs several sequences and a hand-off serves one")
    if given("echo"):
        return Reason("echo", "echo returns the prompt, which decode must compute")
    if given("prompt_logprobs") is not None:
        return Reason("prompt_logprobs", "prompt_logprobs require decode to compute the whole prompt")
    if given("prompt_embeds") is not None:
        return Reason("prompt_embeds", "prompt_embeds carry no tokens to match pages by")
    return _prompt_reason(api, prompt.value if prompt else None)


def _prompt_reason(api: Api, prompt: Any) -> Reason | None:
    if isinstance(prompt, list) and bool(prompt) if api == "chat" else _is_prompt(prompt):
        return None
    if api == "completions" and isinstance(prompt, list) and len(prompt) > 1:
        return Reason("batch", f"the body has a batch of {len(prompt)} prompts and a hand-off serves one")
    return Reason("no_prompt", f"the body has no usable {_PROMPT_KEY[api]}")


def _count(prompt: Any, prompt_text: str) -> int:
    if isinstance(prompt, _TokenIds):
        return prompt.count
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return len(prompt)
    return len(prompt_text) // CHARS_PER_TOKEN


def _prefix_keys(
    api: Api, prompt_text: str, members: dict[str, _Member], chunk_chars: int, chunks: int
) -> tuple[bytes, ...]:
    """Digests of the prompt's growing prefixes, in whole chunks; they differ by model and cache salt."""
    whole = min(len(prompt_text) // chunk_chars, chunks)
    if not whole:
        return ()
    given = (members[key].value if key in members else None for key in ("model", "cache_salt"))
    seed = [api, *(value if isinstance(value, str) else None for value in given)]  # servers refuse non-strings
    running = blake2b(json.dumps(seed).encode(), digest_size=_DIGEST_BYTES)
    keys = []
    for index in range(whole):
        running.update(prompt_text[index * chunk_chars : (index + 1) * chunk_chars].encode())
        keys.append(running.digest())
    return tuple(keys)
