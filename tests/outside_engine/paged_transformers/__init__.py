"""A small engine on transformers with a paged KV cache, attached to pdtransport as docs/adding/engine.md tells."""

from paged_transformers.engine import Answer, Engine

__all__ = ["Answer", "Engine"]
