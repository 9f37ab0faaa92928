"""UCX link: between hosts, and within a host where no better link works."""
