"""What all hooks into vLLM's own code have in common: a name, a switch, a check at start, and a state that is shown.

A check compares the installed vLLM with what the hook relies on (parameters, and names that must occur in a function's
body). It uses neither version numbers nor hashes, so changes that do not concern the hook leave it active. A hook whose
check fails is off: one warning says what is lost, and the hook's module says what happens without it.
"""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any

from pdtransport.observe.status import PatchStatus
from pdtransport.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

ACTIVE, OFF, FAILED, UNNEEDED = "active", "off", "failed", "unneeded"
SHOWN = {ACTIVE: "active", OFF: "off"}  # in the log line at start; each hook that failed has a warning of its own

PATCHES: dict[str, Patch] = {}  # all hooks, by name


class Unexpected(Exception):
    """vLLM's code is not as a hook expects; the message says what differs."""


class Patch:
    """One hook into vLLM's code, and its state in this process.

    Args:
        name: for status and log.
        check: raises :class:`Unexpected`, or any error that a missing name causes, if vLLM is not as the hook expects.
            It must also pass once the hook is in place, so wrappers are made with ``functools.wraps``.
        costs: what is lost without the hook, for the log.
        setting: path of the setting that switches the hook off if false; empty: there is none, for the reason given in
            the hook's module.
        needs: names of other hooks; without them this one is off.
        unneeded: why this engine does not need the hook; empty if it does.
    """

    def __init__(
        self,
        name: str,
        check: Callable[[], None],
        *,
        costs: str,
        setting: str = "",
        needs: Sequence[str] = (),
        unneeded: Callable[[Settings, VllmConfig | None], str] = lambda settings, config: "",
    ) -> None:
        self.name, self.costs, self.setting, self.needs = name, costs, setting, needs
        self._check, self._unneeded = check, unneeded
        self._noted: PatchStatus | None = None
        self._told: PatchStatus | None = None  # to the log
        self._sent: PatchStatus | None = None  # to the workers
        PATCHES[name] = self

    def check(self) -> str:
        """Why the installed vLLM is not as this hook expects; empty if it is."""
        try:
            self._check()
        except (Unexpected, ImportError, AttributeError) as error:
            return str(error) or type(error).__name__
        except Exception as error:  # noqa: BLE001 - another vLLM may fail in any way; the start must go on
            return f"its check failed: {error!r}"
        return ""

    def state(self, settings: Settings | None = None, config: VllmConfig | None = None) -> PatchStatus:
        """The hook's state in this process; if the hook belongs to another process, the state that it must have there.

        All processes of an engine have the same vLLM, so their checks have the same result.

        Args:
            settings: None if they are not known yet; the hook's switch is then checked later.
        """
        status = self._noted if self._noted is not None else self._examine(settings, config)
        if status["state"] == ACTIVE:
            for need in self.needs:
                if need in PATCHES and PATCHES[need].state(settings, config)["state"] != ACTIVE:
                    return self._status(OFF, f"it needs {need}")
        return status

    def _examine(self, settings: Settings | None, config: VllmConfig | None) -> PatchStatus:
        if settings is not None:
            if self.setting and reduce(getattr, self.setting.split("."), settings) is False:
                return self._status(OFF, f"{self.setting}: false")
            if why := self._unneeded(settings, config):
                return self._status(UNNEEDED, why)
        why = self.check()
        return self._status(FAILED, why) if why else self._status(ACTIVE)

    def _status(self, state: str, why: str = "") -> PatchStatus:
        return {"name": self.name, "state": state, "why": why}

    def allowed(self, settings: Settings | None = None, config: VllmConfig | None = None) -> bool:
        """Whether to install the hook in this process: it is switched on and needed, and its check passes."""
        self._note(self._examine(settings, config))
        return self.active

    @property
    def active(self) -> bool:
        """Whether :meth:`allowed` returned True and the hook did not :meth:`fail` afterwards."""
        return self._noted is not None and self.state()["state"] == ACTIVE

    @property
    def noted(self) -> bool:
        """Whether this process has determined a state of the hook itself."""
        return self._noted is not None

    def fail(self, why: str) -> None:
        """Switch the hook off: something that the check could not see is not as expected."""
        self._note(self._status(FAILED, why))

    def _note(self, status: PatchStatus) -> None:
        self._noted = status
        if status["state"] == FAILED and status != self._told:
            self._told = status
            logger.warning(
                "pdtransport: hook %s is off because vLLM is not as expected: %s. Without the hook: %s",
                self.name,
                status["why"],
                self.costs,
            )


