"""Extensions of other packages, found by entry points and loaded when a setting names them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pdtransport.errors import SettingsError


def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of ``group`` by name."""
    return {point.name: point for point in entry_points(group=group)}


def load(point: EntryPoint, what: str) -> Any:
    """Load an entry point's object; ``what`` begins the text of an error.

    Raises:
        SettingsError: the object can't be loaded.
    """
    try:
        return point.load()
    except Exception as error:
        raise SettingsError(f"{what} can't be loaded: {type(error).__name__}: {error}") from error


def make(what: str, group: str, name: str, *arguments: Any) -> Any:
    """Load an entry point and call it with ``arguments``.

    Args:
        what: kind of object that it creates, for the text of an error.

    Raises:
        SettingsError: no entry point has this name, its object can't be loaded, or the object refuses the arguments.
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
