"""Runs plans, one after the other, on one set of worker processes, and judges each."""

from __future__ import annotations

import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from tests.faults.network import ADDRESSES, Network
from tests.faults.plan import DEADLINES, PREFILL_SAYS, REQUEST_S, Plan, healthy
from tests.faults.processes import Ended, Process, WorkerLost
from tests.faults.worker import Start
from tests.rig.ports import HOST, Ports

IDLE_S = 12.0  # after the last end, until nothing is held any more: two deadlines of the longest grant kept in vain
MENDED_S = 10.0  # after the faults ended, until a transfer goes through again
SLACK_S = 1.0
GROWTH_BYTES = 64 << 20  # of a worker's resident memory over all runs


@dataclass
class Result:
    """What one run showed. ``problems`` is empty if every promise held."""

    plan: Plan
    problems: list[str] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)  # "ok", or the code, of each handle
    took_s: list[float] = field(default_factory=list)  # of each decode handle, from the last word said about it
    told_s: list[float] = field(default_factory=list)  # from a process' death until it failed a survivor's transfer
    held_s: list[float] = field(default_factory=list)  # from the same until offers that nobody had claimed were let go
    beyond_s: list[float] = field(default_factory=list)  # ends of requests that lived through a death, after a healthy
    # one would have ended
    healthy_s: list[float] = field(default_factory=list)  # what the same requests take without a death
    mended_s: float | None = None  # from the last fault until a transfer went through again
    injected: Counter[str] = field(default_factory=Counter)
    struck: bool = False  # a process died or stood still


