"""What is asked of the operating system: host names, file descriptors, files that are private to this user."""
