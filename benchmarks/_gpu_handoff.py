"""``benchmarks.handoff --gpu``: one model's time to first token, system by system, within a bound of time.

The servers of ``--together`` systems start, answer one request of each length that is not measured, then ``--runs`` of
each length, one at a time and in turns, with prompts that no server has seen; then they end before the next ones start.
Rows:

aggregated              one plain server
nixl                    NixlConnector: prefill first, then decode pulls
nixl-push               NixlPushConnector: both dispatched at once, prefill pushes
pdtransport             both dispatched at once; first token from decode
pdtransport P's token   the same requests: when prefill's HTTP response, which holds the first token, was there
router                  the same through our router
router first-token      the same with the router told to pass prefill's token on

Columns, milliseconds: *prefill*, *hand-off* and *TTFT* as in the module's own help; *+agg*: TTFT less the aggregated
server's at that length and mode; *paired*: the median of what it is more in the same round, which tells more of systems
that live together; *exposed*: from the moment at which prefill's worker saw the prompt computed to the
moment at which decode's had verified its last page; *commit*: from prefill's commit to the same. With ``--fragment``
each system is measured a second time after its servers' KV caches have been churned by many small requests of
different lifetimes; *x whole* is TTFT over that before; *runs* says how many contiguous runs 100 blocks of prefill's
lay in, where the system tells (NIXL's does; the churn is the same for all).
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from benchmarks._gpu_scale import Mode, Scale
from benchmarks._handoff_report import markdown
from pdtransport.errors import PDTransportError
from tests.rig import watch
from tests.rig.client import Answer, Client, Handed, Order, RequestFailed, hand_off, in_parallel
from tests.rig.device import seated
from tests.rig.router import routed
from tests.rig.servers import Connector, Server, ServerFailed, ServerSpec, fleet

MAX_TOKENS = 4
REQUEST_S = 60.0
LEAST_S = 30.0  # with less time left no further system is started
LAST_LINES, LINE_CHARS = 14, 240  # of a failed server's log
STATUS_LATER_S = 0.03  # prefill may hear the ack after decode's first token
CHURNED = 1.5  # times the cache's tokens
CHURN_BLOCKS = 12  # of the longest prompt that churns
CHURN_TOKENS = 24
PAIRS: tuple[Connector, ...] = ("pdtransport", "nixl-push", "nixl")
SYSTEMS = ("aggregated", *PAIRS)
FAILURES = (RequestFailed, PDTransportError, aiohttp.ClientError, asyncio.TimeoutError, OSError)  # of one request


@dataclass
class Sample:
    """One request; seconds. ``events``: what both workers noted, as seconds after the request was sent."""

    mode: Mode
    system: str
    length: int
    fragmented: bool = False
    ttft_s: float | None = None
    prefill_s: float | None = None
    handoff_s: float | None = None
    exposed_s: float | None = None
    commit_s: float | None = None
    runs_per_100: float | None = None
    failed: str = ""
    first_token_from: str = ""  # what our router says of it
    events: dict[str, float] = field(default_factory=dict)

    @property
    def row(self) -> tuple[Mode, str, bool, int]:
        return self.mode, self.system, self.fragmented, self.length


@dataclass
class Plan:
    """What to measure. ``ends``: ``time.monotonic`` second after which nothing new is begun."""

    scale: Scale
    modes: Sequence[Mode]
    systems: Sequence[str]
    lengths: Sequence[int]
    runs: int
    fragment: bool
    together: int
    settings: dict[str, Any]
    router: bool
    router_first_token: str
    seed: int
    ends: float
    logs: Path
    cards: tuple[int, ...] = ()  # prefill's (and the aggregated server's) GPU and decode's; none: the visible one

    def left_s(self) -> float:
        return self.ends - time.monotonic()


def specs_of(plan: Plan, system: str, model: Path, mode: Mode) -> list[ServerSpec]:
    if system == "aggregated":
        return [plan.scale.spec(system, model, mode, cards=seated(plan.cards, 0))]
    connector = next(name for name in PAIRS if name == system)
    settings = plan.settings if system == "pdtransport" else None
    return list(plan.scale.pair(connector, model, mode, settings, plan.cards))


def run(plan: Plan, done: Sequence[Sample], say: Any) -> Iterator[list[Sample]]:
    """Samples of one system after another, those of ``done`` left out; what fails to start is said and skipped."""
    finished = {(sample.mode, sample.system.split()[0]) for sample in done}
    with tempfile.TemporaryDirectory(prefix="pdtransport-model-") as folder:
        model = plan.scale.write_model(Path(folder))
        for mode in plan.modes:
            todo = [name for name in plan.systems if (mode, name) not in finished]
            for first in range(0, len(todo), plan.together):
                group = todo[first : first + plan.together]
                if plan.left_s() < LEAST_S:
                    say(f"{mode}: no time left for {', '.join(group)}")
                    continue
                try:
                    yield from _group(plan, group, model, mode, say)
                except ServerFailed as error:
                    say(f"{mode}: {', '.join(group)}: {brief(error)}")


def brief(error: ServerFailed) -> str:
    """An error without the bulk of the log that it ends with; ``--logs`` keeps that."""
    first, *rest = str(error).splitlines()
    return "\n".join(line[:LINE_CHARS] for line in [first, *rest[-LAST_LINES:]])


def _group(plan: Plan, group: Sequence[str], model: Path, mode: Mode, say: Any) -> Iterator[list[Sample]]:
    specs = [spec for name in group for spec in specs_of(plan, name, model, mode)]
    started = time.monotonic()
    with fleet(*specs, logs=plan.logs, timeout_s=min(plan.scale.start_s, plan.left_s())) as servers:
        say(f"{mode}: {', '.join(spec.name for spec in specs)} up after {time.monotonic() - started:.0f} s")
        rest = list(servers)
        systems = [
            _System(plan, name, mode, [rest.pop(0) for _ in specs_of(plan, name, model, mode)]) for name in group
        ]
        began = time.monotonic()
        samples = asyncio.run(_measure(plan, systems, say))
        say(f"{mode}: {', '.join(group)}: {len(samples)} samples in {time.monotonic() - began:.0f} s")
        yield samples


async def _measure(plan: Plan, systems: Sequence[_System], say: Any) -> list[Sample]:
    """Systems that live together take turns: what the machine does meanwhile meets all of them."""
    samples: list[Sample] = []
    with ExitStack() as stack:
        rows = [row for system in systems for row in system.rows(stack, say)]
        async with Client(REQUEST_S) as client:
            for row in rows:  # first requests set a pair's connection up, and compile kernels
                for length in plan.lengths:
                    for sample in await row(client, length):
                        if sample.failed:
                            say(f"{sample.mode}: {sample.system}: warming up with {length}: {sample.failed}")
            samples += await _rounds(plan, client, rows)
            if plan.fragment and plan.left_s() > 0:
                whole = [each for system in systems if await system.fragment(client, say) for each in system.rows()]
                samples += await _rounds(plan, client, whole)
    count = Counter(
        (one.system, one.first_token_from or one.failed or "?") for one in samples if "router" in one.system
    )
    if count:
        say(f"first tokens through the router: {dict(count)}")
    return samples


_Row = Callable[[Client, int], Awaitable[list["Sample"]]]


async def _rounds(plan: Plan, client: Client, rows: Sequence[_Row]) -> list[Sample]:
    samples: list[Sample] = []
    for _ in range(plan.runs):
        for length in plan.lengths:
            for row in rows:
                if plan.left_s() <= 0:
                    return samples
                await asyncio.sleep(plan.scale.idle_s)
                samples += await row(client, length)
    return samples


class _System:
    def __init__(self, plan: Plan, name: str, mode: Mode, servers: Sequence[Server]) -> None:
        self._plan, self._name, self._mode, self._servers = plan, name, mode, servers
        self._dice = random.Random(f"{plan.seed} {name} {mode} {time.time_ns()}")
        self._fragmented = False

    def rows(self, stack: ExitStack | None = None, say: Any = None) -> list[_Row]:
        """What is measured of it; with ``stack``, through routers too, which end with that."""
        found: list[_Row] = [self._one]
        if stack is not None and self._name == "pdtransport" and self._plan.router:
            found += self._routed(stack, say)
        return found

    def _routed(self, stack: ExitStack, say: Any) -> list[_Row]:
        prefill, decode = self._servers
        found: list[_Row] = []
        early = self._plan.router_first_token.split() or ["--first-token", "auto"]
        for row, args in (("router", ["--first-token", "off"]), ("router first-token", early)):
            try:
                router = stack.enter_context(routed([prefill], [decode], self._plan.logs, "concurrent", *args))
            except ServerFailed as error:
                say(f"{self._mode}: {row}: {error}")
            else:
                found.append(partial(self._one, router=router.url, row=f"pdtransport {row}"))
        return found

    async def fragment(self, client: Client, say: Any) -> bool:
        try:
            await self._churn(client)
        except FAILURES as error:
            say(f"{self._mode}: {self._name}: no fragmentation: {error}")
            return False
        self._fragmented = True
        return True

    async def _one(self, client: Client, length: int, router: str = "", row: str = "") -> list[Sample]:
        """The samples of one request: two of a hand-off whose first token prefill has as well."""
        prompt = self._plan.scale.prompt(length, self._dice)
        sample = Sample(self._mode, row or self._name, length, self._fragmented)
        try:
            if router or len(self._servers) == 1:
                to = router or self._servers[0]
                answer = await client.complete(to, prompt, MAX_TOKENS, stream=True, return_token_ids=False)
                sample.ttft_s = answer.ttft_s
                sample.first_token_from = answer.headers.get("x-pd-first-token", "")
                return [sample]
            return await self._handed(client, prompt, sample)
        except FAILURES as error:
            sample.failed = f"{type(error).__name__}: {error}"[:300]
            return [sample]

    async def _handed(self, client: Client, prompt: Sequence[int], sample: Sample) -> list[Sample]:
        prefill, decode = self._servers
        order: Order = "serial" if self._name == "nixl" else "concurrent"
        handed = await hand_off(client, prefill, decode, prompt, MAX_TOKENS, order, stream=True, echo=False)
        if handed.prefill is None:
            raise handed.prefill_error or RequestFailed(0, "prefill failed")
        sent = min(handed.prefill.sent, handed.decode.sent)
        sample.ttft_s = handed.decode.first_token - sent
        sample.prefill_s = handed.prefill.done - sent
        sample.handoff_s = handed.decode.first_token - handed.prefill.done
        sample.runs_per_100 = runs_per_100(handed.prefill)
        if self._name != "pdtransport":
            return [sample]
        await self._timelines(handed, sent, sample)
        early = Sample(self._mode, "pdtransport P's token", sample.length, self._fragmented, ttft_s=sample.prefill_s)
        return [sample, early]

    async def _timelines(self, handed: Handed, sent: float, sample: Sample) -> None:
        """What both workers noted. A transfer that failed on the way makes the sample a failed one."""
        await asyncio.sleep(STATUS_LATER_S)
        for server, role, who in zip(self._servers, ("producer", "consumer"), "PD", strict=True):
            for reply in await watch.status(server, handed.transfer):
                for record in reply["transfers"]:
                    if record["role"] == role:
                        sample.failed = sample.failed or record["reason"]
                        sample.events |= {f"{who} {name}": at - sent for name, at in record["events"].items()}
        events = sample.events
        if "D verified" not in events:
            sample.failed = sample.failed or "it was not handed over"
            return
        sample.exposed_s = events["D verified"] - events["P computed"] if "P computed" in events else None
        sample.commit_s = events["D verified"] - events["P committed"] if "P committed" in events else None

    async def _churn(self, client: Client) -> None:
        """Fill the KV caches with many small requests of different lifetimes, again and again, so that the blocks that
        are free lie in no order."""
        scale = self._plan.scale
        dice = random.Random(self._plan.seed)  # the same for all systems

        async def one(server: Server, prompt: list[int], tokens: int) -> None:
            if self._plan.left_s() > 0:
                await client.complete(server, prompt, tokens)

        jobs, total = [], 0.0
        while total < CHURNED * scale.kv_tokens:
            length = dice.randrange(1, CHURN_BLOCKS * scale.block_size)
            tokens = dice.randrange(1, CHURN_TOKENS)
            total += length + tokens + scale.block_size / 2
            jobs.append((scale.prompt(length, dice), tokens))
        await asyncio.gather(
            *(
                in_parallel(scale.max_num_seqs, [lambda s=server, p=p, n=n: one(s, p, n) for p, n in jobs])
                for server in self._servers
            )
        )


def runs_per_100(answer: Answer) -> float | None:
    """Contiguous ascending runs that 100 of a request's blocks lie in, where the answer names its blocks."""
    groups = (answer.kv_params or {}).get("remote_block_ids")
    if not groups or not isinstance(groups[0], list) or len(groups[0]) < 2:
        return None
    ids = groups[0]
    runs = 1 + sum(after != before + 1 for before, after in pairwise(ids))
    return 100 * runs / len(ids)


