"""The tiers below memory: disk, Redis, S3, Mooncake, NIXL, and other packages' tiers by entry points."""
