"""The target ``topology``: files for ``pdlaunch``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pdtransport.errors import SettingsError
from pdtransport.launch.reading import load

_FILE = Path(tempfile.gettempdir()) / "pdtransport-fuzz-topology.yaml"


def topology(data: bytes) -> None:
    """A topology file: it loads, or one line says what is wrong and where."""
    _FILE.write_bytes(data)
    said = ""
    try:
        load(_FILE)
    except SettingsError as error:
        said = str(error)
    assert not said or str(_FILE) in said
