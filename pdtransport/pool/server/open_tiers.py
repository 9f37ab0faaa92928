"""Opens the tiers below memory that a pool's settings name."""

from __future__ import annotations

from pdtransport.errors import SettingsError
from pdtransport.pool.core.tier_state import TierState
from pdtransport.pool.settings import AnyTierSettings, PoolSettings
from pdtransport.pool.tiers.base import Tier
from pdtransport.pool.tiers.disk import DiskTier
from pdtransport.pool.tiers.keyed_digest import Signer, load_signer
from pdtransport.pool.tiers.redis import RedisTier
from pdtransport.pool.tiers.registry import make_tier, tier_codec
from pdtransport.pool.tiers.s3 import S3Tier


def lower_tiers(settings: PoolSettings, first_bit: int) -> list[TierState]:
    """Open the tiers below memory that the settings name, fastest first.

    Args:
        first_bit: bit of the first tier in the index's ``tiers`` column; the next tiers have the next bits.

    Raises:
        SettingsError: a tier, its codec or its digest key can't be used.
    """
    made: list[tuple[Tier, AnyTierSettings]] = []
    try:
        return _lower_tiers(settings, first_bit, made)
    except BaseException:
        for tier, _ in made:
            tier.close()
        raise


def _lower_tiers(settings: PoolSettings, first_bit: int, made: list[tuple[Tier, AnyTierSettings]]) -> list[TierState]:
    if settings.disk is not None:
        made.append((DiskTier(settings.disk), settings.disk))
    if settings.redis is not None:
        made.append((RedisTier(settings.redis), settings.redis))
    if settings.s3 is not None:
        made.append((S3Tier(settings.s3), settings.s3))
    made += [(make_tier(name, its.options), its) for name, its in settings.tiers.items()]
    file = settings.digest_key_file
    signer = load_signer(file) if file is not None and settings.digest != "off" else None
    return [
        TierState(
            tier,
            first_bit << number,
            its.bytes,
            settings.policy,
            tier_codec(its.codec, its.item_bytes),
            _signer_of(tier, signer, settings),
        )
        for number, (tier, its) in enumerate(made)
    ]


def _signer_of(tier: Tier, signer: Signer | None, settings: PoolSettings) -> Signer | None:
    """The signer for a tier's chunks; None if they carry no digest.

    Raises:
        SettingsError: they must carry one, and there is no key.
    """
    if settings.digest == "off" or (settings.digest == "auto" and not tier.exposed):
        return None
    if signer is None:
        why = f"{tier.exposed}, so" if tier.exposed else "pool.digest is all, so"
        raise SettingsError(
            f"tier {tier.name}: {why} its chunks carry a digest, which needs a key: set pool.digest_key_file (openssl "
            "rand -hex 32 > FILE && chmod 600 FILE; the same for all pools that share the tier), or pool.digest: off "
            "to trust whoever can write there"
        )
    return signer
