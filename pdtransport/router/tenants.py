"""Keeps tenants' prefixes apart, in the engines' prefix caches and in the pool.

vLLM and pdtransport separate prefixes by a request's ``cache_salt``. The router derives it from a secret, the tenant's
name and the client's own ``cache_salt``, so that no client can use another tenant's salt or learn its own. A key
without a tenant is a tenant of its own, with a salt derived from the key itself.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence

from pdtransport.errors import SettingsError
from pdtransport.router.keyfiles import ClientKey

MIN_SECRET = 32  # characters
Salter = Callable[[str], str]  # maps a client's own cache_salt ("": none) to the one that servers get


class Tenants:
    """Maps each key to its tenant. With a single, unnamed tenant nothing is salted.

    Args:
        share: keys without a tenant share what they cache, unsalted.

    Raises:
        SettingsError: keys name tenants and there is no secret, or the secret is too short.
    """

    def __init__(self, keys: Sequence[ClientKey], secret: str | None, *, share: bool = False) -> None:
        named = [each.tenant for each in keys if each.tenant]
        if named and secret is None:
            raise SettingsError(
                f"api_key_file names tenants ({named[0]}, ...) and there is no secret to salt their prefixes with: "
                "set tenant_secret_file (for example: openssl rand -hex 32 > FILE)"
            )
        if secret is not None and len(secret) < MIN_SECRET:
            raise SettingsError(
                f"tenant_secret_file holds {len(secret)} characters, at least {MIN_SECRET} are needed: make one with "
                "openssl rand -hex 32"
            )
        apart = len(keys) > 1 and not share
        self._salters = [
            _salter(secret or "", b"tenant", each.tenant)
            if each.tenant
            else (_salter(each.key, b"key", "") if apart else None)
            for each in keys
        ]

    def salter(self, place: int | None) -> Salter | None:
        """The salter for requests with the key at index ``place``; None: their cache_salt is left unchanged."""
        return None if place is None else self._salters[place]


def _salter(secret: str, kind: bytes, tenant: str) -> Salter:
    of_tenant = hmac.digest(secret.encode(), b"pdtransport " + kind + b"\0" + tenant.encode(), "sha256")

    def salt(own: str) -> str:
        return hmac.new(of_tenant, own.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    return salt
