"""The commands' entry points. They import as little as they can: a Ctrl-C while the rest is imported ends them without
a word, as it does later."""

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
    if wanted is not signal.default_int_handler:  # whoever started it wants it to be deaf to Ctrl-C
        return int(importlib.import_module(module).main())
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = importlib.import_module(module).main
    try:
        try:
            signal.signal(signal.SIGINT, wanted)
            return int(main())
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # else the interpreter's own end would show a traceback
    except KeyboardInterrupt:  # before or after main could see to that itself
        return 128 + signal.SIGINT


def _open_standard_streams() -> None:
    """Where one is closed, the next file that is opened takes its number, and what libraries say lands in it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
