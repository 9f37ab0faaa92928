"""Hooks into vLLM's own code, one per file, each with a switch and a check (:mod:`base`); :mod:`listed` has all."""
