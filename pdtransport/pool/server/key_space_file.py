"""A file that keeps the engines' key spaces for the pool's next start.

With it, people and routers can look prompts up before an engine has connected. It holds no salts, since engines do not
report them (:class:`~pdtransport.pool.core.key_spaces.Space`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from pdtransport.pool.core.key_spaces import parse_spaces
from pdtransport.pool.messages import MAX_SPACE
from pdtransport.pool.settings import PoolSettings
from pdtransport.system.private_files import is_private, open_private, open_regular

logger = logging.getLogger("pdtransport.pool")

MAX_SPACES = 64  # key spaces kept; beyond, the one reported longest ago is dropped
MAX_FILE = 8 * MAX_SPACES * MAX_SPACE  # bytes; 8 allows for JSON escapes
END_S = 2.0  # how long close() waits for the last write


def spaces_path(settings: PoolSettings) -> Path:
    """Path of the file: in the disk tier's directory if there is one that only this user can access, else ``pool.dir``.

    The disk tier's chunks outlive the pool, and their key spaces with them.
    """
    if settings.disk is not None and is_private(settings.disk.path):
        return settings.disk.path / "spaces.json"
    return settings.dir / f"{settings.name}.spaces"


class SpaceFile:
    """Reads and writes the file. Writes run in a thread of their own, so that a hung file system blocks no caller."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = threading.Lock()
        self._next: Sequence[str] | None = None
        self._thread: threading.Thread | None = None

    def read(self) -> list[str]:
        """The kept key spaces as JSON texts, the latest last; invalid ones are left out."""
        try:
            with open(open_regular(self._path), "rb") as file:
                texts = json.loads(file.read(MAX_FILE))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is damaged"
            logger.warning(
                "%s: key spaces of an earlier run can't be read (%s): engines will report them again", self._path, why
            )
            return []
        return _sound(texts if isinstance(texts, list) else ())[-MAX_SPACES:]

    def write(self, texts: Sequence[str]) -> None:
        """Replace the file's content with these, in the background. Returns at once."""
        with self._guard:
            self._next = texts
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pdpool-spaces", daemon=True)
                self._thread.start()

    def close(self) -> None:
        thread = self._thread
        if thread is not None:
            thread.join(END_S)

    def _work(self) -> None:
        while True:
            with self._guard:
                texts, self._next = self._next, None
                if texts is None:
                    self._thread = None
                    return
            try:
                self._replace(json.dumps(_sound(texts)).encode())
            except OSError as error:
                logger.warning("%s: key spaces can't be kept for the next start (%s)", self._path, error.strerror)

    def _replace(self, raw: bytes) -> None:
        draft = self._path.with_name(f".{self._path.name}.new")
        try:
            with open(open_private(draft, os.O_WRONLY | os.O_TRUNC), "wb") as file:
                file.write(raw)
            draft.replace(self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise


def _sound(texts: Sequence[object]) -> list[str]:
    """The texts that parse as key spaces. None of these can contain a salt."""
    return [text for text in texts if isinstance(text, str) and len(text) <= MAX_SPACE and parse_spaces([text])]
