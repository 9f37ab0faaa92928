"""Fuzzing of what arrives from outside: see ``__main__.py``."""
