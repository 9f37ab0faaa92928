"""Whose KV that was handed over may enter caches that other requests share: vLLM's prefix cache, and the pool.

A producer computes what it says that it computed, or it does not: checksums show that pages arrived as they were sent,
not that they are of this prompt. Who may hand over to this instance, and may send it requests as well, can give any
prompt any KV. A request always uses what it was given, for it was asked for that; with ``share_received`` its blocks
stay its own: they never enter the prefix cache, and no chunk of it is stored.
"""

from __future__ import annotations

import ipaddress
import re
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pdtransport.errors import SettingsError
from pdtransport.settings import Settings

if TYPE_CHECKING:
    from vllm.v1.request import Request

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ALL_PORTS = range(1, 65536)
_PORTS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\s/]+):(?P<first>\d{1,5})(-(?P<last>\d{1,5}))?")
_HOST = re.compile(r"[A-Za-z0-9_.\-]+")


class Producers:
    """Prefill workers by where this instance reaches them: it dials them itself, so nobody else can say this of
    itself; their names are what they call themselves.

    Args:
        entries: HOST, ADDRESS, NETWORK (10.0.0.0/24), HOST:PORT or HOST:FIRST-LAST.

    Raises:
        SettingsError: an entry is none of these.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self._networks: list[tuple[Network, range]] = []
        self._names: list[tuple[str, range]] = []
        for entry in entries:
            host, ports = _cut(entry)
            try:
                self._networks.append((ipaddress.ip_network(_plain(host)), ports))
            except ValueError:
                if not _HOST.fullmatch(host):
                    raise SettingsError(
                        f"trusted_producers: {entry[:80]!r} is none of HOST, NETWORK (10.0.0.0/24), HOST:PORT and "
                        "HOST:FIRST-LAST"
                    ) from None
                self._names.append((_plain(host), ports))

    def cover(self, hosts: Sequence[str], port: int, ranks: int) -> bool:
        """Whether all of the ``ranks`` workers that listen at ``port``, ``port + 1``, ... are among them. ``hosts``:
        the host as it was named, and its address as it is called."""
        ports: list[range] = []
        for host in map(_plain, hosts):
            ports += [some for name, some in self._names if name == host]
            try:
                address = ipaddress.ip_address(host)
            except ValueError:
                continue
            ports += [some for network, some in self._networks if address in network]
        return bool(ports) and all(any(each in some for some in ports) for each in range(port, port + ranks))


def _cut(entry: str) -> tuple[str, range]:
    found = _PORTS.fullmatch(entry)
    if found is None:
        return entry, ALL_PORTS
    first = int(found["first"])
    return found["host"], range(first, int(found["last"] or first) + 1)


def _plain(host: str) -> str:
    host = host.strip("[]").rstrip(".").lower()
    return "127.0.0.1" if host == "localhost" else host


class Withheld:
    """Requests of which nothing is shared. Does nothing where ``share_received`` is all.

    Raises:
        SettingsError: ``trusted_producers`` can't be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._mode = settings.share_received
        self._trusted = Producers(settings.trusted_producers)
        self._requests: weakref.WeakSet[Request] = weakref.WeakSet()

    def bind(self, manager: Any) -> None:
        """The engine's cache manager is there: what it enters into the prefix cache passes by here from now on.

        Raises:
            SettingsError: this vLLM enters blocks in another way.
        """
        if self._mode == "all":
            return
        coordinator = getattr(manager, "coordinator", None)
        enter = getattr(coordinator, "cache_blocks", None)
        if not callable(enter):
            raise SettingsError(
                f"share_received: {self._mode} can't be kept with this vLLM, whose prefix cache is another one: use a "
                "version that pdtransport knows, or share_received: all"
            )

        def cache_blocks(request: Request, *how: Any, **more: Any) -> Any:
            return None if request in self._requests else enter(request, *how, **more)

        coordinator.cache_blocks = cache_blocks  # type: ignore[union-attr]

    def takes(self, request: Request, hosts: Sequence[str], port: int, ranks: int) -> bool:
        """This request is about to take pages from there (``hosts``: as :meth:`Producers.cover`); True if nothing of it
        is to be shared from now on."""
        if self._mode == "all" or (self._mode == "trusted" and self._trusted.cover(hosts, port, ranks)):
            return False
        self._requests.add(request)
        return True
