"""The I/O thread, and the queue of calls that wait for CUDA events."""
