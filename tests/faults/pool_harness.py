"""Runs plans, one after the other, on one pool and two clients, and judges each."""

from __future__ import annotations

import contextlib
import random
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from pdtransport.errors import PoolUnavailable
from pdtransport.pool.admin.pool_admin import PoolAdmin
from pdtransport.pool.client.pool_client import PoolClient
from tests.faults.harness import GROWTH_BYTES, Result
from tests.faults.plan import KILL, STOP
from tests.faults.pool_plan import AGAIN_S, CLIENTS, LARGE, SMALL, Call, PoolPlan, Strike
from tests.faults.pool_worker import ClientStart, ServiceStart, serve, use
from tests.faults.processes import Ended, Process, WorkerLost
from tests.processes.pool_rig import DAMAGES, Redis

DISK_BYTES = 32 << 20
DISK_SLACK = 8 << 20  # of its file system
FRAME_BYTES = 64 << 10
SLACK_S = 2.0  # beyond a call's deadline, on a busy machine
IDLE_S = 12.0  # until nothing is held any more
MENDED_S = 10.0
STATUS_S = 5.0
ASKED = 32  # descriptors and threads that Redis' client and the tiers' threads may take
EVIDENCE = {  # counters of the pool that grow when a fault took effect
    "disk": ("disk_write_failed", "disk_read_failed"),
    "redis": ("redis_went_down",),
    "memory": ("damaged_memory",),
}


class NoSuchFault(Exception):
    """This machine can't do that."""


