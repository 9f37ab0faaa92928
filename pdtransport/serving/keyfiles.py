"""Reads files with one secret per line."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from pdtransport.errors import SettingsError

log = logging.getLogger("pdtransport.serving")

MAX_KEY_FILE = 1 << 20  # bytes


def read_lines(path: Path, setting: str) -> list[str]:
    """The non-blank lines of a file of secrets.

    Raises:
        SettingsError: the file can't be read or is empty; the text never shows its content.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_KEY_FILE + 1)
            mode = os.fstat(file.fileno()).st_mode
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"{setting}: can't read {path}: {reason}") from None
    if len(raw) > MAX_KEY_FILE:
        raise SettingsError(f"{setting}: {path} is larger than {MAX_KEY_FILE} bytes: check that it is the right file")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise SettingsError(f"{setting}: {path} has no key: write one per line, or remove the setting")
    if mode & stat.S_IRWXO:
        log.warning("%s: other users of this machine can read or change %s; chmod 600 it", setting, path)
    return lines
