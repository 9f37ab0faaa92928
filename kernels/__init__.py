"""Page kernels: gather, scatter, checksum. ``pages`` is the API, ``reference`` the numpy oracle, ``runs`` the lists of
byte runs that both work on."""
