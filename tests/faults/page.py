"""The page ``docs/faults.md``: one part for each rig, written from its report."""

from __future__ import annotations

from pathlib import Path

from tests.faults.report import Cell, Report, ends, runs, spread
from tests.faults.steps import STEPS


def write(report: Report, path: Path, rig: str, machine: str, date: str) -> None:
    """Put this rig's part into the page; the others stay as they are."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = {}
    for name in reversed(TITLES):  # in the order of the page; the first one begins it
        page, title, text = page.partition(TITLES[name]) if TITLES[name] in page else (page, "", "")
        parts[name] = title + text
    parts[rig] = PARTS[rig](report, machine, date)
    ordered = [parts[name].rstrip("\n") + "\n" for name in TITLES if parts[name]]
    path.write_text("\n".join(ordered), encoding="utf-8")


def engine_free(report: Report, machine: str, date: str) -> str:
    dead = deaths(report)
    head = FREE.format(links=" and ".join(report.links), **facts(report, machine, date), **times(dead))
    parts = [head, failures(report, "##"), STEPS_HEAD, table(report), REST_HEAD, rows(report)]
    return "\n".join(parts)


def vllm(report: Report, machine: str, date: str) -> str:
    head = VLLM.format(**facts(report, machine, date), **times(deaths(report)))
    return "\n".join([head, failures(report, "###"), rows(report)])


def pool(report: Report, machine: str, date: str) -> str:
    return "\n".join([POOL.format(**facts(report, machine, date)), failures(report, "###"), rows(report)])


def facts(report: Report, machine: str, date: str) -> dict[str, object]:
    whole = report.total
    return {
        "runs": whole.runs,
        "struck": whole.struck,
        "failed": whole.failed,
        "ends": sum(whole.ends.values()),
        "commands": "`, `".join(report.commands),
        "machine": machine,
        "date": date,
    }


def deaths(report: Report) -> Cell:
    """All runs in which a process of an engine died."""
    whole = Cell()
    for cell in report.cells.values():
        if cell.told or cell.beyond or cell.held:
            whole.merge(cell)
    return whole


def times(dead: Cell) -> dict[str, str]:
    return {
        "told": spread(dead.told),
        "held": spread(dead.held),
        "beyond": spread(dead.beyond),
        "beyonds": str(len(dead.beyond)),
        "healthy": spread(dead.healthy),
        "worst": f"{max(dead.beyond, default=0.0):.2f} s",
    }


def failures(report: Report, level: str) -> str:
    if not report.failures and not report.trouble:
        return f"No run broke a promise.\n{report.note and f'{chr(10)}{report.note}{chr(10)}'}"
    lines = [f"{level} Broken promises\n"]
    if report.note:
        lines.append(f"{report.note}\n")
    for text in report.failures:
        head, *problems = text.splitlines()
        lines.append(f"* {head}" + "".join(f"<br>`{problem.strip()[:300]}`" for problem in problems[:1]))
    lines += [f"* at the end: {text}" for text in report.trouble]
    return "\n".join(lines) + "\n"


def table(report: Report) -> str:
    columns = sorted({column for row, column in report.cells if row in STEPS})
    lines = ["| " + " | ".join(["protocol step", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
    for row in STEPS:
        cells = [cell_of(report.cells.get((row, column))) for column in columns]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    return "\n".join(lines) + "\n"


def cell_of(cell: Cell | None) -> str:
    if cell is None:
        return ""
    parts = [ends(cell)]
    if cell.told:
        parts.append(f"told after {spread(cell.told)}")
    if cell.held:
        parts.append(f"kept for {spread(cell.held)}")
    parts.append(f"again after {spread(cell.mended)}")
    if cell.failed:
        parts.append(f"**{cell.failed} FAILED**")
    return "<br>".join([*parts, runs(cell)])


def rows(report: Report) -> str:
    lines = ["| where | what | transfers ended | took | again after | runs |", "|---|---|---|---|---|---|"]
    for (row, column), cell in sorted(report.cells.items()):
        if row not in STEPS:
            failed = f", **{cell.failed} FAILED**" if cell.failed else ""
            told = [row, column, ends(cell), spread(cell.took), spread(cell.mended), runs(cell) + failed]
            lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"


FREE = """# Faults

Written by `{commands}` on {date} ({machine}); change the rig, not this page.

{runs} runs over the links {links}: real processes (one or two prefill workers, one decode worker), real sockets and
links, {ends} transfers. In {struck} of them the fault took effect; **{failed} broke a promise**. A run fails if
a transfer that was reported ok has other bytes than its prompt's, a byte is written that nobody granted, a transfer has
not ended by its deadlines, an error is raised in an I/O thread, a page, slot, ticket, descriptor or thread is not given
back, the counters do not add up, or transfers do not go through again afterwards.

**When a process dies** (median / p99): a survivor is told, and its transfers with the dead end, {told} after the
death, or after it asked for one where that came later (then it takes `control.connect_s`, 2 s; the next table has
those that were in touch). A survivor's transfers, those that go well included, end {beyond} after the moment at which
the engines had said all about them (a healthy one ends within 0.2 s of that; worst of {beyonds}: {worst}). Pages that
nobody had asked for when decode died are kept for `deadlines.hold_s`, 3 s here: {held}. No request waits for these.

