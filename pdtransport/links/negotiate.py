"""Opens the links that work in this process and chooses the link for each pair."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pdtransport.errors import LinkUnavailable
from pdtransport.kv.geometry import HOST
from pdtransport.links.base import Channel, Link, MemoryKind, Region
from pdtransport.links.memory import Regions
from pdtransport.links.registry import load, wanted
from pdtransport.settings import LinkSettings

logger = logging.getLogger(__name__)

_MEMORY: dict[MemoryKind, str] = {"host": "host memory", "gpu": "GPU memory"}


@dataclass
class OpenedLinks:
    """Links that work in this process, reasons why the others don't, and the memory that all of them may touch."""

    regions: Regions
    links: dict[str, Link] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)  # links for the other kind of memory (host, GPU), and why


def open_links(settings: LinkSettings, regions: Iterable[Region]) -> OpenedLinks:
    """Open the links that ``settings.order`` names, or the one that it requires.

    Args:
        settings: order, required link, sizes.
        regions: memory that links may read and write.

    Raises:
        SettingsError: a link is not known here, or can't be loaded.
        LinkUnavailable: no link works here, or the required one does not.
    """
    opened = OpenedLinks(Regions(regions))
    memory: MemoryKind = "host" if opened.regions.device == HOST else "gpu"
    kinds = [load(name) for name in wanted(settings)]
    try:
        for kind in kinds:
            if memory not in kind.memory:  # expected, so not logged; an error only if this link is required
                opened.elsewhere[kind.name] = f"KV is in {_MEMORY[memory]}"
                continue
            try:
                opened.links[kind.name] = kind.open(opened.regions, settings)
            except LinkUnavailable as error:
                opened.unavailable[kind.name] = str(error)
                logger.info("link %s can't be used here: %s", kind.name, error)
    except BaseException:
        for link in opened.links.values():
            link.close()
        raise
    if not opened.links:
        why = {**opened.elsewhere, **opened.unavailable}
        if settings.require:
            raise LinkUnavailable(_required(settings.require, why[settings.require]))
        raise LinkUnavailable(f"no link of links.order can be used here: {_reasons(why)}")
    return opened


def choose(
    links: Mapping[str, Link],
    unavailable: Mapping[str, str],
    order: Sequence[str],
    require: str | None,
    peer_exports: Mapping[str, bytes],
    peer_host: str,
) -> Channel:
    """Open a channel, ready to receive, over the first link of ``order`` that both ends can use.

    The channel's ``why`` describes it and says why better links were not taken.

    Raises:
        LinkUnavailable: no link can be used, or the required one can't; the text gives the reason for each.
    """
    reasons: dict[str, str] = {}
    for name in [require] if require else [name for name in order if name in links or name in unavailable]:
        link = links.get(name)
        if link is None:
            reasons[name] = unavailable.get(name, "it is not open here")
        elif name not in peer_exports:
            reasons[name] = "the peer does not offer it"
        else:
            try:
                channel = link.connect(peer_exports[name], peer_host)
            except LinkUnavailable as error:
                reasons[name] = str(error)
                continue
            try:
                channel.attach()
            except LinkUnavailable as error:
                channel.close()
                reasons[name] = str(error)
                continue
            if reasons:
                channel.why = f"{channel.why}; {_reasons(reasons)}"
            return channel
    if require:
        raise LinkUnavailable(_required(require, reasons[require]))
    raise LinkUnavailable(f"no link of links.order reaches {peer_host}: {_reasons(reasons)}")


def _required(name: str, why: str) -> str:
    return f"links.require is {name!r}, but it can't be used: {why}; remove links.require to let links.order decide"


def _reasons(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name} unavailable: {why}" for name, why in reasons.items())