class PoolHarness:
    """A pool of one kind, two clients, and a client of the driver's that only watches."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.dir = Path(f"/dev/shm/pdt-faults-{secrets.token_hex(4)}")
        self.own = Path(tempfile.mkdtemp(prefix="pdt-faults-"))
        settings: dict[str, Any] = {
            "dir": self.dir,
            "memory_bytes": LARGE if kind == "memory" else SMALL,
            "frame_bytes": FRAME_BYTES,
        }
        self.redis: Redis | None = None
        self.mounted = False
        if kind == "disk":
            disk = self.own / "disk"
            disk.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES + DISK_SLACK}", "tmpfs", str(disk)]
            self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
            settings["disk"] = {"path": disk / "chunks", "bytes": DISK_BYTES}
        elif kind == "redis":
            self.redis = Redis(self.own)
            settings["redis"] = {**self.redis.settings(timeout_s=0.3), "bytes": DISK_BYTES}
            settings["digest_key_file"] = self.redis.digest_key
        self.workers = {"pool": Process(ServiceStart(settings), serve)}
        for rank, name in enumerate(CLIENTS):
            self.workers[name] = Process(ClientStart(self.dir, rank), use)
        self.watcher = PoolClient(directory=self.dir, deadline_s=STATUS_S, who="watcher")
        self.rest: dict[str, dict[str, Any]] = {}
        self.counted: Counter[str] = Counter()  # by the pool that runs, when the last run ended

    def run(self, plan: PoolPlan) -> Result:
        """Never raises for what processes do: that stands in the result."""
        result = Result(plan)
        try:
            self.start()
            run = _Run(self, plan, result)
            run.go()
            self._mend(run)
            self._judge(run)
        except WorkerLost as lost:
            result.problems.append(f"lost: {lost}")
            self._end()
        return result

    def start(self) -> None:
        for name, worker in self.workers.items():
            if not worker.alive:
                worker.up()
                self.rest.pop(name, None)
                if name == "pool":
                    self.counted = Counter()

    def status(self) -> dict[str, Any]:
        """
        Raises:
            PoolUnavailable: it does not answer.
        """
        return self.watcher.status().result()

    def counters(self) -> Counter[str]:
        status = self.status()
        return Counter(status["counters"]) + Counter(status["service"])

    def _mend(self, run: _Run) -> None:
        """Afterwards: both clients store and load again, and nothing that must be there is lost."""
        result, plan, since = run.result, run.plan, time.monotonic()
        for name in CLIENTS:
            self.workers[name].tell("rules", [])
        until = since + MENDED_S
        ends: list[str] = []
        fresh = plan.seed * 64 + 56
        while time.monotonic() < until:
            self.start()  # what died at the very end
            fresh = plan.seed * 64 + 56 + (fresh + 1) % 8
            ends = [run.ask(name, verb, (fresh,)) for name in CLIENTS for verb in ("store", "load")]
            if all(end in ("WRITE", "HAVE", "READ") for end in ends):
                result.mended_s = time.monotonic() - (run.struck_at or since)
                break
            time.sleep(0.02)
        else:
            result.problems.append(f"no chunk was stored and loaded within {MENDED_S} s after the fault: {ends}")
        if plan.keeps and run.sure:
            numbers = tuple(sorted(run.sure))
            for name in CLIENTS:
                verdicts = run.ask(name, "load", numbers).split(",")
                lost = [number for number, verdict in zip(numbers, verdicts, strict=True) if verdict != "READ"]
                if lost:
                    result.problems.append(f"{name}: chunks {lost} were stored and are {verdicts}")

    # -- the oracle --------------------------------------------------------------------------------------------------

    def _judge(self, run: _Run) -> None:
        result = run.result
        until = time.monotonic() + IDLE_S
        with contextlib.suppress(PoolUnavailable):
            while pinned := self.status()["memory"]["hard_pinned_bytes"]:
                if time.monotonic() > until:
                    result.problems.append(f"the pool: {pinned} bytes are pinned long after their time")
                    break
                time.sleep(0.02)
        while True:
            held = self._held()  # in which the watcher connects, if it has to
            audits = {name: worker.audit() for name, worker in self.workers.items()}
            run.hear()
            leaks = held + [text for name, audit in audits.items() for text in self._grown(name, audit)]
            if not leaks or time.monotonic() > until:
                break
            time.sleep(0.02)
        result.problems += leaks
        for name, audit in audits.items():
            self.rest.setdefault(name, audit)
            result.problems += [f"{name}: {text}" for text in audit["complaints"]]
            for verb in ("store", "load") if name in CLIENTS else ():
                counts = {
                    k: n for k, n in audit["counters"].items() if k.startswith(f"{verb}_") and k != f"{verb}_bytes"
                }
                asked = audit["asked"].get(verb, 0)
                if sum(counts.values()) != asked:
                    result.problems.append(f"{name}: {asked} chunks to {verb}, but {counts} are counted")
        with contextlib.suppress(PoolUnavailable):
            counted = self.counters()
            grown = counted - self.counted
            self.counted = counted
            for whom in {strike.whom for strike in run.plan.strikes}:
                result.injected.update({name: grown[name] for name in EVIDENCE.get(whom, ()) if grown[name]})
            dead = len(run.died & set(CLIENTS))
            if "pool" not in run.died and grown["clients_died"] != dead:
                result.problems.append(f"{dead} clients died, the pool counted {grown['clients_died']}")
        if leaks or any(audit["complaints"] for audit in audits.values()):
            self._end()

    def _held(self) -> list[str]:
        """What the pool still holds once all is dropped."""
        try:
            PoolAdmin(self.watcher).clear()
            status = self.status()
        except PoolUnavailable as error:
            return [f"the pool does not answer: {error}"]
        found = [f"{each['name']} holds {each}" for each in status["clients"] if each["requests"] or each["held_bytes"]]
        if len(status["clients"]) != len(CLIENTS) + 1:
            found.append(f"{len(status['clients'])} clients")
        memory = status["memory"]
        facts = {
            "bytes in use": memory["used_bytes"],
            "pinned bytes": memory["hard_pinned_bytes"],
            "chunks": status["chunks"],
            "chunks being filled": status["being_filled"],
            "bytes to be written back": status["writeback_bytes"],
            **{f"bytes in {name}": tier["used_bytes"] for name, tier in status["tiers"].items()},
        }
        found += [f"the pool: {count} {what}" for what, count in facts.items() if count]
        found += [f"the pool: {name} is down" for name, tier in status["tiers"].items() if not tier["up"]]
        memories = list(self.dir.glob("*.memory"))
        if len(memories) != 1:
            found.append(f"{len(memories)} memories in {self.dir}")
        files = self.files() + list((self.own / "disk" / "chunks").glob("new-*"))
        if files:
            found.append(f"{len(files)} files are left on disk: {files[0].name}")
        return found

    def _grown(self, name: str, audit: dict[str, Any]) -> list[str]:
        rest = self.rest.get(name)
        if rest is None:
            return []
        spare = ASKED if name == "pool" and self.kind != "memory" else 0
        found = []
        if audit["threads"] > rest["threads"] + spare:
            found.append(f"{name}: {audit['threads']} threads, {rest['threads']} before")
        if audit["descriptors"] > rest["descriptors"] + spare:
            more = dict(Counter(audit["open"]) - Counter(rest["open"]))
            found.append(f"{name}: {audit['descriptors']} descriptors, {rest['descriptors']} before: {more}")
        if audit["resident"] > rest["resident"] + GROWTH_BYTES:
            found.append(f"{name}: resident memory grew from {rest['resident']} to {audit['resident']} bytes")
        return found

    # -- faults ------------------------------------------------------------------------------------------------------

    def files(self) -> list[Path]:
        """The chunks' files."""
        return sorted((self.own / "disk" / "chunks").glob("t-*/*/*.*"))

    def damage(self, chance: random.Random) -> None:
        """Something befalls half of the files."""
        files = self.files()
        for path in chance.sample(files, len(files) // 2):
            with contextlib.suppress(OSError):  # it was evicted meanwhile
                chance.choice(DAMAGES)(path, chance.choice(files))

    def fill(self) -> None:
        """
        Raises:
            NoSuchFault: the disk tier has no file system of its own.
        """
        if not self.mounted:
            raise NoSuchFault("may not mount a file system")
        with contextlib.suppress(OSError), (self.own / "disk" / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1 << 20))

    def empty(self) -> None:
        (self.own / "disk" / "filler").unlink(missing_ok=True)
        for path in (self.own / "disk" / "chunks").glob("t-*/*/*.*"):
            if path.is_dir():  # what `unreadable` made of a file
                path.rmdir()

    def flip(self) -> None:
        """A bit of each frame, as far as it holds anything."""
        for path in self.dir.glob("*.memory"):
            with path.open("r+b") as memory:
                for at in range(0, path.stat().st_size, FRAME_BYTES):
                    memory.seek(at + 64)
                    byte = memory.read(1)
                    memory.seek(at + 64)
                    memory.write(bytes([byte[0] ^ 16]))

    def _end(self) -> list[str]:
        self.rest.clear()
        return [problem for problem in [worker.close() for worker in self.workers.values()] if problem]

    def close(self) -> list[str]:
        """End all; what went wrong with that."""
        self.watcher.close()
        clients = [worker.close() for name, worker in self.workers.items() if name in CLIENTS]
        problems = [problem for problem in [*clients, *self._end()] if problem]
        if self.redis is not None:
            self.redis.kill()
        if self.mounted:
            subprocess.run(["umount", str(self.own / "disk")], check=True)
        left = [path.name for path in self.dir.glob("*") if path.suffix != ".lock"]
        if left and not problems:
            problems.append(f"{left} are left in the pool's directory")
        shutil.rmtree(self.dir, ignore_errors=True)
        shutil.rmtree(self.own, ignore_errors=True)
        return problems


