"""A request's body: JSON, as it is (not compressed), so many bytes, within so long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from aiohttp import hdrs, web

from pdtransport.serving.errors import ApiError

EXPECTS_CONTINUE = web.RequestKey("EXPECTS_CONTINUE", bool)  # the client waits to be told that its body is wanted
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_MARKS = (b"\xef\xbb\xbf", b"\xfe\xff", b"\xff\xfe")  # byte-order marks, but for UTF-32's that begins with a zero


def check_kind(request: web.BaseRequest) -> None:
    """Look at what a body says that it is, before anything of it is read.

    Raises:
        ApiError: 415, it is not JSON, or compressed; 501, it comes in a transfer coding that is not known.
    """
    kind = request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page can send other types to any server that its visitor reaches, but this one only with its consent.
        raise ApiError(
            415, "the body must be application/json: say so in Content-Type", code="bad_content_type", close=True,
            headers={"Accept-Post": "application/json"},
        )  # fmt: skip
    encodings = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())).lower().split(",")
    if any(encoding.strip() not in {"", "identity"} for encoding in encodings):
        raise ApiError(
            415, "the body must not be compressed: send it without Content-Encoding (vLLM takes none either)",
            code="bad_content_encoding", close=True, headers={hdrs.ACCEPT_ENCODING: "identity"},
        )  # fmt: skip
    if request.headers.get(hdrs.TRANSFER_ENCODING, "chunked").strip().lower() != "chunked":
        raise ApiError(501, "the only transfer coding is chunked", code="bad_transfer_encoding", close=True)


def as_utf8(raw: bytes) -> bytes:
    """JSON in UTF-8: the same bytes, or those of a body in UTF-16, UTF-32 or with a byte-order mark. What is none of
    these comes back as it is, for whoever parses it."""
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
    """The request's whole body, in UTF-8. ``limit`` (bytes) and ``seconds`` come with the names that people know them
    by; ``reserve`` is told of each part's bytes before it is kept, and may raise.

    Raises:
        ApiError: 415 not JSON or compressed, 413 too large, 408 too slow, 400 cut short; what ``reserve`` raises.
    """
    check_kind(request)
    bound, bound_name = limit
    too_large = ApiError(413, f"the body is larger than {bound_name} ({bound})", code="body_too_large", close=True)
    if request.content_length is not None and request.content_length > bound:
        raise too_large
    if request.get(EXPECTS_CONTINUE):
        await request.writer.write(_CONTINUE)
        request.writer.output_size = 0  # the answer itself has not begun
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
