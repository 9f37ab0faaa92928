"""Tiers and codecs by name: those that come with pdtransport, and third parties' by entry points.

Entry points in the group ``pdtransport.pool.codecs`` are callables without arguments that return a
:class:`~pdtransport.pool.tiers.codecs.Codec`. Those in ``pdtransport.pool.tiers`` are callables that take a dict of
options and return a :class:`~pdtransport.pool.tiers.base.Tier`. Settings refer to them by the entry point's name. An
entry point is loaded when it is first needed.
"""

from __future__ import annotations

import functools
from typing import Any

from pdtransport import plugins
from pdtransport.errors import SettingsError
from pdtransport.pool.tiers.base import Tier, TierError
from pdtransport.pool.tiers.codecs import FIRST_FOREIGN, LOSSY, Codec, Quantised, ShuffledZstd

CODECS, TIERS = "pdtransport.pool.codecs", "pdtransport.pool.tiers"


def tier_codec(name: str, item_bytes: int) -> Codec | None:
    """The lossless codec that a tier's settings name; None for "none".

    Raises:
        SettingsError: there is no codec of this name, it can't be loaded, or it is lossy.
    """
    if name == "none":
        return None
    codec = ShuffledZstd(item_bytes) if name == "zstd" else _codec(name)
    if codec.lossy:
        raise SettingsError(
            f"codec {name} is lossy: only engines can select it (pool.codec of the connector's settings); set the "
            "tier's codec to none or zstd"
        )
    return codec


def lossy_codec(name: str) -> Codec | None:
    """The lossy codec of this name; None if there is none here (the chunk is then stored losslessly)."""
    try:
        codec = _codec(name)
    except SettingsError:
        return None
    return codec if codec.lossy else None


@functools.lru_cache(maxsize=256)
def decoder(number: int) -> Codec:
    """The codec with this number, for unpacking a chunk whose header names it.

    Raises:
        TierError: it is not installed or can't be loaded.
    """
    try:
        if number == ShuffledZstd.number:
            return ShuffledZstd()
        for name in LOSSY:
            if number == LOSSY[name]:
                return _codec(name)
    except SettingsError as error:
        raise TierError(str(error)) from None
    unusable = []
    for name in plugins.installed(CODECS):
        try:
            codec = _codec(name)
        except SettingsError as error:  # perhaps it is another one's
            unusable.append(f" ({error})")
            continue
        if codec.number == number:
            return codec
    raise TierError(f"it was packed with codec number {number}, which is not installed here{''.join(unusable)}")


def make_tier(name: str, options: dict[str, Any]) -> Tier:
    """Make a tier from its entry point.

    Raises:
        SettingsError: there is no tier of this name, it can't be loaded, or it refuses these options.
    """
    tier = plugins.make("tier", TIERS, name, options)
    if not isinstance(tier, Tier):
        raise SettingsError(f"tier {name}: its entry point returned a {type(tier).__name__}, not a Tier")
    tier.name = name
    return tier


@functools.cache
def _codec(name: str) -> Codec:
    if name in LOSSY:
        return Quantised(name, LOSSY[name])  # type: ignore[arg-type]
    codec = plugins.make("codec", CODECS, name)
    if not isinstance(codec, Codec) or not FIRST_FOREIGN <= codec.number <= 255:
        raise SettingsError(
            f"codec {name}: its entry point must return a Codec with a number of {FIRST_FOREIGN} to 255"
        )
    return codec
