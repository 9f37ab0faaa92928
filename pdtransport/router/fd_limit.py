"""How many client connections fit into the number of files that this process may open."""

from __future__ import annotations

import bisect
import logging

from pdtransport.errors import SettingsError
from pdtransport.router.settings import RouterSettings
from pdtransport.router.watches import MAX_WATCHED
from pdtransport.serving.listening import BACKLOG
from pdtransport.system.descriptors import raise_limit

log = logging.getLogger("pdtransport.router")

ADMIN_CONNECTIONS = 128  # of the admin port, used by people and a metrics collector
_SPARE = 256  # descriptors for everything but connections: files, probes, threads


def room(settings: RouterSettings) -> int:
    """Number of client connections: ``max_connections``, or fewer if this process may not open as many files.

    Raises the soft limit as far as the hard limit allows.

    Raises:
        SettingsError: not even one connection fits.
    """
    wanted = _descriptors(settings.max_connections, settings)
    soft = raise_limit(wanted)
    if soft >= wanted:
        return settings.max_connections
    sizes = range(1, settings.max_connections + 1)
    fit = bisect.bisect_right(sizes, soft, key=lambda size: _descriptors(size, settings))
    if not fit:
        raise SettingsError(
            f"this process may open {soft} files at most, and the router needs {_descriptors(1, settings)} for "
            "one client: raise the limit (ulimit -n)"
        )
    log.warning(
        "max_connections is %d, but with at most %d open files only %d fit: raise the limit (ulimit -n) or set less",
        settings.max_connections, soft, fit,
    )  # fmt: skip
    return fit


def _descriptors(connections: int, settings: RouterSettings) -> int:
    """The most descriptors that this many client connections need.

    One per client, two for the servers of a request in flight, and those of connections accepted only to be closed.
    """
    admin = 0 if settings.admin_port is None else 2 * min(ADMIN_CONNECTIONS, settings.max_connections)
    watched = 2 * min(MAX_WATCHED, sum(one.tp_size for one in settings.decode))
    return (
        watched + connections + 2 * min(connections, settings.max_inflight) + min(connections, BACKLOG) + admin + _SPARE
    )
