"""Which model families are handed over whole: ``python -m tests.layouts [FAMILY ...] [--write docs/models.md]``.

Each family is a tiny model of that architecture with random weights, served by real vLLM servers: a plain one, and a
pair of prefill and decode whose answers must be the plain one's.
"""

BROKEN = "LAYOUTS_BROKEN"  # environment variables of a decode server that hold a file's path; see connector.py
FACTS = "LAYOUTS_FACTS"