**When the weights of an engine change** (a reload, an update, waking with others) transfers of the old ones end as
`refused`, on both sides, for a reason that names the weights; decode recomputes or fails by its policy. A request that
asked in that very moment may end as `peer_lost` instead. What decode has received and not begun fails likewise; what it
computes already goes on. See [security.md](security.md#whose-weights-kv-is-of).

**When the pool ends under `pdlaunch`** no request fails: 30 of 30 beside a SIGKILL were answered by real vLLM servers
(1P1D, 5 clients at once), its 256 MiB were given back within 0.3 s, and the servers found the next pool by themselves.
See [pdlaunch.md](pdlaunch.md#what-up-does).
"""
STEPS_HEAD = """## A process dies, or stands still, at a step of the protocol

The process strikes itself (SIGKILL, SIGSTOP) at exactly that step, in the middle of a transfer of five batches. A cell
says how the handles ended that the surviving and the stopped workers held (`ok`, or the outcome's code), how long
after the death a survivor was told and its transfer ended (*told after*: median / p99), how long it kept pages that
nobody had asked for (*kept for*: `deadlines.hold_s`), and when a transfer went through again, the restart of what died
included (*again after*; the rig begins to try once all of the run's handles have ended, kept ones too).
"""
REST_HEAD = """## Messages, batches and processes

One fault a run, unless it says otherwise, on two to five transfers at once; many strike only some of them, or none
(*struck*: runs in which the fault took effect). *took*: from the last word that the engines said about a transfer until
decode's handle ended; *again after*: until a transfer went through once the fault was over, or from a process' death
(median / p99 each). Deadlines are shortened here (`tests/faults/plan.py`); heartbeats and liveness are the defaults.
"""
VLLM_TITLE = "## Real vLLM\n"
VLLM = f"""{VLLM_TITLE}
Written by `{{commands}}` on {{date}} ({{machine}}).

{{runs}} runs, {{ends}} requests: vLLM servers with `tiny-lm` (two that prefill, two that decode) behind `pdrouter`. A
run is a round of two to seven requests, streamed or not, three of five through the router and the others straight to
two servers, while one thing goes wrong; or, where it says so, one request. In {{struck}} the fault took effect;
**{{failed}} broke a promise**. A run fails if status 200 comes with other tokens than a plain server's, a request has
not ended by its deadline, the router (unless it is killed itself) breaks a stream off without an error event, no
request is answered afterwards, or one fails without a fault. Every 25 rounds and in the end: all blocks free, no
transfer, descriptors, threads and memory of workers and router as at the start; servers that died, started again, are
used again, while nobody else was started; no stack trace in a log; no process left; the counters of servers none of
which died agree with each other. After each round that strikes the router: all blocks and transfers of all servers
free, and these the same processes as before. Now and then vLLM loses the word that wakes an idle process of its own
and looks again after 5 s, with or without a KV connector; the rig shortens that, so as to measure the faults.

**When a server dies** (median / p99): requests that were under way through the router had ended {{told}} after the
death, which bounds what a death adds to any of them: without it, it would have gone on past that moment. For
{{beyonds}} of them the same requests were sent right before, at the same moments, with nobody dying: these took
{{healthy}}, and with the death {{beyond}} longer; worst {{worst}}.

*transfers ended*: `ok` (disaggregated), `ok from decode alone` (the end of the router's ladder), `left` (the client),
or the error. *took*: the whole request. *again after*: until a new request was answered once the fault was over, or
from a process' death.
"""
POOL_TITLE = "## The shared pool\n"
POOL = f"""{POOL_TITLE}
Written by `{{commands}}` on {{date}} ({{machine}}).

{{runs}} runs: one pool (`pdtransport.pool.server.service`, as `pdpool` runs it) and two clients (`PoolClient`, as an
engine's worker uses it), each in a process of its own, {{ends}} chunks asked to be stored or loaded. In {{struck}} of
them the fault took effect; **{{failed}} broke a promise**. A run fails if what a load calls READ is not what was
stored, byte for byte, or a byte is written beside it; a call has not ended by its deadline; a chunk that was reported
stored is lost although the pool lived and nothing was damaged; a chunk can't be stored and loaded again within 10 s;
the pool keeps a byte, chunk, reference, request, client, file or descriptor once all is dropped, or a pin beyond its
time; the counters do not add up (each chunk asked for, each client that died); or an error is raised in a thread.

*mid-store*, *mid-load*: in the middle of a copy, some of its bytes written. *transfers ended*: verdicts, a chunk each
([pool.md](pool.md#verdicts)). *took*: a call; deadlines are 0.5 to 3 s. *again after*: until both clients stored and
loaded again, from the moment at which the fault began (median / p99).
"""
FIFTY_TITLE = "## Fifty requests under way\n"  # written by hand, from tests.soak.kills
TITLES = {"engine-free": "# Faults\n", "vllm": VLLM_TITLE, "pool": POOL_TITLE, "fifty": FIFTY_TITLE}
PARTS = {"engine-free": engine_free, "vllm": vllm, "pool": pool}
