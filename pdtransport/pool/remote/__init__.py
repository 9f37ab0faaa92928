"""The pool for clients on other hosts."""
