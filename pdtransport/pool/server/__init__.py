"""The pool's service process: requests of clients on this host, administration, and the threads of the lower tiers."""
