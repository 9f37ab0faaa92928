"""Enforces ``control.peers``: which hosts this instance connects to when a request names them, and at which address.

A name is resolved once, its address is checked, and exactly that address is called: a later change of the name's
address (DNS rebinding) has no effect.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass

from pdtransport.control import curve
from pdtransport.control.names import Names
from pdtransport.errors import SettingsError
from pdtransport.kv.fingerprint import plain
from pdtransport.settings import ControlSettings
from pdtransport.system.hosts import CURVE_PEER, is_loopback

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
MAX_SHOWN = 80  # characters of a host's name in a reason


@dataclass(frozen=True)
class CallVerdict:
    """``address`` to call; if empty, ``problem`` says in one line why the host must not be called."""

    address: str = ""
    problem: str = ""


class Reach:
    """The rule of ``control.peers``.

    Args:
        strict: hosts come from untrusted sources, such as a client's request: without ``control.peers``, only this
            machine may be called. If False, an application chooses them: without ``control.peers``, any host may be.
        clock: monotonic seconds.

    Raises:
        SettingsError: ``control.peers`` is needed but missing, or none of its CURVE keys is the one that called peers
            must prove.
    """

    def __init__(self, settings: ControlSettings, *, strict: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._peers = settings, settings.peers
        self._everybody = self._peers is None and not strict
        if self._peers is None and strict and not is_loopback(settings.host):
            raise SettingsError(
                f"control.peers is not set, and control.host {settings.host!r} is not loopback: list the prefill hosts "
                "from which pages may be fetched, as addresses, networks, names or curve:KEY ([]: none)"
            )
        peers = [peer for peer in self._peers or () if not peer.startswith(CURVE_PEER)]
        self._networks = [ipaddress.ip_network(peer) for peer in peers if "/" in peer]
        self._names = {peer for peer in peers if "/" not in peer}
        self._by_key = self._checked_keys(settings)
        # Separate queues: names made up by clients must not delay those listed in the settings.
        self._known, self._others = (Names(clock, settings.connect_s) for _ in range(2))

    def _checked_keys(self, settings: ControlSettings) -> bool:
        """Whether a listed CURVE key admits any host.

        libzmq must know the server's key before it connects, so only one key can count: the configured server key.
        """
        named = {peer.removeprefix(CURVE_PEER) for peer in self._peers or () if peer.startswith(CURVE_PEER)}
        if not named:
            return False
        keys = curve.load_keys(settings)
        if keys is None or keys.server.decode() not in named:
            raise SettingsError(
                "control.peers: none of its CURVE keys is the key that called peers must prove "
                "(control.curve_server_key, or our own public key if that is unset)"
            )
        return True

    def ask(self, host: str) -> CallVerdict | None:
        """The address at which ``host`` may be called, or why it may not.

        None while its name is being looked up: ask again. Never waits and never raises.
        """
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return self._ask_name(host)
        problem = self._why_not(host, host)
        return CallVerdict(problem=problem) if problem else CallVerdict(host)

    def close(self) -> None:
        self._known.close()
        self._others.close()

    def _ask_name(self, host: str) -> CallVerdict | None:
        name = host.rstrip(".").lower()
        listed = self._everybody or name in self._names or (self._peers is None and is_loopback(name))
        if not (listed or self._networks or self._by_key):
            return CallVerdict(problem=self._refusal(host))
        found = (self._known if listed else self._others).look_up(name)
        if found is None:
            return None
        if found.problem:
            return CallVerdict(problem=plain(found.problem, 300))
        problem = ""
        for address in sorted(found.addresses, key=lambda each: ":" in each):  # IPv4 first, like libzmq
            problem = self._why_not(address, host, named=name in self._names)
            if not problem:
                return CallVerdict(address)
        return CallVerdict(problem=f"{plain(host, MAX_SHOWN)} is {plain(found.addresses[0], 50)}: {problem}")

    def _why_not(self, address: str, host: str, *, named: bool = False) -> str:
        where = ipaddress.ip_address(address)
        where = getattr(where, "ipv4_mapped", None) or where
        if not (self._everybody or named or self._by_key or self._covers(where)):
            return self._refusal(host)
        if self._settings.needs_keys(address):
            return (
                f"{plain(address, MAX_SHOWN)} is not this machine, and this side has no CURVE keys: make a pair with "
                "`pdlaunch keys DIR` and set control.curve_public_key_file and control.curve_secret_key_file, or "
                "control.allow_plaintext"
            )
        return ""

    def _covers(self, address: Address) -> bool:
        if self._peers is None:
            return address.is_loopback
        return any(address.version == network.version and address in network for network in self._networks)

    def _refusal(self, host: str) -> str:
        shown = plain(host, MAX_SHOWN)
        if self._peers is None:
            return f"control.peers is not set, so pages are fetched only from loopback addresses: {shown} is not one"
        return f"{shown} is not in control.peers, the hosts from which pages may be fetched"