def announce() -> None:
    """Log this process's hooks in one line: those that are active, and those that are off by a setting.

    Each is logged once; those whose check failed have their own warnings.
    """
    lists: dict[str, list[str]] = {state: [] for state in SHOWN}
    for patch in PATCHES.values():
        if patch._noted is None:
            continue
        status = patch.state()
        if status["state"] in lists and status != patch._told:
            patch._told = status
            lists[status["state"]].append(f"{patch.name} ({status['why']})" if status["why"] else patch.name)
    texts = [f"{text}: {', '.join(lists[state])}" for state, text in SHOWN.items() if lists[state]]
    if texts:
        logger.info("pdtransport: hooks into vLLM %s", "; ".join(texts))


def take_news() -> list[PatchStatus]:
    """States noted in this process since the last call: the scheduler half sends them to the workers."""
    news = []
    for patch in PATCHES.values():
        if patch._noted is not None and (status := patch.state()) != patch._sent:
            patch._sent = status
            news.append(status)
    return news


# -- what checks are made of -----------------------------------------------------------------------------------------


def expect(
    function: Any,
    *,
    takes: Sequence[str] | None = None,
    accepts: Collection[str] = (),
    uses: Collection[str] = (),
    order: Sequence[str] = (),
) -> None:
    """Compare a function of vLLM's with what a hook relies on; looks through wrappers made with ``functools.wraps``.

    Args:
        takes: names of its first parameters.
        accepts: names of parameters at any position; a function with ``**kwargs`` accepts them all.
        uses: names that its body must read, write or call: of variables, attributes and keyword arguments.
        order: such names whose first occurrences must be in this order.

    Raises:
        Unexpected: something differs.
    """
    name = getattr(function, "__qualname__", repr(function))
    if takes is not None or accepts:
        _expect_parameters(name, function, takes or (), accepts)
    if not uses and not order:
        return
    found = names_in(inspect.unwrap(function))
    missing = [each for each in (*uses, *order) if each not in found]
    if missing:
        raise Unexpected(f"{name} does not use {', '.join(missing)}")
    places = [found.index(each) for each in order]
    if places != sorted(places):
        raise Unexpected(f"{name} does not use {', '.join(order)} in this order")


def _expect_parameters(name: str, function: Any, takes: Sequence[str], accepts: Collection[str]) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise Unexpected(f"{name} has no signature") from None
    given = list(parameters)
    if given[: len(takes)] != list(takes):
        raise Unexpected(f"{name} takes ({', '.join(given)}), not ({', '.join(takes)}, ...)")
    missing = [each for each in accepts if each not in given]
    if missing and not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        raise Unexpected(f"{name} has no parameter {', '.join(missing)}")


@lru_cache(maxsize=128)  # parsing a scheduler takes 20 ms, and several hooks look at it
def names_in(function: Any) -> tuple[str, ...]:
    """Names in a function's source, in the order in which they stand there, without comments and strings.

    Raises:
        Unexpected: its source can't be read.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        raise Unexpected(f"the source of {getattr(function, '__qualname__', function)!s} can't be read") from None
    found: list[tuple[int, int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.append((node.end_lineno or 0, node.end_col_offset or 0, node.attr))
        elif isinstance(node, ast.Name):
            found.append((node.end_lineno or 0, node.end_col_offset or 0, node.id))
        elif isinstance(node, ast.keyword) and node.arg is not None:
            found.append((node.lineno, node.col_offset, node.arg))
    return tuple(name for _, _, name in sorted(found))


def expect_fields(kind: type, *names: str) -> None:
    """``kind``, a dataclass or msgspec struct, must have these fields.

    Raises:
        Unexpected: a field is missing.
    """
    fields: Collection[str] = getattr(kind, "__struct_fields__", ()) or getattr(kind, "__dataclass_fields__", ())
    missing = [name for name in names if name not in fields]
    if missing:
        raise Unexpected(f"{kind.__name__} has no field {', '.join(missing)}")
