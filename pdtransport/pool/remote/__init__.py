"""The pool for clients on other hosts: the agent beside the pool, and the client's connection to it."""
