"""Reads a request's body: uncompressed JSON, with a limit on its size and a deadline."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from aiohttp import hdrs, web

from pdtransport.serving.errors import ApiError

EXPECTS_CONTINUE = web.RequestKey("EXPECTS_CONTINUE", bool)  # the client waits for 100 Continue to send its body
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_MARKS = (b"\xef\xbb\xbf", b"\xfe\xff", b"\xff\xfe")  # byte-order marks, except big-endian UTF-32's (it has zeros)


def check_kind(request: web.BaseRequest) -> None:
    """Check the headers that describe the body, before any of it is read.

    Raises:
        ApiError: 415, the body is not JSON, or is compressed; 501, its transfer coding is not supported.
    """
    kind = request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page can send other types to any server that its visitor reaches, but this type only with the server's
        # consent.
        raise ApiError(
            415, "the body must be application/json: say so in Content-Type", code="bad_content_type", close=True,
            headers={"Accept-Post": "application/json"},
        )  # fmt: skip
    encodings = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())).lower().split(",")
    if any(encoding.strip() not in {"", "identity"} for encoding in encodings):
        raise ApiError(
            415, "the body must not be compressed: send it without Content-Encoding (vLLM does not support it either)",
            code="bad_content_encoding", close=True, headers={hdrs.ACCEPT_ENCODING: "identity"},
        )  # fmt: skip
    if request.headers.get(hdrs.TRANSFER_ENCODING, "chunked").strip().lower() != "chunked":
        raise ApiError(501, "the only transfer coding is chunked", code="bad_transfer_encoding", close=True)


def as_utf8(raw: bytes) -> bytes:
    """JSON text as UTF-8: converts UTF-16 and UTF-32, and removes a byte-order mark.

    Anything that can't be decoded is returned unchanged; the JSON parser will reject it.
    """
    if not raw.startswith(_MARKS) and b"\0" not in raw[:4]:
        return raw
    try:
        return raw.decode(json.detect_encoding(raw)).encode()
    except UnicodeError:
        return raw


async def read_body(
    request: web.Request,
    limit: tuple[int, str],
    seconds: tuple[float, str],
    reserve: Callable[[int], None] = lambda _nbytes: None,
) -> bytes:
    """Read the request's whole body, as UTF-8.

    Args:
        limit: maximum size in bytes, and the setting's name for error texts.
        seconds: deadline, and the setting's name for error texts.
        reserve: called with the length of each part before it is kept; may raise.

    Raises:
        ApiError: 415 not JSON or compressed, 413 too large, 408 too slow, 400 cut short; and whatever ``reserve``
            raises.
    """
    check_kind(request)
    bound, bound_name = limit
    too_large = ApiError(413, f"the body is larger than {bound_name} ({bound})", code="body_too_large", close=True)
    if request.content_length is not None and request.content_length > bound:
        raise too_large
    if request.get(EXPECTS_CONTINUE):
        await request.writer.write(_CONTINUE)
        request.writer.output_size = 0  # 100 Continue does not count as the beginning of the answer
    late = asyncio.TimeoutError()
    timer = asyncio.get_running_loop().call_later(seconds[0], request.content.set_exception, late)
    parts: list[bytes] = []
    size = 0
    try:
        while part := await request.content.readany():
            size += len(part)
            if size > bound:
                raise too_large
            reserve(len(part))
            parts.append(part)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {seconds[1]} ({seconds[0]:g} s)", code="body_timeout", close=True
        ) from None
    except (web.RequestPayloadError, ValueError) as error:
        raise ApiError(400, f"the body can't be read: {type(error).__name__}", code="bad_body", close=True) from None
    finally:
        timer.cancel()
    return as_utf8(b"".join(parts))
