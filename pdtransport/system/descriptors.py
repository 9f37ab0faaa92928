"""The limit of open files of this process."""

from __future__ import annotations

import resource


def raise_limit(wanted: int) -> int:
    """Raise the soft limit to ``wanted``, as far as the hard limit allows; never lower it. Returns the usable limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
