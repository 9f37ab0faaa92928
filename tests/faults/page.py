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
links, {ends} transfers. In {struck} runs the fault took effect; **{failed} broke a promise**. A run fails if a transfer
reported as ok delivered other bytes than its prompt's, a byte was written that nobody granted, a transfer did not end
by its deadlines, an error was raised in an I/O thread, a page, slot, ticket, descriptor or thread was not released, the
counters do not add up, or transfers do not succeed again afterwards.

**When a process dies** (median / p99): survivors are told, and their transfers with the dead process end, {told} after
the death. If a survivor asks for a transfer only after the death, its time counts from then and is `control.connect_s`,
2 s; the next table has only survivors that were connected. All transfers of a survivor, successful ones included, end
{beyond} after the engines' last call for them (a healthy transfer ends within 0.2 s of that call; worst of {beyonds}:
{worst}). Pages that nobody had asked for when decode died are kept for `deadlines.hold_s`, 3 s here: {held}. No request
waits for these pages.

**When the weights of an engine change** (by a reload, an update, or waking up with other weights), transfers of KV of
the old weights end as `refused` on both sides, with a reason that names the weights; decode recomputes the prompt or
fails the request, by its policy. A transfer that is requested at that very moment may end as `peer_lost` instead. Pages
that decode has received but not used yet count as failed, too; requests that decode is already computing continue. See
[security.md](security.md#whose-weights-kv-is-of).

**When the pool is killed under `pdlaunch`**, no request fails: real vLLM servers (1P1D, 5 clients at once) answered 30
of 30 requests around a SIGKILL of the pool, its 256 MiB were freed within 0.3 s, and the servers found the next pool by
themselves. See [pdlaunch.md](pdlaunch.md#what-up-does).
"""
STEPS_HEAD = """## A process dies or is stopped at a step of the protocol

The process sends itself SIGKILL or SIGSTOP at exactly that step, in the middle of a transfer of five batches. A cell
says how the handles of the surviving and the stopped workers ended (`ok`, or the outcome's code), followed by times
(median / p99). *told after*: from the death until a survivor was told and its transfer ended. *kept for*: how long a
survivor kept pages that nobody had asked for (`deadlines.hold_s`). *again after*: until a transfer succeeded again,
including the restart of what died; the rig begins to try once all of the run's handles have ended, kept ones too.
"""
REST_HEAD = """## Messages, batches and processes

Each run has one fault, unless its row says otherwise, and two to five transfers at once. Many faults strike only some
of the transfers, or none (*struck*: runs in which the fault took effect). *took*: from the engines' last call for a
transfer until decode's handle ended. *again after*: from the end of the fault, or from a process's death, until a
transfer succeeded (median / p99 each). Deadlines are shortened here (`tests/faults/plan.py`); heartbeats and liveness
are the defaults.
"""
VLLM_TITLE = "## Real vLLM\n"
VLLM = f"""{VLLM_TITLE}
Written by `{{commands}}` on {{date}} ({{machine}}).

{{runs}} runs, {{ends}} requests: vLLM servers with `tiny-lm` (two for prefill, two for decode) behind `pdrouter`. A run
is a round of two to seven requests (or one, where the row says so), streamed or not, during which one thing goes wrong.
Three requests in five go through the router, the others straight to two servers. In {{struck}} runs the fault took
effect; **{{failed}} broke a promise**.

A run fails if a response with status 200 has other tokens than a plain server's, a request has not ended by its
deadline, the router (unless it is killed itself) breaks a stream off without an error event, no request is answered
afterwards, or a request fails without a fault. Every 25 rounds and at the end, the rig checks that all blocks are free
and no transfer is left; that descriptors, threads and memory of workers and router are as at the start; that servers
that died were started again and are used again, and that no other server was restarted; that no log has a stack trace
and no process is left; and that the counters of servers agree with each other if none of them died. After each round
that strikes the router, it checks that all blocks and transfers of all servers are free, and that the servers are the
same processes as before. Now and then vLLM, with or without a KV connector, loses a notification that wakes an idle
process of its own, which then looks again after 5 s; the rig shortens that time, so as to measure only the faults.

**When a server dies** (median / p99): requests that were in flight through the router ended {{told}} after the death. A
death adds no more than that to any of them, since without it they would also have run past that moment. {{beyonds}} of
them were also sent right before, at the same moments, without a death: they took {{healthy}} then, and {{beyond}}
longer with the death; worst {{worst}}.

*transfers ended*: `ok` (disaggregated), `ok from decode alone` (the router's last fallback), `left` (the client left),
or the error. *took*: the whole request. *again after*: from the end of the fault, or from a process's death, until a
new request was answered.
"""
POOL_TITLE = "## The shared pool\n"
POOL = f"""{POOL_TITLE}
Written by `{{commands}}` on {{date}} ({{machine}}).

{{runs}} runs: one pool (`pdtransport.pool.server.service`, as `pdpool` runs it) and two clients (`PoolClient`, as an
engine's worker uses it), each in its own process, and {{ends}} chunks to store or load. In {{struck}} runs the fault
took effect; **{{failed}} broke a promise**. A run fails if bytes that a load reports as READ differ from those stored,
or a byte beside them is written; a call has not ended by its deadline; a chunk that was reported as stored is lost
although the pool lived and nothing was damaged; a chunk can't be stored and loaded again within 10 s; the pool keeps a
byte, chunk, reference, request, client, file or descriptor after everything is dropped, or a pin beyond its time; the
counters do not add up (each chunk asked for, each client that died); or an error is raised in a thread.

*mid-store*, *mid-load*: in the middle of a copy, with some of its bytes written. *transfers ended*: one verdict per
chunk ([pool.md](pool.md#verdicts)). *took*: one call; deadlines are 0.5 to 3 s. *again after*: from the beginning of
the fault until both clients stored and loaded again (median / p99).
"""
FIFTY_TITLE = "## Fifty requests under way\n"  # written by hand, from tests.soak.kills
TITLES = {"engine-free": "# Faults\n", "vllm": VLLM_TITLE, "pool": POOL_TITLE, "fifty": FIFTY_TITLE}
PARTS = {"engine-free": engine_free, "vllm": vllm, "pool": pool}
