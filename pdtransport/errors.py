"""Errors that users meet. Each message is one line: cause, setting, remedy."""

from __future__ import annotations

import concurrent.futures


class PDTransportError(Exception):
    """Base of all errors that this package raises on purpose."""


class SettingsError(PDTransportError):
    """A setting is unknown, out of range, or contradicts another."""


class InvalidCall(PDTransportError, ValueError):
    """An argument can't be, or contradicts an earlier call."""


class TransportClosed(PDTransportError):
    """The transport was closed, or its I/O thread does not keep up: nothing more can be asked of it."""


class TimedOut(PDTransportError, concurrent.futures.TimeoutError):
    """Nothing came within the time that the caller gave. What was waited for goes on."""


class LinkUnavailable(PDTransportError):
    """A link can't be used here or with this peer; the text says why."""


class LinkError(PDTransportError):
    """Moving bytes failed after the link was set up."""


class PeerRefused(PDTransportError):
    """The peer is not compatible; ``field`` names what differs."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class PoolUnavailable(PDTransportError):
    """The pool did not answer: it does not run, ended meanwhile, or a deadline passed. Whoever asked goes without."""


class PoolRefusal(PoolUnavailable):
    """The pool runs, and can't do what it was asked; the text says why."""


class TransferFailed(PDTransportError):
    """A transfer ended without its pages; ``code`` is one of :class:`pdtransport.protocol.messages.Code`."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code
