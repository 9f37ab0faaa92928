"""HTTP servers with limits on every resource: the common part of the router and the pool's HTTP API."""
