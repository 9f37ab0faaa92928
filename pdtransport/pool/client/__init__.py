"""The pool's client: stores, looks up and loads chunks for an engine."""
