"""What is fuzzed: each target takes bytes and lets pass only the errors that its code promises."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

# In which module of this package it is. A router, a pool or vLLM is loaded with the first target that needs it.
TARGETS = {
    "exports": "peers",
    "http": "http",
    "params": "params",
    "pool": "pool",
    "topology": "topology",
    "wire": "peers",
}


def target(name: str) -> Callable[[bytes], None]:
    found: Callable[[bytes], None] = getattr(import_module(f"tests.fuzz.{TARGETS[name]}"), name)
    return found
