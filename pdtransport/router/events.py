"""Server-sent events, passed on only whole."""

from __future__ import annotations

MAX_HELD_BYTES = 1 << 20  # of an unfinished event; a longer one is passed on in pieces
_DONE = b"data: [DONE]"  # the last event of a stream
_END_BYTES = 64  # length of the tail in which _DONE is searched
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")


class WholeEvents:
    """Passes on whole server-sent events and holds back the beginning of an unfinished one.

    No client can use half an event; and if decode dies in the middle of one, the error event that follows must not be
    appended to it.
    """

    def __init__(self) -> None:
        self._held = b""
        self._last = b""  # the last bytes passed on

    def feed(self, chunk: bytes) -> bytes:
        passed = self._whole(chunk)
        if passed:
            self._last = passed[-_END_BYTES:]
        return passed

    def _whole(self, chunk: bytes) -> bytes:
        data = self._held + chunk if self._held else chunk
        if data.endswith(b"\n\n"):
            self._held = b""
            return data
        cut = max(at + len(end) if (at := data.rfind(end)) >= 0 else 0 for end in _EVENT_ENDS)
        if len(data) - cut > MAX_HELD_BYTES:
            cut = len(data)
        self._held = data[cut:]
        return data[:cut]

    def rest(self) -> bytes | None:
        """What is left at the end of the stream.

        None: the stream broke off, because its last event is not [DONE].
        """
        held, self._held = self._held, b""
        return held if (self._last + held).rstrip().endswith(_DONE) else None
