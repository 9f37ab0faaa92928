"""HTTP servers with bounds: what the router and the pool's API have in common."""
