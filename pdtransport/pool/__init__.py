"""The shared CPU pool: KV chunks kept far beyond an engine's own memory, found again by their content keys.

Start with ``docs/pool.md``; in the source with ``core/store.py`` (the life of a chunk, without sockets or threads).
"""
