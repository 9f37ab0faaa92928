"""What became of each request, and what all of them together show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tests.identity.makers import NAMED_BY

Verdict = Literal["equal", "different", "either"]
TELLING = 0.8  # of different pairs whose two sides must answer differently by themselves, or the run shows nothing
SHOWN = 12
POOL = "pool"  # how a request was asked whose KV goes through the pool; there, what is another's is just not found


@dataclass(frozen=True)
class Outcome:
    """One request.

    Args:
        verdict: must be handed over, must not be, or may be (``why`` says why).
        why: of "either": what happened that allows decode to compute an equal pair's prompt itself.
        differs, labels: see :class:`tests.identity.draw.Pair`.
        allowed: parts that are equal and may be refused all the same.
        right: the answer is decode's own.
        telling: both sides, each asked alone, answer differently; None where that was not asked.
        used: prompt tokens from prefill, by vLLM's own count.
        off: nats by which the answer's margins are off decode's own.
    """

    number: int
    verdict: Verdict
    why: str
    differs: tuple[str, ...]
    labels: tuple[str, ...]
    how: str
    pair: str
    handed: bool
    used: int
    right: bool
    off: float
    telling: bool | None
    allowed: tuple[str, ...] = ()
    code: str = ""
    reason: str = ""
    path: str = ""
    asked_s: float = 0.0
    alone_s: float = 0.0

    @property
    def named(self) -> bool:
        """The reason names something that differs."""
        words = [word for part in (*self.differs, *self.allowed) for word in NAMED_BY[part]]
        return any(word in self.reason.lower() for word in words)

    @property
    def complaint(self) -> str:
        """What is wrong with it; "" if nothing is."""
        found = []
        if not self.right:
            found.append("the answer is not decode's own")
        if self.verdict == "equal" and not self.handed:
            found.append("an equal pair was not handed over")
        if self.verdict == "different" and self.handed:
            found.append("a different pair was handed over")
        if self.verdict == "different" and not self.handed and not self.named and self.how != POOL:
            found.append("the reason names nothing that differs")
        if self.handed != bool(self.used):
            found.append(f"{self.used} tokens of prefill's were used, says vLLM")
        if self.verdict == "equal" and self.telling:
            found.append("an equal pair's sides answer differently: the rig is wrong")
        return "; ".join(found)

    def line(self) -> str:
        what = f"{self.verdict} {'/'.join(self.differs) or self.why}".strip()
        labels = f", other {' and '.join(self.labels)}" if self.labels else ""
        came = "handed over" if self.handed else f"computed ({self.code}: {self.reason})"
        return f"#{self.number} {self.pair} ({what}{labels}; {self.how}): {came}"


@dataclass
class Report:
    """All outcomes of one run."""

    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    actions: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.complaint]

    @property
    def void(self) -> str:
        """Why this run shows nothing; "" if it does."""
        asked = self._control()
        told = sum(asked)
        if not asked or told < TELLING * len(asked):
            return f"only {told} of {len(asked)} different pairs answer differently by themselves"
        for verdict in ("equal", "different"):
            if not self._of(verdict):
                return f"no {verdict} pair was drawn"
        return ""

    def _of(self, verdict: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.verdict == verdict]

    def _control(self) -> list[bool]:
        different = (o for o in self.outcomes if o.verdict == "different" and o.differs != ("salt",))
        return [bool(outcome.telling) for outcome in different if outcome.telling is not None]

    def counts(self) -> dict[str, str]:
        """The counts that must be complete, as "k of m"."""
        equal, different, either = map(self._of, ("equal", "different", "either"))
        refused = [outcome for outcome in different if not outcome.handed]
        control = self._control()
        return {
            "answers equal decode's own": _of(o.right for o in self.outcomes),
            "equal pairs handed over": _of(o.handed for o in equal),
            "different pairs refused": _of(not o.handed for o in different),
            "refusals that name what differs": _of(o.named for o in refused if o.how != POOL),
            "may be handed over, and were": _of(o.handed for o in either),
            "different pairs that answer differently alone": _of(control),
        }

    def text(self) -> str:
        """A summary for people."""
        lines = [f"{len(self.outcomes)} requests, seed {self.seed}"]
        lines += [f"  {name}: {count}" for name, count in self.counts().items()]
        lines += ["what differed (requests, handed over, wrong answers, reasons that name it):"]
        lines += _table(self._of("different"), lambda o: " and ".join(o.differs))
        lines += ["equal under which other labels:"]
        lines += _table(self._of("equal"), lambda o: " and ".join(o.labels) or "none")
        lines += ["either:"]
        lines += _table(self._of("either"), lambda o: o.why)
        lines += ["by how they were asked:"]
        lines += _table(self.outcomes, lambda o: o.how)
        lines += ["done meanwhile: " + ", ".join(f"{name} {count}" for name, count in sorted(self.actions.items()))]
        lines += ["seconds: " + ", ".join(f"{name} {spent:.1f}" for name, spent in self.seconds.items())]
        if self.void:
            lines.append(f"VOID: {self.void}")
        lines.append(f"{len(self.failed)} failures" + (":" if self.failed else ""))
        lines += [f"  {outcome.complaint}: {outcome.line()}" for outcome in self.failed[:SHOWN]]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(outcome), "complaint": outcome.complaint} for outcome in self.outcomes]
        for row in rows:
            row["off"] = min(row["off"], 1e9)  # JSON has no infinity
        return {
            "seed": self.seed,
            "counts": self.counts(),
            "void": self.void,
            "failures": len(self.failed),
            "actions": dict(self.actions),
            "seconds": self.seconds,
            "outcomes": rows,
        }


def _of(facts: Iterable[bool]) -> str:
    known = list(facts)
    return f"{sum(known)} of {len(known)}"


def _table(outcomes: Sequence[Outcome], key: Any) -> list[str]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(key(outcome), []).append(outcome)
    rows = []
    for name, group in sorted(groups.items()):
        wrong, named = sum(not o.right for o in group), sum(o.named for o in group)
        rows.append(f"  {len(group):4} {sum(o.handed for o in group):4} {wrong:4} {named:4}  {name}")
    return rows
