"""Contents, pins, moves between tiers, clearing: from Python and over HTTP."""