# -- tables -------------------------------------------------------------------------------------------------------

COLUMNS = (
    "mode",
    "tokens",
    "system",
    "prefill",
    "hand-off",
    "TTFT",
    "(best)",
    "+agg",
    "paired",
    "exposed",
    "commit",
    "x whole",
)


def summarise(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """A row of medians for each mode, length, system and state of the cache, in that order; milliseconds."""
    rows: list[dict[str, Any]] = []
    names = list(dict.fromkeys(sample.system for sample in samples))
    fragmented = [False, True]
    keys = sorted(
        {sample.row for sample in samples},
        key=lambda row: (row[0], row[3], names.index(row[1]), fragmented.index(row[2])),
    )
    for mode, system, broken, length in keys:
        chosen = [s for s in samples if s.row == (mode, system, broken, length)]
        good = [s for s in chosen if not s.failed]
        ttft = _middle([s.ttft_s for s in good])
        rounds = [s for s in samples if s.row == (mode, "aggregated", False, length)]
        base = _middle([s.ttft_s for s in rounds if not s.failed])
        whole = _middle([s.ttft_s for s in samples if s.row == (mode, system, False, length) and not s.failed])
        rows.append(
            {
                "mode": mode,
                "tokens": length,
                "system": system + (" fragmented" if broken else ""),
                "runs": len(good),
                "failed": len(chosen) - len(good),
                "prefill": _ms(_middle([s.prefill_s for s in good])),
                "hand-off": _ms(_middle([s.handoff_s for s in good])),
                "TTFT": _ms(ttft),
                "(best)": _ms(min((s.ttft_s for s in good if s.ttft_s is not None), default=None)),
                "+agg": _ms(ttft - base if ttft is not None and base is not None else None),
                "paired": _ms(_paired(rounds, chosen) if not broken else None),
                "exposed": _ms(_middle([s.exposed_s for s in good])),
                "commit": _ms(_middle([s.commit_s for s in good])),
                "x whole": round(ttft / whole, 2) if broken and ttft and whole else None,
                "runs_per_100": _round(_middle([s.runs_per_100 for s in good])),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """``summarise``'s rows as text, columns that nobody filled left out; failures and fragmentation where there are."""
    columns = [name for name in (*COLUMNS, "runs_per_100") if any(row[name] is not None for row in rows)]
    if any(row["failed"] for row in rows):
        columns.append("failed")
    cells = [["" if row[name] is None else _text(row[name]) for name in columns] for row in rows]
    return markdown([name.replace("runs_per_100", "runs/100") for name in columns], cells)


def document(plan: Plan, machine: dict[str, Any], samples: Sequence[Sample]) -> str:
    shown = {"scale": asdict(plan.scale), "runs": plan.runs, "settings": plan.settings, "seed": plan.seed}
    shown["cards"] = list(plan.cards)
    return json.dumps(
        {"machine": machine, **shown, "rows": summarise(samples), "samples": [asdict(s) for s in samples]}, indent=1
    )


def read(files: Sequence[Path]) -> list[Sample]:
    """Samples of earlier runs' JSON files."""
    return [Sample(**sample) for file in files for sample in json.loads(file.read_text())["samples"]]


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _paired(theirs: Sequence[Sample], ours: Sequence[Sample]) -> float | None:
    """None where a round of one lacks the other."""
    if len(theirs) != len(ours):
        return None
    pairs = [(a.ttft_s, b.ttft_s) for a, b in zip(theirs, ours, strict=True) if not a.failed and not b.failed]
    return _middle([b - a for a, b in pairs if a is not None and b is not None])


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
