"""Links by name: those that come with pdtransport, and other packages' by entry points.

An entry point in the group ``pdtransport.links`` names a subclass of :class:`~pdtransport.links.base.Link`; settings
refer to it by the entry point's name, which is the class's ``name`` too. It is loaded when it is first needed. A link's
class states its capabilities; no other module names links. ``docs/adding/link.md`` is the guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import get_args

from pdtransport import plugins
from pdtransport.errors import SettingsError
from pdtransport.links.base import Link, MemoryKind
from pdtransport.settings import LinkSettings, Settings

GROUP = "pdtransport.links"
# Found without pip's metadata, so also in a checkout; another package's link can't use one of these names.
OURS = {
    name: EntryPoint(name, f"pdtransport.links.{where}", GROUP)
    for name, where in (
        ("cuda_ipc", "cuda_ipc:CudaIpcLink"),
        ("cma", "cma:CmaLink"),
        ("shm", "shm:ShmLink"),
        ("ucx", "ucx.link:UcxLink"),
    )
}


def names() -> list[str]:
    """Names of all links that are installed here."""
    return sorted({*OURS, *plugins.installed(GROUP)})


def wanted(settings: LinkSettings) -> tuple[str, ...]:
    """Names of the links that these settings allow, best first."""
    return (settings.require,) if settings.require else tuple(dict.fromkeys(settings.order))


def load(name: str) -> type[Link]:
    """The class of a link.

    Raises:
        SettingsError: there is no link of this name, it can't be loaded, or its class lacks a required attribute.
    """
    point = OURS.get(name) or plugins.installed(GROUP).get(name)
    if point is None:
        known = ", ".join(names())
        raise SettingsError(f"there is no link {name!r}, only {known}: correct the name or install its package")
    kind = plugins.load(point, f"link {name}: {point.value}")
    if not isinstance(kind, type) or not issubclass(kind, Link):
        raise SettingsError(f"link {name}: {point.value} is not a subclass of pdtransport.links.base.Link")
    stated = [getattr(kind, field, None) for field in ("name", "memory", "one_host")]
    if stated[0] != name or not isinstance(stated[2], bool) or not set(stated[1] or ("",)) <= {*get_args(MemoryKind)}:
        raise SettingsError(
            f"link {name}: {point.value} must state name = {name!r}, memory = a tuple of 'host' and 'gpu', and one_host"
        )
    return kind


def check_links(settings: Settings) -> None:
    """Check the links in ``settings`` against the installed links.

    Raises:
        SettingsError: one line that names the key, what is wrong and what is allowed.
    """
    links = settings.links
    named = {f"order.{place}": name for place, name in enumerate(links.order)}
    for key, name in {**named, **({"require": links.require} if links.require else {})}.items():
        try:
            load(name)
        except SettingsError as error:
            raise SettingsError(f"links.{key}: {error}") from None
    if settings.integrity.checksum == "off":
        unsafe = [name for name in wanted(links) if load(name).needs_checksums]
        if unsafe:
            raise SettingsError(
                f"integrity.checksum: off needs links.order without {' and '.join(unsafe)}: only checksums detect "
                "pages that change while they move"
            )


def host_links(order: Sequence[str], *, checksums: bool) -> tuple[str, ...]:
    """Those of ``order`` that move host memory, with or without checksums; else defaults that reach any host."""
    kinds = [kind for kind in map(load, order) if "host" in kind.memory and (checksums or not kind.needs_checksums)]
    if not kinds:
        kinds = [kind for kind in map(load, LinkSettings().order) if "host" in kind.memory and not kind.one_host]
    return tuple(kind.name for kind in kinds)
