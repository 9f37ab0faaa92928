"""Entry points of the commands.

They import as little as possible, so that Ctrl-C ends a command silently even while the rest is still being imported.
"""

from __future__ import annotations

import importlib
import os
import signal


def pdlaunch() -> int:
    return _run("pdtransport.launch.cli")


def pdpool() -> int:
    return _run("pdtransport.pool.cli")


def pdrouter() -> int:
    return _run("pdtransport.router.cli")


def _run(module: str) -> int:
    _open_standard_streams()
    wanted = signal.getsignal(signal.SIGINT)
    if wanted is not signal.default_int_handler:  # the parent made it ignore Ctrl-C
        return int(importlib.import_module(module).main())
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = importlib.import_module(module).main
    try:
        try:
            signal.signal(signal.SIGINT, wanted)
            return int(main())
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C during interpreter shutdown prints a traceback
    except KeyboardInterrupt:  # before or after main's own handling
        return 128 + signal.SIGINT


def _open_standard_streams() -> None:
    """Open closed standard streams on /dev/null.

    Else the next file that is opened gets the stream's number, and output of libraries lands in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
