"""UCX between hosts, and on one host where no better link works."""
