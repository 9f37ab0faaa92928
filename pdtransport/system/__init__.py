"""Operating system helpers: host names, file descriptor limits, private files."""
