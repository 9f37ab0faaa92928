"""Hooks into vLLM's own code, one per file. Each says what it patches and what happens if vLLM is not as expected."""
