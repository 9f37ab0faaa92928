"""Administration of a running pool, from Python and over HTTP: contents, pins, moves between tiers, clearing."""
