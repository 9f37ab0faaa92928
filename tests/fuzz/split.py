"""How one input holds several."""

SEPARATOR = b"\xc1\xc1"  # a byte that msgpack and UTF-8 never use, twice
