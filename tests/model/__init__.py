"""Every reachable state of a small hand-off: see ``__main__.py``."""
