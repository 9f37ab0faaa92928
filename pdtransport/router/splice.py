"""Joins the first token of prefill's answer and the rest of decode's into the answer of a single server."""

from __future__ import annotations

import json
from typing import Any

from pdtransport.router.events import WholeEvents
from pdtransport.router.first_token import Api, FirstToken

# stop_reason of a decode that could not keep its promise (pdtransport.vllm.first_token).
LOST = "pdtransport:first-token-lost"
MAX_FIRST_EVENT_BYTES = 64 << 20
_DATA, _END = b"data: ", b"\n\n"


class Lost(Exception):
    """Decode did not continue from the first token: its answer must not be used."""


def _event(value: dict[str, Any]) -> bytes:
    return _DATA + _dumps(value) + _END


def _dumps(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, escaped by a server: not encodable in UTF-8, but valid JSON
        return json.dumps(value, separators=(",", ":")).encode()


def opening(api: Api, first: FirstToken, token_ids: bool) -> bytes:
    """The events that a single server sends up to its first token; ``token_ids``: the client asked for token ids."""
    ids = [first.token] if token_ids else None
    prompt = first.prompt_ids if token_ids else None
    plain = {"index": 0, "logprobs": None, "finish_reason": None}
    if api == "completions":
        choice = {**plain, "text": first.text, "stop_reason": None, "prompt_token_ids": prompt, "token_ids": ids}
        return _event({**first.head, "object": "text_completion", "choices": [choice]})
    head = {**first.head, "object": "chat.completion.chunk"}
    role = {**plain, "delta": {"role": first.role, "content": ""}}
    content = {**plain, "delta": {"content": first.text}, "token_ids": ids}
    return _event({**head, "choices": [role], "prompt_token_ids": prompt, "prompt_text": None}) + _event(
        {**head, "choices": [content]}
    )


class StreamSplice:
    """Turns decode's events into the rest of a stream that began with :func:`opening`."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._events = WholeEvents()
        self._held = b""
        self._begun = False  # decode's first own token has passed

    def feed(self, chunk: bytes) -> bytes:
        """Returns the whole events received so far.

        Raises:
            Lost: decode reports that this is not the rest of the answer.
        """
        data = self._events.feed(chunk)
        if not self._begun:
            data = self._whole(data)
        if self._begun and b'"usage":' not in data:
            return data
        return b"".join(self._change(event + _END) for event in data.split(_END) if event)

    def rest(self) -> bytes | None:
        """As :meth:`WholeEvents.rest`."""
        return self._events.rest()

    def _whole(self, data: bytes) -> bytes:
        """Hold back decode's first event until it is complete, so that it is checked before any of it passes.

        Even a very long event (with a long prompt's token ids) is held.
        """
        data, self._held = self._held + data, b""
        if data and not data.endswith(_END):
            data, self._held = b"", data
            if len(self._held) > MAX_FIRST_EVENT_BYTES:
                raise Lost
        return data

    def _change(self, event: bytes) -> bytes:
        """Adapt an event to the form of a single server's stream; data that is not an event passes unchanged."""
        if self._begun and b'"usage":' not in event:
            return event
        try:
            value = json.loads(event.removeprefix(_DATA))
        except (ValueError, RecursionError):
            return event
        if not isinstance(value, dict):
            return event
        if not self._begun and "error" in value:
            raise Lost
        changed = count_first(value)
        choices = value.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if self._begun or not isinstance(choice, dict):
                break
            delta = choice.get("delta")
            if self._api == "chat" and isinstance(delta, dict) and "role" in delta:
                return b""  # already sent from prefill's answer
            refuse_lost(choice)
            self._begun = True
            if choice.get("prompt_token_ids") is not None:
                choice["prompt_token_ids"], changed = None, True
        return _event(value) if changed else event


class VoidCheck:
    """Looks at decode's answer that nobody continues, up to its first token: is it void?

    Decode promised to continue from a first token that prefill then gave to nobody, and the hand-off failed.
    """

    def __init__(self, streams: bool) -> None:
        self._streams = streams
        self.data = b""  # all bytes so far

    def feed(self, chunk: bytes) -> bool:
        """Take in more of the answer; True once its first token was seen, or nothing more can be learned.

        Raises:
            Lost: the answer must not be used.
        """
        self.data += chunk
        if self._streams:
            parts = self.data.split(_END)[:-1]
        else:
            parts = [self.data] if self.data.rstrip().endswith(b"}") else []
        return any(_has_token(part) for part in parts) or len(self.data) > MAX_FIRST_EVENT_BYTES


def _has_token(event: bytes) -> bool:
    """Whether an event, or a whole answer, has a token or says that there will be none.

    Raises:
        Lost: the token must not be used.
    """
    try:
        value = json.loads(event.removeprefix(_DATA))
    except (ValueError, RecursionError):
        return event == b"data: [DONE]"
    choices = value.get("choices") if isinstance(value, dict) else None
    found = not isinstance(value, dict) or "error" in value
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            refuse_lost(choice)
            delta = choice.get("delta")
            found = found or not (isinstance(delta, dict) and "role" in delta)
    return found


def joined(api: Api, first: FirstToken, raw: bytes) -> bytes:
    """One whole answer made of prefill's first token and decode's ``raw`` rest.

    Raises:
        Lost: decode did not continue from the token.
        ValueError: ``raw`` is not a valid answer.
    """
    try:
        answer = json.loads(raw)
        (choice,) = answer["choices"]
        refuse_lost(choice)
        where, key = (choice["message"], "content") if api == "chat" else (choice, "text")
        where[key] = first.text + (where[key] or "")
        if choice.get("token_ids") is not None:
            choice["token_ids"] = [first.token, *choice["token_ids"]]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no answer of one choice: {type(error).__name__}") from None
    count_first(answer)
    return _dumps(answer)


def count_first(value: dict[str, Any]) -> bool:
    """Add the first token to the usage, because decode's engine did not count it. False if ``value`` has no usage."""
    usage = value.get("usage")
    if not isinstance(usage, dict):
        return False
    for key in ("completion_tokens", "total_tokens"):
        if isinstance(usage.get(key), int):
            usage[key] += 1
    return True


def refuse_lost(choice: dict[str, Any]) -> None:
    if choice.get("stop_reason") == LOST:
        raise Lost