class Harness:
    """``prefills`` prefill workers and one decode worker over one link."""

    def __init__(
        self, link: str, prefills: int, ports: Ports, number: int, network: Network | None = None, mutant: str = ""
    ) -> None:
        self.link, self.prefills, self.network = link, prefills, network
        self.host = ADDRESSES[0] if network else HOST
        settings: dict[str, Any] = {
            "links": {"order": [link], "batch_bytes": 1 << 16, "staging_bytes": 1 << 19, "probe_bytes": 1 << 16},
            "deadlines": DEADLINES,
        }
        self.base = ports.take(prefills)
        nonce = secrets.token_hex(3)
        starts = []
        for rank in range(prefills):
            name = f"p{number}-{nonce}"
            start = Start("prefill", name, rank, prefills, self.base + rank, settings, mutant=mutant)
            starts.append(start)
        starts.append(Start("decode", f"d{number}-{nonce}", 0, 1, 0, settings, mutant=mutant))
        if network is not None:
            for start, name, address in zip(starts, network.names, ADDRESSES, strict=True):
                start.namespace, start.environment = name, {"UCX_TLS": "tcp"}
                start.settings = {**settings, "control": {"host": address, "allow_plaintext": True}}
        self.workers = {f"{start.role}{start.rank}": Process(start) for start in starts}
        self.said: Counter[tuple[str, str]] = Counter()  # (worker, offer or receive) since its process started
        self.rest: dict[str, dict[str, Any]] = {}  # what each process held when nothing was under way

    # -- one run -------------------------------------------------------------------------------------------------

    def run(self, plan: Plan) -> Result:
        """Never raises for what workers do: that stands in the result."""
        result = Result(plan)
        try:
            self._start()
            before = self._audits()
            run = _Run(self, plan, result)
            run.go()
            mended_from = time.monotonic()
            self._start()
            for worker in self.workers.values():
                worker.tell("rules", [])
            self._mend(result, run, mended_from)
            self._judge(result, run, before)
        except WorkerLost as lost:
            result.problems.append(f"lost: {lost}")
            self.close()
        return result

    def _start(self) -> None:
        for name, worker in self.workers.items():
            if not worker.alive:
                worker.up()
                self.rest.pop(name, None)
                self.said[name, "offer"] = self.said[name, "receive"] = 0

    def _audits(self) -> dict[str, dict[str, Any]]:
        return {name: worker.audit() for name, worker in self.workers.items()}

    def _mend(self, result: Result, run: _Run, since: float) -> None:
        """After the fault: transfers go through again, without anything being restarted but what died."""
        until = time.monotonic() + MENDED_S
        while time.monotonic() < until:
            self._start()
            probe = Result(healthy(secrets.randbits(40), self.link, self.prefills))
            _Run(self, probe.plan, probe).go()
            result.problems += [f"afterwards: {problem}" for problem in probe.problems]
            if probe.ended["ok"] == self.prefills + 1 and sum(probe.ended.values()) == self.prefills + 1:
                if result.mended_s is None:
                    result.mended_s = time.monotonic() - (run.struck_at or since)
                return
            time.sleep(0.02)
        result.problems.append(f"no transfer went through within {MENDED_S} s after the fault: {dict(probe.ended)}")

    # -- the oracle ----------------------------------------------------------------------------------------------

    def _judge(self, result: Result, run: _Run, before: dict[str, dict[str, Any]]) -> None:
        until = time.monotonic() + IDLE_S
        while True:
            found = self._audits()
            leaks = [leak for name, audit in found.items() for leak in self._leaks(name, audit)]
            if not run.died:
                leaks += _uncounted_replays(result.plan, before, found)
            if not leaks or time.monotonic() > until:
                break
            time.sleep(0.02)
        result.problems += leaks
        for name, audit in found.items():
            self.rest.setdefault(name, audit)
            if audit["written"]:
                result.problems.append(f"{name}: {audit['written']} bytes were written that nobody granted")
            result.problems += [f"{name}: {text}" for text in audit["complaints"]]
            result.problems += self._uncounted(name, Counter(audit["counters"]))
            if name not in run.died:
                result.injected.update(Counter(audit["injected"]) - Counter(before[name]["injected"]))
        if any(audit["complaints"] for audit in found.values()) or leaks:
            self.close()  # the next run starts clean

    def _leaks(self, name: str, audit: dict[str, Any]) -> list[str]:
        leaks = [f"{name}: {count} {what} never given back" for what, count in audit["live"].items() if count]
        rest = self.rest.get(name)
        if rest is not None:
            if audit["threads"] > rest["threads"]:
                leaks.append(f"{name}: {audit['threads']} threads, {rest['threads']} before")
            if audit["descriptors"] > rest["descriptors"]:
                more = dict(Counter(audit["open"]) - Counter(rest["open"]))
                leaks.append(f"{name}: {audit['descriptors']} descriptors, {rest['descriptors']} before: {more}")
            if audit["resident"] > rest["resident"] + GROWTH_BYTES:
                leaks.append(f"{name}: resident memory grew from {rest['resident']} to {audit['resident']} bytes")
        return leaks

    def _uncounted(self, name: str, counters: Counter[str]) -> list[str]:
        """Counters must account for every call, whatever became of it."""
        problems = []
        for verb, ends, refusals in (
            ("offer", ("handovers_ok", "handovers_failed"), "opens_refused_"),
            ("receive", ("fetches_ok", "fetches_failed"), "fetches_refused_"),
        ):
            total = sum(n for key, n in counters.items() if key in ends or key.startswith(refusals))
            if total != self.said[name, verb]:
                problems.append(f"{name}: {self.said[name, verb]} calls of {verb}, but {total} are counted")
        return problems

    def close(self) -> list[str]:
        """End all workers; what went wrong with that."""
        self.rest.clear()
        return [problem for problem in [worker.close() for worker in self.workers.values()] if problem]


