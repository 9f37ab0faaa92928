"""The pool as a process: requests of clients on this host, administration, threads of the tiers."""
