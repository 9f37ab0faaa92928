"""What a soak found: growth by process beside the plain server's, what became of requests, and the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tests.soak.load import Counts
from tests.soak.sampling import COUNTS, MEMORY, Samples
from tests.soak.slopes import Slope, slope

WARM_UP = 1 / 3  # of the soak, left out
LEAST_SAMPLES = 10
BESIDE_PLAIN = {f"prefill {part}": f"plain {part}" for part in ("api", "core", "worker")}


@dataclass(frozen=True)
class Growth:
    """Of one quantity of one process. ``beyond_plain``: of the differences to the plain server's like process, sample
    by sample, which takes out what both have in common."""

    process: str
    what: str
    first: float
    last: float
    slope: Slope
    beyond_plain: Slope | None

    @property
    def judged(self) -> Slope:
        return self.slope if self.beyond_plain is None else self.beyond_plain

    @property
    def grows(self) -> bool:
        """What counts has an interval above zero; of free blocks, below it."""
        return self.judged.high < 0 if self.what == "free_blocks" else self.judged.low > 0


@dataclass
class Report:
    """Everything; ``trouble`` is what must not be, beside growth."""

    minutes: float
    clients: int
    seed: int
    counts: Counts = field(default_factory=Counts)
    samples: Samples = field(default_factory=Samples)
    trouble: list[str] = field(default_factory=list)
    at_rest: dict[str, Any] = field(default_factory=dict)

    def growth(self) -> list[Growth]:
        """Over the last two thirds, of all processes that were sampled often enough."""
        found = []
        since = self.minutes * 60 * WARM_UP
        for process in sorted(self.samples.taken):
            for what in (*MEMORY, *COUNTS):
                seconds, values = self.samples.series(process, what, since)
                if len(seconds) < LEAST_SAMPLES:
                    continue
                beyond = None
                if twin := BESIDE_PLAIN.get(process):
                    at, theirs = self.samples.series(twin, what, since)
                    if at == seconds:
                        beyond = slope(seconds, [a - b for a, b in zip(values, theirs, strict=True)])
                found.append(Growth(process, what, values[0], values[-1], slope(seconds, values), beyond))
        return found

    @property
    def complaints(self) -> list[str]:
        """Why the soak failed; none if it did not."""
        wrong = {end: count for end, count in self.counts.ends.items() if end not in ("ok", "left")}
        found = list(self.trouble)
        found += [f"{count} requests ended with {end}" for end, count in sorted(wrong.items())]
        found += [f"{self.counts.differing} answers differ from the plain server's"] if self.counts.differing else []
        found += [] if self.counts.ends["ok"] else ["no request was answered"]
        found += [
            f"{each.process}: {each.what} grows by {each.judged.low:+.2f} to {each.judged.high:+.2f} an hour"
            for each in self.growth()
            if each.grows and not each.process.startswith("plain")
        ]
        return found

    def text(self) -> str:
        """A table in Markdown."""
        counts, growth = self.counts, self.growth()
        asked = sum(counts.ends.values())
        lines = [
            f"{self.minutes:g} minutes, {self.clients} clients, seed {self.seed}. {asked} requests: "
            + ", ".join(f"{end} {count}" for end, count in counts.ends.most_common())
            + f". Of those answered: {', '.join(f'{path} {n}' for path, n in counts.paths.most_common())}. "
            f"{counts.compared} answer tokens compared, {counts.differing} answers differ. The plain server: "
            + ", ".join(f"{end} {count}" for end, count in counts.plain.most_common())
            + ".",
            "",
            "| process | what | at the beginning | at the end | slope an hour | difference to plain's, an hour | |",
            "|---|---|---|---|---|---|---|",
        ]
        for each in growth:
            beyond = "" if each.beyond_plain is None else _told(each.beyond_plain)
            mark = "**grows**" if each.grows else "" if each.judged.contains_zero else "shrinks"
            mark = "" if each.process.startswith("plain") else mark
            first, last = f"{each.first:.1f}", f"{each.last:.1f}"
            lines.append(
                f"| {each.process} | {each.what} | {first} | {last} | {_told(each.slope)} | {beyond} | {mark} |"
            )
        lines += ["", *(f"* {complaint}" for complaint in self.complaints)]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "minutes": self.minutes,
            "clients": self.clients,
            "seed": self.seed,
            "counts": vars(self.counts),
            "growth": [asdict(each) for each in self.growth()],
            "at_rest": self.at_rest,
            "trouble": self.trouble,
            "complaints": self.complaints,
            "samples": self.samples.taken,
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Report:
        """What :meth:`as_json` wrote, to be judged again."""
        counts = Counts()
        for name, value in told["counts"].items():
            setattr(counts, name, type(getattr(counts, name))(value))
        samples = Samples({name: [(at, each) for at, each in taken] for name, taken in told["samples"].items()})
        made = cls(told["minutes"], told["clients"], told["seed"], counts, samples)
        made.trouble, made.at_rest = told["trouble"], told["at_rest"]
        return made


def _told(what: Slope) -> str:
    return f"{what.per_hour:+.1f} ({what.low:+.1f} to {what.high:+.1f})"
