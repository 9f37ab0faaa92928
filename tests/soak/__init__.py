"""Half an hour of requests: does anything grow that does not grow in a plain server? ``python -m tests.soak``."""
