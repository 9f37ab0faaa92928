"""What other packages add, by entry points: loaded when a setting names it."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pdtransport.errors import SettingsError


def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of ``group`` by name."""
    return {point.name: point for point in entry_points(group=group)}


def load(point: EntryPoint, what: str) -> Any:
    """What an entry point names; ``what`` begins an error's text.

    Raises:
        SettingsError: it can't be loaded.
    """
    try:
        return point.load()
    except Exception as error:
        raise SettingsError(f"{what} can't be loaded: {type(error).__name__}: {error}") from error


def make(what: str, group: str, name: str, *arguments: Any) -> Any:
    """Load an entry point and call it with ``arguments``.

    Args:
        what: what it makes, for an error's text.

    Raises:
        SettingsError: there is none of this name, it can't be loaded, or it refuses the arguments.
    """
    points = installed(group)
    if name not in points:
        known = ", ".join(sorted(points)) or "none is installed"
        raise SettingsError(f"there is no {name!r} among the entry points of {group} ({known}): install its package")
    made = load(points[name], f"{group} {name}:")
    try:
        return made(*arguments)
    except SettingsError:
        raise
    except Exception as error:
        raise SettingsError(f"{what} {name}: {type(error).__name__}: {error}") from error
