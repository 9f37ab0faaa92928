"""Where chunks lie below memory: disk, Redis, S3, Mooncake, NIXL, and other packages' by entry points."""
