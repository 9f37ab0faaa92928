"""The prefill workers whose KV other requests may reuse (settings ``share_received`` and ``trusted_producers``).

Each engine's adapter keeps all other KV out of the prefix cache; vLLM's does so in ``vllm/patches/withheld.py``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from pdtransport.errors import SettingsError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ALL_PORTS = range(1, 65536)
_PORTS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\s/]+):(?P<first>\d{1,5})(-(?P<last>\d{1,5}))?")
_HOST = re.compile(r"[A-Za-z0-9_.\-]+")


class Producers:
    """A set of trusted prefill workers, identified by the address at which this instance connects to them.

    This instance opens the connection itself, so no other host can claim such an address. A worker's engine name proves
    nothing: the worker sends it itself.

    Args:
        entries: HOST, ADDRESS, NETWORK (10.0.0.0/24), HOST:PORT or HOST:FIRST-LAST.

    Raises:
        SettingsError: an entry has none of these forms.
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
        """Whether all ``ranks`` workers listening at ``port``, ``port + 1``, ... are in the set.

        Args:
            hosts: the host as the request named it, and the address to connect to.
        """
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
