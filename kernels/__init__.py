"""Page kernels: gather, scatter, checksum.

``pages`` is the API, ``reference`` the numpy implementation that defines it, ``runs`` the lists of byte runs that both
work on.
"""