def _uncounted_replays(plan: Plan, before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[str]:
    """Decode counts each message of an old generation, or of another transfer, as such."""
    if plan.column not in ("replay", "foreign") or plan.row not in PREFILL_SAYS:
        return []
    said = sum(
        after[name]["injected"].get(plan.column, 0) - before[name]["injected"].get(plan.column, 0) for name in after
    )
    names = ("stale_messages", "late_messages")
    counted = sum(after["decode0"]["counters"].get(n, 0) - before["decode0"]["counters"].get(n, 0) for n in names)
    return [f"decode0: {said} messages were replayed, {counted} counted"] if counted < said else []


class _Run:
    """One plan under way."""

    def __init__(self, harness: Harness, plan: Plan, result: Result) -> None:
        self.harness, self.plan, self.result = harness, plan, result
        self.died: set[str] = set()
        self.struck_at: float | None = None  # when a process died or stopped
        self.healed_at: float | None = None  # when the network was mended
        self._nonce = secrets.token_hex(4)
        self._owed: dict[tuple[str, str], float] = {}  # (worker, transfer) -> last word said about it
        self._began: dict[tuple[str, str], float] = {}  # the same -> first word
        self._due: dict[str, float] = {}  # transfer -> when the engines will have said everything about it
        self._ended: dict[tuple[str, str], Ended] = {}
        self._dying: set[str] = set()  # killed, and not yet seen dead
        self._continue: list[tuple[float, Process]] = []
        self._last_word = 0.0

    def go(self) -> None:
        """Play the plan to its end, or to the deadline of every request."""
        workers = self.harness.workers
        for name, rules in self.plan.rules.items():
            workers[name].tell("rules", rules)
        if self.plan.column in ("replay", "foreign"):
            for name in self.plan.rules:  # what is said before the rules hold is of the past to them
                workers[name].audit()
        begin = time.monotonic()
        timers = sorted(self._timers(begin), key=lambda item: item[0])
        self._last_word = begin + max([at for at, _ in timers], default=0.0)
        while True:
            now = time.monotonic()
            while timers and begin + timers[0][0] <= now:
                timers.pop(0)[1]()
            self._watch(now)
            if not timers and not self._owed and not self._continue and not self._dying:
                break
            if now > self._last_word + self.plan.stopped_s + REQUEST_S:
                for name, transfer in self._owed:
                    self.result.problems.append(f"{name}: {transfer} has not ended {REQUEST_S} s after its deadlines")
                break
            pause = min(0.02, max(0.0, begin + timers[0][0] - now)) if timers else 0.02
            self._listen(pause)
        self._sum_up()

    def _timers(self, begin: float) -> list[tuple[float, Callable[[], None]]]:
        timers: list[tuple[float, Callable[[], None]]] = []
        prefills = [name for name in self.harness.workers if name.startswith("prefill")]
        port, ranks = self.harness.base, self.harness.prefills

        def add(at: float, name: str, transfer: str, *words: Any) -> None:
            timers.append((at, lambda: self._say(name, transfer, *words)))
            self._due[transfer] = max(begin + at, self._due.get(transfer, 0.0))

        for number, each in enumerate(self.plan.transfers):
            transfer = f"s{self.plan.seed}.{self._nonce}.{number}"
            for name in prefills:
                add(each.offer_at, name, transfer, "offer", transfer, each.seed, each.tokens)
                for at, tokens in each.ready:
                    add(at, name, transfer, "ready", transfer, tokens)
                if each.withdraw_at is not None:
                    add(each.withdraw_at, name, transfer, "withdraw", transfer)
                add(each.finish_at, name, transfer, "finish", transfer)
            words = ("receive", transfer, each.seed, each.tokens, each.first_block, self.harness.host, port, ranks)
            add(each.receive_at, "decode0", transfer, *words)
            if each.cancel_at is not None:
                for name in prefills if each.cancel_side == "prefill" else ["decode0"]:
                    add(each.cancel_at, name, transfer, "cancel", transfer)
        for at, name, what in self.plan.signals:
            timers.append((at, lambda name=name, what=what: self._strike(name, what)))  # type: ignore[misc]
        return timers

    def _say(self, name: str, transfer: str, verb: str, *arguments: Any) -> None:
        worker = self.harness.workers[name]
        if name in self.died or not worker.tell(verb, *arguments):
            return
        if verb in ("offer", "receive"):
            self._owed[name, transfer] = self._began[name, transfer] = time.monotonic()
            self.harness.said[name, verb] += 1
        elif (name, transfer) in self._owed:
            self._owed[name, transfer] = time.monotonic()

    def _strike(self, name: str, what: str) -> None:
        if name == "network":
            assert self.harness.network is not None
            verb, *number = what.split()
            getattr(self.harness.network, verb)(*map(int, number))
            self.struck_at = self.struck_at or time.monotonic()
            self.healed_at = time.monotonic() if verb == "heal" else None
            return
        worker = self.harness.workers[name]
        if worker.pipe is None:
            return
        if what == "kill":
            self._dying.add(name)
            worker.signal(signal.SIGKILL)
        else:
            now = time.monotonic()
            self.struck_at = self.struck_at or now
            worker.signal(signal.SIGSTOP)
            self._continue.append((now + self.plan.stopped_s, worker))

    def _watch(self, now: float) -> None:
        """Workers that stopped go on in time."""
        for worker in self.harness.workers.values():
            known = any(worker is each for _, each in self._continue)
            if self.plan.stopped_s and not known and worker.pipe is not None and worker.stopped:
                self._continue.append((now + self.plan.stopped_s, worker))
                self.struck_at = self.struck_at or now
        for at, worker in list(self._continue):
            if now >= at or worker.pipe is None:
                self._continue.remove((at, worker))
                worker.signal(signal.SIGCONT)

    def _listen(self, timeout_s: float) -> None:
        pipes = {worker.pipe: name for name, worker in self.harness.workers.items() if worker.pipe is not None}
        for pipe in wait(list(pipes), timeout_s):
            name = pipes[pipe]  # type: ignore[index]
            worker = self.harness.workers[name]
            if not worker.read():
                self._on_death(name)
            for ended in worker.ended:
                self._on_end(name, ended)
            worker.ended.clear()
            self.result.problems += [f"{name} ended with {text}" for text in worker.broken]
            worker.broken.clear()

    def _on_death(self, name: str) -> None:
        self.died.add(name)
        self._dying.discard(name)
        self.struck_at = self.struck_at or time.monotonic()
        for key in [key for key in self._owed if key[0] == name]:
            del self._owed[key]

    def _on_end(self, name: str, ended: Ended) -> None:
        key = name, ended.transfer
        since = self._owed.pop(key, None)
        if ended.verdict:
            self.result.problems.append(f"{name}: {ended.transfer}: {ended.verdict}")
        if key in self._ended:
            self.result.problems.append(f"{name}: {ended.transfer} ended twice")
            return
        self._ended[key] = ended
        if ended.code == "no_pages":  # the rig's own
            self.harness.said[name, "receive" if name == "decode0" else "offer"] -= 1
        if since is None:
            if ended.transfer.split(".")[1] == self._nonce:
                self.result.problems.append(f"{name}: {ended.transfer} ended, which was not under way")
            return
        self.result.ended["ok" if ended.ok else ended.code] += 1
        if self.plan.drops_rest and not ended.ok and name == "decode0":
            for other in self.harness.workers:
                self._say(other, ended.transfer, "cancel", ended.transfer)
        if name == "decode0" and ended.ok and self.healed_at is not None and self.result.mended_s is None:
            self.result.mended_s = max(0.0, ended.at - self.healed_at)
        if name == "decode0":
            self.result.took_s.append(max(0.0, ended.at - max(since, 0.0)))

    def _survived(self, key: tuple[str, str], ended: Ended, died: float) -> None:
        """A survivor's transfer ended after the death."""
        if "deadlines.hold_s" in ended.reason:  # pages that nobody had asked for: no request waits for them
            self.result.held_s.append(ended.at - died)
            return
        if ended.code == "peer_lost":
            self.result.told_s.append(ended.at - max(died, self._began[key]))
        self.result.beyond_s.append(max(0.0, ended.at - self._due[key[1]]))

    def _sum_up(self) -> None:
        self.result.struck = self.struck_at is not None
        if self.struck_at is not None and self.died:
            for key, ended in self._ended.items():
                if key[0] not in self.died and ended.at > self.struck_at and key in self._began:
                    self._survived(key, ended, self.struck_at)
        if not self.plan.rules and not self.plan.signals and self.plan.column == "nothing":
            for (name, transfer), ended in self._ended.items():
                if not ended.ok and self.plan.row == "nothing" and self.plan.transfers[0].offer_at:
                    self.result.problems.append(f"{name}: {transfer} failed without a fault: {ended.reason}")
