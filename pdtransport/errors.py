"""Errors that users see. Each message is one line: cause, setting, remedy."""

from __future__ import annotations

import concurrent.futures


class PDTransportError(Exception):
    """Base class of all errors that this package raises on purpose."""


class SettingsError(PDTransportError):
    """A setting is unknown, out of range, or contradicts another."""


class InvalidCall(PDTransportError, ValueError):
    """An argument is invalid, or contradicts an earlier call."""


class TransportClosed(PDTransportError):
    """The transport is closed, or its I/O thread does not keep up: it accepts no more calls."""


class TimedOut(PDTransportError, concurrent.futures.TimeoutError):
    """The caller's timeout expired. The operation itself continues."""


class LinkUnavailable(PDTransportError):
    """A link can't be used here or with this peer; the text says why."""


class LinkError(PDTransportError):
    """A link failed to move bytes after it was set up."""


class PeerRefused(PDTransportError):
    """The peer is not compatible; ``field`` names what differs."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class PoolUnavailable(PDTransportError):
    """The pool did not answer: it is not running, has ended, or a deadline passed. Callers continue without it."""


class PoolRefusal(PoolUnavailable):
    """The pool is running but refused a request; the text says why."""


class TransferFailed(PDTransportError):
    """A transfer ended without its pages; ``code`` is one of :class:`pdtransport.protocol.messages.Code`."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code
