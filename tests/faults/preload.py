"""What the fork server imports once, so that a worker starts in a moment. Starts nothing: no thread, no socket."""

import contextlib

import pdtransport.transport
import tests.faults.pool_worker
import tests.faults.worker  # noqa: F401

with contextlib.suppress(ImportError):
    import pdtransport.links.cma
    import pdtransport.links.ucx.binding
    import pdtransport.links.ucx.link  # noqa: F401
