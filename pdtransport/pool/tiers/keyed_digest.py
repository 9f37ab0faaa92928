"""Keyed digests of chunks in tiers that others can write to: chunks can't be forged without the key.

A digest is HMAC-SHA256 over a chunk's header, which holds the chunk's key, and over its bytes as stored. On CPUs with
SHA instructions that is twice as fast as keyed BLAKE2b. The header has an id of the HMAC key, so that keys can be
rotated: of the keys in the key file, the first one signs and all verify.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

from pdtransport.errors import SettingsError
from pdtransport.pool.settings import PoolSettings
from pdtransport.pool.tiers.base import TierError
from pdtransport.serving.keyfiles import read_lines
from pdtransport.system.private_files import is_private, make_private_folder

ID_BYTES = 7
UNSIGNED = bytes(ID_BYTES)  # key id of a chunk without a digest
MIN_KEY = 32  # characters
MAX_KEYS = 4

Piece = bytes | bytearray | memoryview


class Forged(TierError):
    """A chunk's digest is missing, made with an unknown key, or wrong. ``kind``: missing, unknown_key or wrong."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Signer:
    """Makes and verifies digests. Thread-safe.

    Args:
        keys: the lines of the key file; the first key signs.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        made = [hmac.digest(key.encode(), b"pdtkv digests of chunks", "sha256") for key in keys]
        self._keys = {_id_of(key): key for key in made}
        self.id = next(iter(self._keys))

    def sign(self, header: Piece, pieces: Sequence[Piece]) -> bytes:
        """The digest of a chunk, made with the first key. The header must name that key (:attr:`id`)."""
        return self._digest(self._keys[self.id], header, pieces)

    def verify(self, key_id: bytes, header: Piece, pieces: Sequence[Piece], digest: Piece) -> None:
        """Verify a chunk's digest.

        Raises:
            Forged: the digest is wrong.
        """
        if not hmac.compare_digest(self._digest(self._keys[key_id], header, pieces), bytes(digest)):
            raise Forged("wrong", "a chunk's digest does not match its bytes: the chunk was forged or is damaged")

    def check_key(self, key_id: bytes) -> None:
        """Check the key id in a header.

        Raises:
            Forged: the header names no digest, or one made with a key that this signer lacks.
        """
        if key_id == UNSIGNED:
            raise Forged(
                "missing", "a chunk carries no digest: it was written without the key, or before there was one"
            )
        if key_id not in self._keys:
            raise Forged(
                "unknown_key",
                "a chunk's digest was made with a key that pool.digest_key_file lacks: give all pools that share "
                "this tier the same file",
            )

    @staticmethod
    def _digest(key: bytes, header: Piece, pieces: Sequence[Piece]) -> bytes:
        made = hmac.new(key, header, "sha256")
        for piece in pieces:
            made.update(piece)
        return made.digest()


def _id_of(key: bytes) -> bytes:
    return hmac.digest(key, b"pdtkv key's number", "sha256")[:ID_BYTES]


def load_signer(path: Path) -> Signer:
    """Make a signer from a file of keys (``pool.digest_key_file``), one a line.

    Raises:
        SettingsError: the file can't be read, is not this user's or root's, is open to others, or holds no key, a
            short key or too many.
    """
    setting = "pool.digest_key_file"
    keys = read_lines(path, setting)
    found = path.stat()
    if found.st_uid not in (0, os.getuid()) or stat.S_IMODE(found.st_mode) & 0o077:
        raise SettingsError(f"{setting}: {path} must be user {os.getuid()}'s and closed to others: chmod 600 it")
    if len(keys) > MAX_KEYS:
        raise SettingsError(f"{setting}: {path} holds {len(keys)} keys, at most {MAX_KEYS} are allowed")
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY:
            raise SettingsError(
                f"{setting}: key {number} of {path} has {len(key)} characters, at least {MIN_KEY} are needed: create "
                "one with openssl rand -hex 32"
            )
    return Signer(keys)


def keep_key(path: Path) -> None:
    """Create a key file with a new random key, unless the file exists.

    Raises:
        SettingsError: the file can't be created.
    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        make_private_folder(path.parent)
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(f"{secrets.token_hex(32)}\n")
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)  # atomic: no reader sees half a file
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(
            f"pool.digest_key_file: no key can be created at {path} ({error.strerror}): create one elsewhere and set "
            "the option to its path"
        ) from None


def wants_key(settings: PoolSettings) -> bool:
    """Whether a pool with these settings may need a digest key: the chunks of some tier may carry digests."""
    disk = settings.disk is not None and not is_private(settings.disk.path)
    below = settings.disk or settings.redis or settings.s3 or settings.tiers
    if settings.digest == "all":
        return bool(below)
    return settings.digest == "auto" and bool(disk or settings.redis or settings.s3 or settings.tiers)
