"""The transport that moves chunks between a pool's frames and the staging frames of a client on another host."""

from __future__ import annotations

from pdtransport.kv.geometry import KVGeometry, LayerPages
from pdtransport.links.registry import host_links
from pdtransport.settings import ObserveSettings, Settings
from pdtransport.transport import Transport


def open_transport(
    address: int, nbytes: int, frame_bytes: int, settings: Settings, name: str, port: int, liveness_s: float
) -> Transport:
    """Open a transport whose pages are the frames of the memory at ``address``.

    It gives up a peer that was silent for ``liveness_s``.

    Raises:
        SettingsError, LinkUnavailable: as :class:`Transport`.
    """
    geometry = KVGeometry(
        layers=(LayerPages("frames", address, frame_bytes),),
        num_blocks=nbytes // frame_bytes,
        block_size=1,
        heads=1,
        head_lo=0,
        total_heads=1,
        slot_bytes=frame_bytes,
        heads_first=True,
    )
    # An engine's requirements for its links concern its own pages, not the pool's.
    order = host_links(settings.links.order, checksums=settings.integrity.checksum == "full")
    changed = {"order": order, "require": None, "min_bandwidth_bytes_s": 0, "probe_bytes": 0}
    links = settings.links.model_copy(update=changed)
    # No control.peers: a client has the pool's address from its own settings, and the agent has checked the client's.
    control = settings.control.model_copy(update={"liveness_s": liveness_s, "peers": None})
    ours = settings.model_copy(update={"links": links, "control": control, "observe": ObserveSettings()})
    return Transport(geometry, ours, engine=name, fingerprint={"model": "pdpool"}, port=port)