class _Run:
    """One plan under way."""

    def __init__(self, harness: PoolHarness, plan: PoolPlan, result: Result) -> None:
        self.harness, self.plan, self.result = harness, plan, result
        self.chance = random.Random(plan.seed + 1)
        self.died: set[str] = set()
        self.struck_at: float | None = None
        self.sure: set[int] = set()  # chunks that were reported stored
        self._calls: dict[str, Call] = {}
        self._owed: dict[str, tuple[Call, float]] = {}  # name of a call -> when it was made
        self._answers: dict[str, Ended] = {}
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._stopped: set[str] = set()
        self._last: dict[str, str] = {}  # by client: its last call
        self._nonce = secrets.token_hex(4)

    def go(self) -> None:
        """Play the plan to its end, or to the deadlines of all calls."""
        begin = time.monotonic()
        for name, rules in self.plan.copies.items():
            self.harness.workers[name].tell("rules", rules)
        for number, call in enumerate(self.plan.calls):
            self._at(begin + call.at, lambda number=number, call=call: self._make(f"{number}", call))  # type: ignore[misc]
        for strike in self.plan.strikes:
            if strike.at is not None:
                self._at(begin + strike.at, lambda strike=strike: self._strike(strike))  # type: ignore[misc]
        last = max(call.at + call.seconds for call in self.plan.calls)
        until = begin + last + self.plan.stopped_s + SLACK_S
        while (self._timers or self._owed) and (now := time.monotonic()) < until:
            while self._timers and self._timers[0][0] <= now:
                self._timers.pop(0)[1]()
            self._watch()
            pause = min(0.02, max(0.0, self._timers[0][0] - now)) if self._timers else 0.02
            self.hear(pause)
        for name, (call, _) in self._owed.items():
            self.result.problems.append(f"{call.client}: {call.verb} {name} has not ended by its deadline")
        self._owed.clear()
        while self._timers:
            self._timers.pop(0)[1]()
        self.result.struck = self.struck_at is not None

    def ask(self, client: str, verb: str, numbers: Sequence[int]) -> str:
        """Call and wait: the verdicts."""
        name = f"{verb}-{secrets.token_hex(4)}"
        call = Call(0.0, client, verb, tuple(numbers), 3.0)
        self._make(name, call)
        until = time.monotonic() + call.seconds + SLACK_S
        while name in self._owed and time.monotonic() < until:
            self.hear(0.02)
        if name in self._owed:
            self.result.problems.append(f"{client}: {verb} has not ended by its deadline")
            del self._owed[name]
            return "never"
        return self._answers[name].code if name in self._answers else "dead"

    def _at(self, when: float, what: Callable[[], None]) -> None:
        self._timers.append((when, what))
        self._timers.sort(key=lambda item: item[0])

    def _make(self, name: str, call: Call) -> None:
        worker = self.harness.workers[call.client]
        if call.verb == "cancel":
            worker.tell("cancel", self._last.get(call.client, ""))
            return
        name = self._last[call.client] = name if "-" in name else f"{self._nonce}.{name}"
        words = ("pin", name, call.numbers) if call.verb == "pin" else ("ask", name, call.verb, call.numbers)
        if worker.tell(*words, call.seconds):
            self._calls[name] = call
            self._owed[name] = (call, time.monotonic())

    # -- faults ------------------------------------------------------------------------------------------------------

    def _strike(self, strike: Strike) -> None:
        harness, what = self.harness, strike.what
        self.struck_at = self.struck_at or time.monotonic()
        later = time.monotonic() + self.plan.stopped_s
        if strike.whom in harness.workers:
            worker = harness.workers[strike.whom]
            worker.signal(signal.SIGKILL if what == KILL else signal.SIGSTOP)
            if what == STOP:
                self._stopped.add(strike.whom)
                self._at(later, lambda: worker.signal(signal.SIGCONT))
        elif strike.whom == "redis":
            assert harness.redis is not None
            if what == KILL:
                harness.redis.kill()
                self._at(time.monotonic() + AGAIN_S, harness.redis.start)
            else:
                process = harness.redis.process
                process.send_signal(signal.SIGSTOP)
                self._at(later, lambda: process.send_signal(signal.SIGCONT))
        elif strike.whom == "memory":
            harness.flip()
        elif what == "full":
            with contextlib.suppress(NoSuchFault):
                harness.fill()
            self._at(time.monotonic() + 0.8, harness.empty)
        else:
            harness.damage(self.chance)
            self._at(time.monotonic() + 1.0, harness.empty)

    def _watch(self) -> None:
        """Clients that stopped themselves go on in time; what died is started again."""
        for name, worker in self.harness.workers.items():
            if name not in self._stopped and worker.pipe is not None and worker.stopped:
                self._stopped.add(name)
                self.struck_at = self.struck_at or time.monotonic()
                self._at(time.monotonic() + self.plan.stopped_s, lambda worker=worker: worker.signal(signal.SIGCONT))  # type: ignore[misc]

    def hear(self, timeout_s: float = 0.0) -> None:
        """Take what processes said."""
        workers = self.harness.workers
        pipes = {worker.pipe: name for name, worker in workers.items() if worker.pipe is not None}
        for pipe in wait(list(pipes), timeout_s):
            name = pipes[pipe]  # type: ignore[index]
            if not workers[name].read():
                self._on_death(name)
        for name, worker in workers.items():
            ended, worker.ended = worker.ended, []
            for each in ended:
                self._on_end(name, each)
            said, worker.said = worker.said, []
            for _ in said:  # a client halted in the middle of a copy
                for strike in [strike for strike in self.plan.strikes if strike.at is None]:
                    self._strike(strike)
                worker.tell("go")

    def _on_death(self, name: str) -> None:
        self.died.add(name)
        self.struck_at = self.struck_at or time.monotonic()
        for key_ in [key_ for key_, (call, _) in self._owed.items() if call.client == name]:
            del self._owed[key_]
        self._at(time.monotonic() + AGAIN_S, self.harness.start)

    def _on_end(self, name: str, ended: Ended) -> None:
        call = self._calls.get(ended.transfer)
        if call is None or ended.transfer in self._answers:
            self.result.problems.append(f"{name}: {ended.transfer} ended twice, or was not under way")
            return
        self._answers[ended.transfer] = ended
        if ended.verdict:
            self.result.problems.append(f"{name}: {ended.verdict}")
        _, since = self._owed.pop(ended.transfer, (call, ended.at))
        if not ended.transfer.startswith(self._nonce):
            return  # the driver's own
        verdicts = ended.code.split(",")
        self.result.ended.update(verdicts)
        self.result.took_s.append(ended.at - since)
        if call.verb == "store":
            stored = zip(call.numbers, verdicts, strict=True)
            self.sure.update(number for number, verdict in stored if verdict in ("WRITE", "HAVE"))
        late = ended.at - since - call.seconds - SLACK_S - (self.plan.stopped_s if name in self._stopped else 0.0)
        if late > 0:
            self.result.problems.append(f"{name}: {call.verb} {ended.transfer} ended {late:.1f} s too late")
