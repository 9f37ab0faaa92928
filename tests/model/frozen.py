"""Snapshots of the protocol's own objects: equal where nothing that can still happen differs.

What no rule looks at is left out (counters, texts of reasons, which code). Times are left out too: whatever waits may
be woken next, so every order of deadlines is explored, those that clocks allow and some that they don't.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from enum import Enum
from typing import Any

from pdtransport.protocol.messages import Abort, Code, Message, Nack, Revoke
from pdtransport.protocol.timers import TimerQueue

SOON, LATER = 1.0, 100.0  # when words are said again, and when waits end; things happen at 0
RETRY, DEADLINE = 10.0, 1000.0  # a time after SOON, a time after LATER
ANY_CODE, ANY_REASON = Code.TIMEOUT, "-"
_NUMBERS_FOR_PEOPLE = frozenset({"bytes_verified", "bytes_pushed"})
_LEAVES = frozenset({str, int, bytes, bool, type(None)})
_SAYS_WHY = frozenset({Abort, Nack, Revoke})


def plain(message: Message) -> Message:
    """The message without what no rule looks at."""
    if type(message) not in _SAYS_WHY or message.reason == ANY_REASON:  # type: ignore[attr-defined]
        return message
    changes: dict[str, Any] = {"reason": ANY_REASON}
    if type(message) is not Nack:
        changes["code"] = ANY_CODE
    return message.model_copy(update=changes)


def freeze(value: Any, name: str = "") -> Any:
    """A hashable snapshot, from which :func:`thaw` makes objects again."""
    kind = type(value)
    if name == "reason":
        return ANY_REASON if value else ""
    if name in _NUMBERS_FOR_PEOPLE:
        return 0
    if kind in _LEAVES:
        return value
    if kind is float:
        return value if value == float("inf") else LATER if name == "_deadline" else SOON
    if isinstance(value, Code):
        return ANY_CODE
    if isinstance(value, Message):
        return plain(value)
    if kind is tuple:
        if value and isinstance(value[0], Code):
            return ("tuple", (ANY_CODE, ANY_REASON))
        return ("tuple", tuple(freeze(each) for each in value))
    if kind is list:
        return ("list", tuple(freeze(each) for each in value))
    if kind in (set, frozenset):
        return ("set", tuple(sorted((freeze(each) for each in value), key=repr)))
    if kind is Counter:
        return ("counter",)
    if kind in (dict, OrderedDict):
        items = ((freeze(key), freeze(each)) for key, each in value.items())
        return ("ordered" if kind is OrderedDict else "dict", tuple(sorted(items, key=lambda item: repr(item[0]))))
    if kind is TimerQueue:
        return ("agenda", tuple(sorted(value._when, key=repr)))
    if kind is itertools.count:
        return ("count", value.__reduce__()[1][0])
    if isinstance(value, (Enum, tuple)) or callable(value) or is_frozen(kind):
        return value
    return ("object", kind, tuple((key, freeze(each, key)) for key, each in value.__dict__.items()))


def is_frozen(kind: type) -> bool:
    return bool(getattr(getattr(kind, "__dataclass_params__", None), "frozen", False))


def thaw(frozen: Any) -> Any:
    """Objects of their own: what is done to them changes no other snapshot."""
    if type(frozen) is not tuple:
        return frozen
    kind = frozen[0]
    if kind == "object":
        made = frozen[1].__new__(frozen[1])
        made.__dict__.update((name, thaw(each)) for name, each in frozen[2])
        return made
    if kind == "tuple":
        return tuple(thaw(each) for each in frozen[1])
    if kind == "list":
        return [thaw(each) for each in frozen[1]]
    if kind == "set":
        return {thaw(each) for each in frozen[1]}
    if kind in ("dict", "ordered"):
        items = ((thaw(key), thaw(each)) for key, each in frozen[1])
        return dict(items) if kind == "dict" else OrderedDict(items)
    if kind == "counter":
        return Counter()
    if kind == "count":
        return itertools.count(frozen[1])
    timers: TimerQueue[Any] = TimerQueue()
    for key in frozen[1]:
        timers.set(key, SOON)
    return timers


def wake(timers: TimerQueue[Any], key: Any) -> None:
    """Let ``key`` be the one that is due."""
    when = dict(timers._when)
    timers._when, timers._heap = {key: 0.0}, [(0.0, 0, key)]
    for other in when:
        if other != key:
            timers.set(other, float("inf"))
