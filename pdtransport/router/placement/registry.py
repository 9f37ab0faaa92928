"""Placement policies by name: ``least_loaded``, and other packages' by entry points.

Entry points in the group ``pdtransport.router.placement`` are callables that take the router's ``placement`` settings
and return a :class:`~pdtransport.router.placement.base.PlacementPolicy`. The setting ``placement.policy`` refers to
them by the entry point's name. Only the named policy is loaded.
"""

from __future__ import annotations

from pdtransport import plugins
from pdtransport.errors import SettingsError
from pdtransport.router.placement.base import PlacementPolicy
from pdtransport.router.settings import RouterPlacement

GROUP = "pdtransport.router.placement"
OWN = "least_loaded"


def check_policy(name: str) -> None:
    """Check that there is a policy of this name, without loading it.

    Raises:
        SettingsError: there is none.
    """
    known = [OWN, *sorted(plugins.installed(GROUP))]
    if name not in known:
        raise SettingsError(
            f"there is no placement policy {name!r} ({', '.join(known)}): install its package, which has an entry "
            f"point in the group {GROUP}, or set placement.policy to an installed one"
        )


def other_policy(settings: RouterPlacement) -> PlacementPolicy | None:
    """Make the policy that the settings name; None for ``least_loaded``.

    Raises:
        SettingsError: there is none of this name, it can't be loaded, or it refuses these settings.
    """
    name = settings.policy
    if name == OWN:
        return None
    check_policy(name)
    policy = plugins.make("placement.policy", GROUP, name, settings)
    if not isinstance(policy, PlacementPolicy):
        kind = type(policy).__name__
        raise SettingsError(f"placement.policy {name}: its entry point returned a {kind}, not a PlacementPolicy")
    return policy
