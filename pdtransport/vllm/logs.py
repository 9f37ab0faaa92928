"""Our log lines in vLLM's log. vLLM configures the logger ``vllm`` only: what others log at INFO is lost, and warnings
come without time, level and process.

What is logged under ``pdtransport`` is handed to vLLM's logger: its level, its handlers and their format, whatever set
them (``VLLM_LOGGING_LEVEL``, ``VLLM_LOGGING_CONFIG_PATH``, ``VLLM_CONFIGURE_LOGGING``, ``--log-config-file``). A user
who configured the logger ``pdtransport`` keeps what is configured.
"""

from __future__ import annotations

import logging

OURS, THEIRS = "pdtransport", "vllm"


class _ToVLLM(logging.Handler):
    """Hands records to vLLM's logger as it is at that moment: vLLM configures it late, and more than once."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger(THEIRS)
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def join_vllm_log() -> None:
    """Call in each process of vLLM's, as often as you like: a line is logged once."""
    ours = logging.getLogger(OURS)
    if not any(isinstance(handler, _ToVLLM) for handler in ours.handlers):
        if ours.handlers or ours.level != logging.NOTSET or not ours.propagate:
            return  # a user configured it
        ours.addHandler(_ToVLLM())
        ours.setLevel(logging.DEBUG)  # vLLM's level decides
        ours.propagate = False
    # A configuration file disables all loggers that exist when it is read, but for those that it names and their
    # children: vLLM's own go on, and so do ours.
    for name, logger in logging.Logger.manager.loggerDict.items():
        if name.startswith(OURS) and isinstance(logger, logging.Logger):
            logger.disabled = False
