"""Faults in real processes with real sockets and links: see ``__main__.py``."""
