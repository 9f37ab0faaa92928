"""Common parts of the commands ``pdlaunch``, ``pdrouter`` and ``pdpool``.

``--version``, one-line error messages, and no traceback if the terminal or pipe fails.
"""

from __future__ import annotations

import argparse
import errno
import functools
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, ParamSpec, TextIO

from pdtransport import __version__

USAGE = 2  # exit status for a wrong command line
UNWRITTEN = 74  # sysexits.h's EX_IOERR: the output could not be written
INTERRUPTED, READER_LEFT = 128 + signal.SIGINT, 128 + signal.SIGPIPE

P = ParamSpec("P")
log = logging.getLogger("pdtransport.serving")


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, but an error is one line that points to --help, without the whole usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Only the command has --version, not its subcommands.
        if " " not in self.prog:
            self.add_argument(
                "--version", action="version", version=f"{self.prog} {__version__}", help="print the version and exit"
            )

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog.split()[0]}: {message} (options: {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own version ignores errors when it writes help to standard output; this one raises them."""
        if file is not None and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


def command(name: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorates a command's entry point, which returns its exit status.

    * Ctrl-C ends it with 130. A reader that closed the pipe (``pdlaunch check | head -1``) ends it with 141, like
      SIGPIPE. Neither prints anything.
    * Output that can't be written, or another unexpected OSError, ends it with one line and status 74.
    * Characters that the terminal does not support are printed as escapes.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*arguments: P.args, **named: P.kwargs) -> int:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(errors="backslashreplace")
            try:
                try:
                    return main(*arguments, **named)
                finally:  # also if argparse ends the process after it wrote its help
                    if sys.stdout is not None:
                        sys.stdout.flush()
                    complain("")
            except KeyboardInterrupt:
                return INTERRUPTED
            except BrokenPipeError:
                silence(sys.stdout)
                return READER_LEFT
            except OSError as error:
                silence(sys.stdout)
                log.debug("the error that ended it:", exc_info=True)
                complain(f"{name}: {_what(error)}")
                return UNWRITTEN

        return run

    return decorate


def _what(error: OSError) -> str:
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
        return f"its output can't be written: {error.strerror}"
    return str(error)


def tell(text: str) -> None:
    """Print an optional line: if standard output can't be written, later output to it is dropped."""
    _write(text, sys.stdout)


def complain(text: str) -> None:
    """As :func:`tell`, on standard error."""
    _write(text, sys.stderr)


def _write(text: str, stream: TextIO | None) -> None:
    if stream is None:  # the stream was closed when the process began
        return
    try:
        print(text, file=stream, end="\n" if text else "", flush=True)
    except BrokenPipeError:
        silence(stream)
    except OSError as error:
        silence(stream)
        if stream is not sys.stderr:
            complain(f"standard output can't be written, so no more is written to it: {error.strerror}")


def silence(stream: TextIO | None) -> None:
    """Redirect the stream to /dev/null, so that Python does not complain about unwritten output at exit."""
    if stream is None:
        return
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
