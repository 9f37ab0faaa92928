"""Checks API keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from aiohttp import web

from pdtransport.serving.errors import ApiError


class ApiKeys:
    """The keys of which a request must send one; without keys every request is accepted."""

    def __init__(self, keys: Sequence[str], what: str) -> None:
        self._digests = tuple(_digest(key.encode()) for key in keys)
        self._what = what

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, request: web.Request) -> int | None:
        """Index of the key that the request sends; None if there are no keys. Takes the same time for all keys.

        Raises:
            ApiError: 401, the request has no known key.
        """
        if not self._digests:
            return None
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = _digest(token.strip().encode("utf-8", "surrogateescape"))
        known = [hmac.compare_digest(given, digest) for digest in self._digests]  # always compares all
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                401, f"no valid {self._what}: send it as Authorization: Bearer KEY",
                kind="authentication_error", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"}, close=True,
            )  # fmt: skip
        return known.index(True)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # equal lengths, so that timing does not reveal a key's length
