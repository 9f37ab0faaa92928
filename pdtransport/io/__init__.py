"""The I/O thread, and the CUDA events it waits for."""
