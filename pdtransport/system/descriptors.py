"""How many files this process may open."""

from __future__ import annotations

import resource


def raise_limit(wanted: int) -> int:
    """Raise the soft limit to ``wanted`` where the hard one allows, never lower it; returns how many may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
