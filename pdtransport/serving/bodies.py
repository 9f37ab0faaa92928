"""A request's body: so many bytes, within so long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from pdtransport.serving.errors import ApiError


async def read_body(
    request: web.Request,
    limit: tuple[int, str],
    seconds: tuple[float, str],
    reserve: Callable[[int], None] = lambda _nbytes: None,
) -> bytes:
    """The request's whole body. ``limit`` (bytes) and ``seconds`` come with the names that people know them by;
    ``reserve`` is told of each part's bytes before it is kept, and may raise.

    Raises:
        ApiError: 413 too large, 408 too slow, 400 cut short; and what ``reserve`` raises.
    """
    bound, bound_name = limit
    too_large = ApiError(413, f"the body is larger than {bound_name} ({bound})", code="body_too_large", close=True)
    if request.content_length is not None and request.content_length > bound:
        raise too_large
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
    return b"".join(parts)
