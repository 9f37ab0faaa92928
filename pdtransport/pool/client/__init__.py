"""The pool from the side of an engine on this host."""
