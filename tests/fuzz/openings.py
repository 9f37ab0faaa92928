"""Well-formed inputs of the targets ``http``, ``pool`` and ``params``, and some that are not."""

from __future__ import annotations

import json
import struct
from typing import Any

from pdtransport.engine.params import marked
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool import messages
from pdtransport.pool.tiers.base import DIGEST_BYTES
from pdtransport.pool.tiers.codecs import LOSSY
from pdtransport.pool.tiers.envelope import Envelope
from pdtransport.pool.tiers.keyed_digest import UNSIGNED
from tests.fuzz.split import SEPARATOR
from tests.unit.pool_rig import key

CONSUME = {
    "do_remote_prefill": True, "transfer_id": "t-1", "remote_host": "127.0.0.1", "remote_port": 7670, "tp_size": 2,
    "first_token": True,
}  # fmt: skip
PRODUCE = {"do_remote_decode": True, "transfer_id": "t-1", "first_token": True}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# -- params ------------------------------------------------------------------------------------------------------------

HANDED_OVER = {**CONSUME, "do_remote_decode": False, "remote_engine_id": "e_dp0", "remote_block_ids": [[1, 2]]}
PARAMS = [
    _json(each)
    for each in (
        CONSUME,
        PRODUCE,
        {"continue_from": 5},
        {"do_remote_prefill": True, "remote_request_id": marked("t-1"), "remote_host": "h", "remote_port": 1},
        [PRODUCE, CONSUME, {"continue_from": 7}, None, 0, [], "x", True],
        [PRODUCE, PRODUCE, {**PRODUCE, "transfer_id": "t-2"}],
        [CONSUME, CONSUME, {**CONSUME, "remote_host": "[::1]", "remote_port": 65535, "tp_size": 4096}],
        {**HANDED_OVER, "first_token": 5, "first_token_declined": "seed"},
        {
            "id": "c", "created": 1, "model": "m",
            "choices": [{"index": 0, "text": "p", "finish_reason": "length", "prompt_token_ids": [1]}],
            "kv_transfer_params": {**HANDED_OVER, "first_token": 5, "transfer_id": "t"},
        },
        {
            "id": "c", "created": 1, "model": "m",
            "choices": [{"message": {"content": "p", "role": "assistant"}, "finish_reason": "length"}],
            "kv_transfer_params": {**HANDED_OVER, "first_token": 5, "transfer_id": "t"},
        },
    )
]  # fmt: skip


# -- http --------------------------------------------------------------------------------------------------------------


def _event(value: Any) -> bytes:
    return b"data: " + _json(value) + b"\n\n"


def _completion(**choice: Any) -> dict[str, Any]:
    return {"id": "c", "created": 1, "model": "m", "choices": [{"index": 0, "text": "d", **choice}]}


def _chat(**delta: Any) -> dict[str, Any]:
    return {"id": "c", "created": 1, "model": "m", "choices": [{"index": 0, "delta": delta}]}


_FIRST = {"do_remote_prefill": True, "first_token": 5}
_PREFILL = b"\x03" + _json({**_completion(text="p", finish_reason="length"), "kv_transfer_params": _FIRST})
_PREFILL_CHAT = b"\x03" + _json(
    {
        "id": "c", "created": 1, "model": "m", "kv_transfer_params": _FIRST, "prompt_token_ids": [1, 2],
        "choices": [{"message": {"content": "p", "role": "assistant"}, "finish_reason": "length"}],
    }
)  # fmt: skip
_ASK = {"model": "m", "prompt": [1, 2, 3, 4], "max_tokens": 8}
_TALK = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": True}
_USAGE = {"usage": {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}, "choices": []}
_DONE = b"data: [DONE]\n\n"
_POST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def _told(*parts: bytes) -> bytes:
    return SEPARATOR.join(parts)


