"""The tier in S3-compatible object storage: one object a chunk, named ``PREFIX/t-TENANT/KEY.NBYTES``.

The object is the sealed chunk. Pools on several hosts may share a bucket and prefix: each finds the others' chunks by
listing names, at start and every ``rescan_s``. Credentials come from the places where botocore looks, never from a
command line.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pdtransport.errors import SettingsError
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.settings import MAX_CHUNK_BYTES, S3Settings
from pdtransport.pool.tiers.base import DIGEST_BYTES, HEADER_BYTES, Place, Stored, Tier, TierDown, TierError

PROBE_S = 5.0  # between probes of a server that is down: each request may cost money
SLOW = 10  # time limit for reading one chunk, as a multiple of timeout_s
_NAME = re.compile(rf"t-([A-Za-z0-9._\-]{{0,64}})/([0-9a-f]{{{2 * KEY_BYTES}}})\.([0-9]{{1,10}})")


class S3Tier(Tier):
    """Stores chunks in ``settings.bucket``, which must exist. Connects at the first call.

    Raises:
        SettingsError: the botocore package is missing, it refuses the settings, or the credentials file can't be read.
    """

    name = "s3"
    shared = True
    overhead_bytes = HEADER_BYTES
    exposed = "anyone with rights to the bucket may write to it"

    def __init__(self, settings: S3Settings) -> None:
        try:
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError
            from botocore.session import Session
        except ImportError:
            raise SettingsError("pool.s3 needs the botocore package: pip install 'pdtransport[pool-s3]'") from None
        self.threads, self.rescan_s = settings.threads, settings.rescan_s
        self._bucket, self._prefix, self._slow_s = settings.bucket, settings.prefix, SLOW * settings.timeout_s
        self._refused, self._error = ClientError, BotoCoreError
        self._down = (ConnectionError, HTTPClientError, OSError)
        self._probe_at = 0.0
        style = "path" if settings.addressing == "auto" and settings.endpoint else settings.addressing
        file = settings.credentials_file
        try:
            if file is not None:
                file.read_bytes()
            session = Session(profile=settings.profile)
            if file is not None:
                session.set_config_variable("credentials_file", str(file))
            self._client: Any = session.create_client(
                "s3",
                endpoint_url=settings.endpoint,
                region_name=settings.region,
                config=Config(
                    connect_timeout=settings.timeout_s,
                    read_timeout=settings.timeout_s,
                    max_pool_connections=settings.threads + 1,
                    retries={"total_max_attempts": 1},  # a chunk that can't be read is recomputed
                    s3={"addressing_style": style},
                    # Chunks have their own checksums, and servers other than AWS may not support these.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        except OSError as error:
            raise SettingsError(f"pool.s3.credentials_file: {file} can't be read ({error.strerror})") from None
        except (BotoCoreError, ValueError) as error:
            raise SettingsError(f"pool.s3: {_line(error)}") from None

    def probe(self) -> None:
        now = time.monotonic()
        if now < self._probe_at:
            raise TierDown("the server is unreachable and will be probed again")
        self._probe_at = now + PROBE_S
        self._ask("list_objects_v2", Prefix=f"{self._prefix}/", MaxKeys=1)

    def scan(self) -> Iterator[Stored]:
        more: dict[str, str] = {}
        while True:
            page = self._ask("list_objects_v2", Prefix=f"{self._prefix}/", **more)
            for found in page.get("Contents", ()):
                match = _NAME.fullmatch(str(found["Key"])[len(self._prefix) + 1 :])
                if match is None:
                    continue
                nbytes, stored = int(match[3]), int(found["Size"])
                if 0 < nbytes <= MAX_CHUNK_BYTES and stored <= MAX_CHUNK_BYTES + HEADER_BYTES + DIGEST_BYTES:
                    yield Stored(bytes.fromhex(match[2]), match[1], nbytes, stored)
            if not page.get("IsTruncated") or not page.get("NextContinuationToken"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def write(self, key: bytes, tenant: str, nbytes: int, pieces: Sequence[bytes | memoryview]) -> int:
        value = b"".join(pieces)
        self._ask("put_object", Key=self._name(key, tenant, nbytes), Body=value)
        return len(value)

    def read(self, key: bytes, tenant: str, nbytes: int, place: Place) -> None:
        answer = self._ask("get_object", Key=self._name(key, tenant, nbytes))
        with contextlib.closing(answer["Body"]) as body:
            try:
                parts = place(body.read(HEADER_BYTES))
                if answer["ContentLength"] != HEADER_BYTES + sum(map(len, parts)):
                    raise TierError(f"chunk {key.hex()[:16]} is damaged: its object has another length")
                self._fill(parts, body)
            except (self._error, OSError) as error:  # botocore wraps urllib3's errors
                raise TierDown(f"the server ended the answer early: {_line(error)}") from None

    def _fill(self, parts: Sequence[memoryview], body: Any) -> None:
        ends = time.monotonic() + self._slow_s
        for part in parts:
            done = 0
            while done < len(part):
                got = body.readinto(part[done:])
                done += got
                if not got:
                    raise TierError("the object ends early")
                if time.monotonic() > ends:
                    raise TierDown(f"the server did not send a chunk within {self._slow_s:g} s")

    def delete(self, key: bytes, tenant: str, nbytes: int) -> None:
        self._ask("delete_object", Key=self._name(key, tenant, nbytes))

    def _ask(self, what: str, **arguments: Any) -> Any:
        try:
            return getattr(self._client, what)(Bucket=self._bucket, **arguments)
        except self._refused as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("NoSuchKey", "404"):
                raise TierError("the object no longer exists") from None
            if status >= 500 or status in (401, 403, 429) or code == "NoSuchBucket":  # would fail for every chunk
                raise TierDown(f"the server refuses: {_line(error)}") from None
            raise TierError(f"the server refused: {_line(error)}") from None
        except self._down as error:
            raise TierDown(f"the server can't be reached: {_line(error)}") from None
        except self._error as error:
            raise TierDown(_line(error)) from None  # no credentials, ...

    def _name(self, key: bytes, tenant: str, nbytes: int) -> str:
        return f"{self._prefix}/t-{tenant}/{key.hex()}.{nbytes}"


def _line(error: Exception) -> str:
    return str(error).replace("\n", " ")[:300]
