"""The tier in Redis or Valkey: one string a chunk, named ``pdtkv:TENANT:KEY:NBYTES``.

The value is the sealed chunk. Pools on several hosts may share a server: each finds the others' chunks by scanning
names, at start and every ``rescan_s``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pdtransport.errors import SettingsError
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.settings import MAX_CHUNK_BYTES, RedisSettings
from pdtransport.pool.tiers.base import DIGEST_BYTES, HEADER_BYTES, Place, Stored, Tier, TierDown, TierError, fill

PREFIX = "pdtkv"
SCAN_COUNT = 1000  # COUNT of one SCAN command
_NAME = re.compile(rf"{PREFIX}:([A-Za-z0-9._\-]{{0,64}}):([0-9a-f]{{{2 * KEY_BYTES}}}):([0-9]{{1,10}})".encode())


class RedisTier(Tier):
    """Stores chunks at ``settings.url``. Connects at the first call.

    Raises:
        SettingsError: the redis package is missing, or the URL or the password file can't be used.
    """

    name = "redis"
    shared = True
    overhead_bytes = HEADER_BYTES
    exposed = "anyone who reaches the server may write to it"

    def __init__(self, settings: RedisSettings) -> None:
        try:
            import redis
        except ImportError:
            raise SettingsError("pool.redis needs the redis package: pip install 'pdtransport[pool]'") from None
        self.threads, self.rescan_s = settings.threads, settings.rescan_s
        self._down = (redis.ConnectionError, redis.TimeoutError, OSError)
        self._error = redis.RedisError
        try:
            file = settings.password_file
            password = file.read_text(encoding="utf-8").strip() if file is not None else None
            self._client: Any = redis.Redis.from_url(
                settings.url,
                password=password,
                socket_timeout=settings.timeout_s,
                socket_connect_timeout=settings.timeout_s,
                max_connections=settings.threads + 1,
            )
        except OSError as error:
            raise SettingsError(f"pool.redis.password_file: {file} can't be read ({error.strerror})") from None
        except ValueError as error:
            raise SettingsError(f"pool.redis.url: {error}") from None

    def probe(self) -> None:
        self._ask(self._client.ping)

    def scan(self) -> Iterator[Stored]:
        cursor = 0
        while True:
            cursor, names = self._ask(self._client.scan, cursor, f"{PREFIX}:*", SCAN_COUNT)
            found = [match for name in names if (match := _NAME.fullmatch(name))]
            matches = [match for match in found if 0 < int(match[3]) <= MAX_CHUNK_BYTES]
            pipeline = self._client.pipeline(transaction=False)
            for match in matches:
                pipeline.strlen(match[0])
            for match, stored in zip(matches, self._ask(pipeline.execute), strict=True):
                if stored:
                    yield Stored(bytes.fromhex(match[2].decode()), match[1].decode(), int(match[3]), stored)
            if cursor == 0:
                return

    def write(self, key: bytes, tenant: str, nbytes: int, pieces: Sequence[bytes | memoryview]) -> int:
        value = b"".join(pieces)
        self._ask(self._client.set, _name(key, tenant, nbytes), value)
        return len(value)

    def read(self, key: bytes, tenant: str, nbytes: int, place: Place) -> None:
        most = HEADER_BYTES + nbytes + DIGEST_BYTES  # GETRANGE includes byte `most`: a longer value is noticed
        value = self._ask(self._client.getrange, _name(key, tenant, nbytes), 0, most)
        if not value:
            raise TierError(f"chunk {key.hex()[:16]} no longer exists")
        fill(value, place)

    def delete(self, key: bytes, tenant: str, nbytes: int) -> None:
        self._ask(self._client.unlink, _name(key, tenant, nbytes))

    def _ask(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except self._down as error:
            raise TierDown(f"the server can't be reached: {error}") from None
        except self._error as error:  # out of memory, wrong password, ...
            raise TierError(f"the server refused: {error}") from None


def _name(key: bytes, tenant: str, nbytes: int) -> str:
    return f"{PREFIX}:{tenant}:{key.hex()}:{nbytes}"