HTTP = [
    b"\x01" + _json(_ASK),
    b"\x01" + _json({**_ASK, "prompt": "a text", "stream": True, "cache_salt": "s", "kv_transfer_params": None}),
    b"\x01" + _json({**_ASK, "prompt": [[1, 2]], "n": 1, "seed": 1, "temperature": 0, "return_token_ids": True}),
    b"\x01" + _json({**_ASK, "prompt": ["a", "b"], "vllm_xargs": {"a": 1}, "logprobs": 0, "echo": True}),
    b"\x01" + _json({**_ASK, "prompt": list(range(600)), "stream_options": {"include_usage": True}}),
    b"\x02" + _json(_TALK),
    b"\x02" + _json({**_TALK, "stream": False, "tools": [], "response_format": {"type": "text"}}),
    _told(
        b"\x01" + _json({**_ASK, "stream": True}),
        _PREFILL,
        b"\x04" + _event(_completion()) + _event(_completion(stop_reason=None)) + _event(_USAGE) + _DONE,
    ),
    _told(b"\x01" + _json({**_ASK, "stream": True}), _PREFILL, b"\x05" + _event(_completion()) + _DONE),
    _told(
        b"\x02" + _json(_TALK),
        _PREFILL_CHAT,
        b"\x04" + _event(_chat(role="assistant", content="")) + _event(_chat(content="d")) + _event(_USAGE) + _DONE,
    ),
    _told(b"\x02" + _json({**_TALK, "stream": False}), _PREFILL_CHAT, b"\x03" + _json(_chat())),
    _told(b"\x01" + _json(_ASK), b"", b'\x04data: {"error": {"message": "m", "code": 500}}\n\n'),
    _told(
        b"\x01" + _json({**_ASK, "stream": True}),
        _PREFILL,
        b"\x04" + _event(_completion(stop_reason="pdtransport:first-token-lost", finish_reason="stop")),
    ),
    _told(
        b"\x01" + _json(_ASK),
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\nX: y\r\n\r\nno",
    ),
    _told(
        b"\x01" + _json({**_ASK, "stream": True}),
        b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:\r\nzz\r\n",
    ),
    *(
        b"%s %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % each
        for each in (
            (b"GET", b"/health"), (b"GET", b"/live"), (b"GET", b"/v1/models"), (b"GET", b"/openapi.json"),
            (b"GET", b"/metrics"), (b"GET", b"/pd/status?workers=1"), (b"GET", b"/pd/traces?limit=5"),
            (b"GET", b"/pd/trace/t"), (b"HEAD", b"/health"), (b"OPTIONS", b"*"), (b"GET", b"http://127.0.0.1/live"),
            (b"DELETE", b"/v1/completions"), (b"CONNECT", b"h:1"),
        )
    ),
    _POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    _POST + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
    _POST + b"Content-Encoding: deflate\r\nContent-Length: 4\r\n\r\nabcd",
    _POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    _POST + b"Content-Length: 2\r\n\r\n{}GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    _POST + b"Content-Length: 9\r\n\r\n{}",
    b"GET /live HTTP/1.0\r\n\r\n",
    b"GET /live HTTP/1.1\r\nHost: elsewhere.example\r\nOrigin: http://elsewhere.example\r\n\r\n",
    b"OPTIONS /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: null\r\n"
    b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type\r\n\r\n",
    b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
]  # fmt: skip


_ODD: list[Any] = [
    5, "x", [], {}, None, True, {"choices": 5}, {"choices": [5]}, {"choices": [None]}, {"choices": {"a": 1}},
    {"choices": "x"}, {"choices": [{"delta": None}]}, {"choices": [{"delta": 5}]}, {"choices": [{"text": 5}]},
    {"choices": [{"message": 5}]}, {"choices": [{"message": {"content": 5}}]}, {"choices": [{"text": "\ud800"}]},
    {"choices": [{"text": "d", "token_ids": 5, "prompt_token_ids": 5, "stop_reason": [], "finish_reason": {}}]},
    {"choices": [{"text": "d"}], "usage": 5}, {"choices": [], "usage": {"completion_tokens": "x"}},
    {"choices": [], "usage": {"prompt_tokens": None, "total_tokens": [], "completion_tokens_details": 5}},
    {"error": 5}, {"error": {"message": 5, "code": "x"}}, {"error": {"code": 1e400}},
]  # fmt: skip
for _odd in _ODD:  # decode's first event, its whole answer, and one that follows; then prefill's answer
    HTTP += [
        _told(b"\x01" + _json({**_ASK, "stream": True}), _PREFILL, b"\x04" + _event(_odd) + _DONE),
        _told(b"\x02" + _json(_TALK), _PREFILL_CHAT, b"\x04" + _event(_odd) + _event(_chat(content="d")) + _DONE),
        _told(b"\x01" + _json({**_ASK, "stream": True}), _PREFILL, b"\x04" + _event(_completion()) + _event(_odd)),
        _told(b"\x01" + _json(_ASK), _PREFILL, b"\x03" + _json(_odd)),
        _told(b"\x02" + _json({**_TALK, "stream": False}), _PREFILL_CHAT, b"\x03" + _json(_odd)),
    ]
    if isinstance(_odd, dict):
        for _more in ({}, {"id": "c", "created": 1, "model": "m"}):
            _said_by_prefill = b"\x03" + _json({**_more, **_odd, "kv_transfer_params": _FIRST})
            HTTP.append(_told(b"\x01" + _json({**_ASK, "stream": True}), _said_by_prefill))
    HTTP.append(_told(b"\x01" + _json(_ASK), b"\x03" + _json({"kv_transfer_params": _odd})))
