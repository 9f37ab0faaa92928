"""Host names and addresses in settings: loopback check, and validation of ``control.peers`` entries."""

from __future__ import annotations

import ipaddress
import re

CURVE_PEER = "curve:"  # prefix of a key in control.peers: a host name may look just like a key
_CURVE_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_\-]{0,61}[A-Za-z0-9_])?"
_LAST_LABEL = r"[A-Za-z_]([A-Za-z0-9_\-]{0,61}[A-Za-z0-9_])?"  # no leading digit: that is a mistyped address
_NAME = re.compile(rf"(?=.{{1,253}}\Z)({_LABEL}\.)*{_LAST_LABEL}\.?")


def is_loopback(host: str) -> bool:
    """Whether ``host`` is certainly this machine: ``localhost`` or a loopback address.

    A name that only looks like one (127.0.0.1.example.org) is not.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def checked_peer(text: str) -> str:
    """Normalise an entry of ``control.peers``: a network, a name in lower case, or a CURVE key.

    Raises:
        ValueError: ``text`` is none of these; one line says what is wrong.
    """
    shown = f"{text[:80]!r}"
    if text.startswith(CURVE_PEER):
        if not _CURVE_KEY.fullmatch(text.removeprefix(CURVE_PEER)):
            raise ValueError(
                f"{CURVE_PEER} must be followed by a CURVE public key of 40 characters (Z85): see `pdlaunch keys`"
            )
        return text
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        if "host bits" in str(error):
            network = ipaddress.ip_network(text, strict=False)
            raise ValueError(f"{shown} is an address within a network: write {network}, or only the address") from None
    if _NAME.fullmatch(text):
        return text.rstrip(".").lower()
    hint = ""
    if _CURVE_KEY.fullmatch(text):
        hint = f"; a CURVE public key is written {CURVE_PEER}KEY"
    elif "*" in text:
        hint = "; there are no wildcards: 0.0.0.0/0 and ::/0 are all addresses"
    raise ValueError(f"{shown} is not an address, network (10.1.0.0/16) or host name{hint}")
