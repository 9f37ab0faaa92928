"""Opens the links that work in this process and chooses the link for each pair."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pdtransport.errors import LinkUnavailable
from pdtransport.kv.geometry import HOST
from pdtransport.links.base import Channel, Link, Region
from pdtransport.links.memory import Regions
from pdtransport.settings import LinkName, LinkSettings

logger = logging.getLogger(__name__)


# Module and class of each link. Modules are imported on demand, so that a link's dependencies load only with it.
_LINKS = {
    "cuda_ipc": ("cuda_ipc", "CudaIpcLink"),
    "shm": ("shm", "ShmLink"),
    "cma": ("cma", "CmaLink"),
    "ucx": ("ucx.link", "UcxLink"),
}
_HOST_ONLY = dict.fromkeys(("shm", "cma"), "KV lies in GPU memory")
_GPU_ONLY = {"cuda_ipc": "KV lies in host memory"}


@dataclass
class OpenedLinks:
    """Links that work in this process, reasons why the others don't, and the memory that all of them may touch."""

    regions: Regions
    links: dict[str, Link] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)  # links for the other kind of memory (host, GPU), and why


def open_links(settings: LinkSettings, regions: Iterable[Region], *, ucx: bool | None = None) -> OpenedLinks:
    """Open the links that ``settings.order`` names.

    Args:
        settings: order, required link, sizes.
        regions: memory that links may read and write.
        ucx: False leaves UCX out, True requires it, None uses it if it is installed.

    Raises:
        LinkUnavailable: no link works here, or the required one does not.
    """
    opened = OpenedLinks(Regions(regions))
    elsewhere = _GPU_ONLY if opened.regions.device == HOST else _HOST_ONLY
    for name in (settings.require,) if settings.require else dict.fromkeys(settings.order):
        if name == "ucx" and ucx is False:
            opened.unavailable[name] = "it was left out"
            continue
        if name in elsewhere:  # expected, so not logged; an error only if this link is required
            opened.elsewhere[name] = elsewhere[name]
            continue
        try:
            opened.links[name] = _open(name, opened.regions, settings)
        except LinkUnavailable as error:
            opened.unavailable[name] = str(error)
            logger.info("link %s can't be used here: %s", name, error)
    try:
        if settings.require and settings.require not in opened.links:
            why = {**opened.unavailable, **opened.elsewhere}[settings.require]
            raise LinkUnavailable(_required(settings.require, why))
        if ucx and "ucx" not in opened.links:
            raise LinkUnavailable(f"ucx: {opened.unavailable.get('ucx', 'it is not in links.order')}")
        if not opened.links:
            why = _reasons({**opened.elsewhere, **opened.unavailable})
            raise LinkUnavailable(f"no link of links.order can be used here: {why}")
    except LinkUnavailable:
        for link in opened.links.values():
            link.close()
        raise
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


def _open(name: LinkName, regions: Regions, settings: LinkSettings) -> Link:
    module, kind = _LINKS[name]
    link: Link = getattr(importlib.import_module(f"pdtransport.links.{module}"), kind).open(regions, settings)
    return link


def _required(name: str, why: str) -> str:
    return f"links.require is {name!r}, but it can't be used: {why}; remove links.require to let links.order decide"


def _reasons(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name} unavailable: {why}" for name, why in reasons.items())