HTTP.append(
    _told(
        b"\x01" + _json({**_ASK, "stream": True}),
        b"\x03" + _json({**_completion(text="\ud800", finish_reason="length"), "kv_transfer_params": _FIRST}),
    )
)


# -- pool --------------------------------------------------------------------------------------------------------------


def _sizes(*sizes: int) -> bytes:
    return struct.pack(f"<{len(sizes)}I", *sizes)


def _said(*said: messages.Message) -> bytes:
    return b"\x01" + SEPARATOR.join(messages.encode(each) for each in said)


_KEYS, _NAME = key(1) + key(2), key(1).hex()
_TWO = _sizes(4096, 8192)
_SPACE = json.dumps([{"model": "m", "revision": "", "dtype": "bfloat16", "chunk_tokens": 256}])
_LISTED = {"keys": [key(1).hex()]}
_WISHES: list[Any] = [
    {"tokens": [1, 2, 3]}, {"tokens": [1.0], "model": "m", "salt": "s", "cache_salt": "c"}, {"tokens": [5]}, _LISTED,
    {**_LISTED, "pin": "soft", "for_s": 1.5}, {"all": True}, {"tenant": "a"}, {**_LISTED, "to": "disk"},
    {"all": True, "to": "below"}, {"tokens": [], "keys": []},
]  # fmt: skip


def _sealed(codec: int, payload: bytes) -> bytes:
    """For the form that makes the header: codec, checksum, payload."""
    return b"\x03\0" + bytes([codec]) + bytes(8) + payload


def _grid(number: int, rows: int, groups: int, width: int, payload: int) -> bytes:
    return struct.pack("<B3xIII", number, rows, groups, width) + bytes(payload)


POOL = [
    _said(messages.Lookup(request=1, keys=_KEYS)),
    _said(
        messages.Store(request=1, keys=_KEYS, sizes=_TWO),
        messages.Publish(request=1, indices=_sizes(0, 1), checksums=bytes(16)),
        messages.Load(request=2, keys=_KEYS, sizes=_TWO),
        messages.ChunkDamaged(request=2, index=0),
        messages.ReleaseChunks(request=2, indices=_sizes(0, 1)),
    ),
    _said(
        messages.Store(request=1, keys=_KEYS, sizes=_TWO, codec="fp8", grid=("bfloat16", 16, 2, 8)),
        messages.Store(request=2, keys=_KEYS, sizes=_TWO),
        messages.CancelRequest(request=1),
        messages.CancelRequest(request=2),
    ),
    *(
        _said(messages.Manage(request=1, keys=_KEYS, action=action, **more))
        for action, more in (
            ("pin", {"pin": 2, "for_s": 1.5}), ("drop", {}), ("leave", {"tier": "disk"}), ("fetch", {}), ("hint", {}),
            ("write", {"tier": "disk", "again": True}),
        )
    ),
    _said(
        messages.Look(request=1, keys=_KEYS, sweep=True, tenant=""),
        messages.WatchForgotten(request=2),
        messages.Count(request=3),
    ),
    _said(
        messages.Introduce(request=1, space=_SPACE),
        messages.SpacesAsked(request=2),
        messages.PoolStatusRequest(request=3),
    ),
    _said(messages.PoolHello(lock=5, name="again"), messages.Bye(), messages.Lookup(request=1, keys=b"")),
    *(b"\x02" + bytes([path]) + _json(wish) for path in range(8) for wish in _WISHES),
    *(_sealed(codec, bytes(64)) for codec in range(6)),
    _sealed(0, bytes(4096)),
    _sealed(LOSSY["fp8"], _grid(2, 16, 2, 8, 8 + 2048)),
    _sealed(LOSSY["int4"], _grid(0, 16, 2, 8, 4 * 16 + 512)),
    _sealed(1, b"\x02" + bytes.fromhex("28b52ffd6000001500000008000100fc0f39c001")),
    b"\x03" + Envelope(0, UNSIGNED, 4096, 4096, 0, key(1)).packed(),
    *(_sealed(codec | flags, bytes(4096 + DIGEST_BYTES)) for codec in (0, 1) for flags in (64, 128, 192)),
    b"\x04" + SEPARATOR.join([f"t-/{_NAME[:3]}/{_NAME}.4096".encode(), b"new-1", b"t-a/b"]),
    b"\x04t-\xff/abc/" + b"ab" * KEY_BYTES + b".8",
    b"\x05" + _json([_SPACE, "x", 1]),
]  # fmt: skip
