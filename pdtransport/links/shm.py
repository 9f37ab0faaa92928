"""``shm``: same host, host memory. The receiver maps the sender's pages and copies them into its own.

One copy in user space, without system calls or page pinning. Everything else is as in `cma`: the same permission check
decides whether a peer may be read, and memory that can't be mapped is read with process_vm_readv.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from pdtransport.errors import LinkUnavailable
from pdtransport.links.base import Region
from pdtransport.links.cma import OWN_WORDS, CmaLink
from pdtransport.links.mapping import MappedReader, PeerMemory
from pdtransport.links.memory import Regions
from pdtransport.links.reading import Reader
from pdtransport.links.sharing import PAGE, SharedMemory

logger = logging.getLogger(__name__)


class ShmLink(CmaLink):
    """Link for host memory of one host; the receiver copies from mapped memory.

    Opening it converts the regions into shared memory in place (:mod:`pdtransport.links.sharing`); nothing may write
    them meanwhile. Regions that are added later are read as in `cma`.

    Args:
        regions: memory that may be offered and written.

    Raises:
        LinkUnavailable: none of the memory can be shared, or the kernel does not allow process_vm_readv.
    """

    name = "shm"

    def __init__(self, regions: Regions | Iterable[Region]) -> None:
        regions = regions if isinstance(regions, Regions) else Regions(regions)
        try:
            self._shared: SharedMemory | None = SharedMemory(regions, OWN_WORDS)
        except OSError as error:
            raise LinkUnavailable(f"memory can't be shared: {error.strerror}") from None
        left = ", ".join(f"{nbytes} bytes are {why}" for why, nbytes in self._shared.left.items())
        try:
            if self._shared.registered and not self._shared.nbytes:
                raise LinkUnavailable(f"none of the memory can be shared: {left}")
            super().__init__(regions, self._shared.own)
        except LinkUnavailable:
            self._shared.close()
            raise
        shared, registered = self._shared.nbytes, self._shared.registered
        logger.info("%d of %d bytes are shared with peers that map them%s", shared, registered, left and f"; {left}")
        spans = [[span.address, span.nbytes, span.fd, span.offset] for span in self._shared.spans]
        self._export |= {"spans": spans, "shared": shared, "registered": registered}

    def _reader(self, peer: dict[str, Any]) -> tuple[Reader, str]:
        spans, shared, registered = peer.get("spans"), peer.get("shared"), peer.get("registered")
        if not isinstance(spans, list) or not isinstance(shared, int) or not isinstance(registered, int):
            raise LinkUnavailable("the peer does not offer it")
        if any(not isinstance(span, list) or [type(word) for word in span] != [int] * 4 for span in spans):
            raise LinkUnavailable("the peer's export is damaged")
        memory = PeerMemory(peer["pid"], [(span[0], span[1], span[2], span[3]) for span in spans])
        why = "same host; copies pages from the peer's mapped memory"
        if registered - shared > 2 * PAGE * len(spans):  # more than the unaligned ends of regions
            why += f" ({shared} of its {registered} bytes; the kernel reads the rest)"
        return MappedReader(peer["pid"], memory), why

    def arm(self) -> bool:
        idle = super().arm()
        if idle:
            for channel in self._channels:
                if isinstance(channel.reader, MappedReader):
                    channel.reader.rest()
        return idle

    def close(self) -> None:
        super().close()
        if self._shared is not None:
            self._shared.close()
            self._shared = None
