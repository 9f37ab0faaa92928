"""What ``pdlaunch``, ``pdrouter`` and ``pdpool`` have in common: ``--version``, and mistakes told in one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from pdtransport import __version__

USAGE = 2  # exit status where the command line is wrong


class CommandParser(argparse.ArgumentParser):
    """argparse's, but a mistake is one line that says where the options are listed, not the whole usage before it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Of the command, not of its subcommands.
        if " " not in self.prog:
            self.add_argument(
                "--version", action="version", version=f"{self.prog} {__version__}", help="tell it and end"
            )

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog.split()[0]}: {message} (options: {self.prog} --help)\n")
