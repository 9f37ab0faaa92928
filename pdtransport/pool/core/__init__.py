"""The chunk store: index, memory frames, read and write grants, quotas and eviction."""
