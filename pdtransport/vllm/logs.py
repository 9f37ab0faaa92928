"""Forwards pdtransport's log records to vLLM's logger.

vLLM configures only the logger ``vllm``: INFO records of other loggers are lost, and their warnings lack time, level
and process. Records of ``pdtransport`` therefore use the level, handlers and format of vLLM's logger, however
these were set (``VLLM_LOGGING_LEVEL``, ``VLLM_LOGGING_CONFIG_PATH``, ``VLLM_CONFIGURE_LOGGING``,
``--log-config-file``). If a user configured the logger ``pdtransport``, it is left alone.
"""

from __future__ import annotations

import logging

OURS, THEIRS = "pdtransport", "vllm"


class _ToVLLM(logging.Handler):
    """Forwards records to vLLM's logger, looked up for each record: vLLM configures it late and more than once."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger(THEIRS)
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def join_vllm_log() -> None:
    """Forward records to vLLM's logger; call in each vLLM process. Idempotent: each record is logged once."""
    ours = logging.getLogger(OURS)
    if not any(isinstance(handler, _ToVLLM) for handler in ours.handlers):
        if ours.handlers or ours.level != logging.NOTSET or not ours.propagate:
            return  # a user configured it
        ours.addHandler(_ToVLLM())
        ours.setLevel(logging.DEBUG)  # vLLM's logger filters by its own level
        ours.propagate = False
    # Reading a logging configuration file disables all existing loggers except those that it names and their children.
    # vLLM's own stay enabled; pdtransport's must be enabled again.
    for name, logger in logging.Logger.manager.loggerDict.items():
        if name.startswith(OURS) and isinstance(logger, logging.Logger):
            logger.disabled = False
