"""Requests that arrive on their own (open loop, Poisson): first tokens, gaps between tokens, and exposed transfers.

    python -m benchmarks.load --gpu [--graphs] [--cards 0,1] [--rates 4,7] [--lens 1024,8192] [--tokens 128]
        [--systems aggregated,router,router-first-token,nixl-push] [--window 30] [--rounds 2] [--json FILE]

The model of ``benchmarks.handoff --gpu``. In each window requests arrive at ``--rates`` a second for ``--window``
seconds, prompts of a length drawn between the two of ``--lens``, ``--tokens`` output tokens, streamed; a window ends
when all are answered. Systems take turns within a round, with the same arrivals and lengths, each with prompts that no
server has seen. All servers live at once.

aggregated           plain servers, ``--replicas`` of them, in turns (default 1; one a card with ``--cards``)
router               prefill and decode behind ``pdrouter --first-token off``
router-first-token   the same two servers behind ``pdrouter --first-token auto``
nixl-push            vLLM's NixlPushConnector, both halves dispatched at once

Columns, milliseconds: *TTFT*, from sending to the first event; *2nd*, from the first event to the second; *ITL*,
between later events; each p50, p99, and the longest where it is *max*; *exposed*: from the end of prefill to the last
verified page, as ``pdrouter``'s traces tell it; *good*: share of requests with TTFT within ``--ttft-ms`` and a mean gap
within ``--itl-ms``; *from prefill*: requests whose first token was prefill's. All rounds' requests count together. With
``--json``, each sample has its router's trace, and the slowest of a window what the workers noted of them.
``--rehearse`` runs on CPU cores with a small model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._figures import FAILED, keep, measuring, say
from benchmarks._gpu_handoff import FAILURES, brief
from benchmarks._gpu_scale import FULL, GIB, REHEARSAL, Mode, Scale
from benchmarks._handoff_report import markdown
from benchmarks._needs import CUPY, LACKING, NIXL, VLLM, Need, cores, gpus, package, tell_lacking
from benchmarks.handoff import cards, machine, names, where
from tests.rig import watch
from tests.rig.client import Answer, Client, hand_off
from tests.rig.device import all_cards, card, seated
from tests.rig.router import RunningRouter, routed
from tests.rig.servers import Server, ServerFailed, ServerSpec, fleet

SYSTEMS = ("aggregated", "router", "router-first-token", "nixl-push")
ROUTED = {"router": "off", "router-first-token": "auto"}
LOADED = {"kv_bytes": 24 * GIB, "max_num_seqs": 64}  # of FULL: 196,608 tokens
REQUEST_S = 120.0
SLOWEST = 5  # of a window, whose workers are asked
DRAIN_S = 60.0  # what a window may take beyond its arrivals

Ask = Callable[[Client, list[int]], Awaitable[Answer]]


@dataclass
class Sample:
    """One request; seconds. ``gaps_s``: between one event and the next, the first in front of the second token.
    ``trace``: what the router tells of it; ``workers``: their records, of the slowest of a window."""

    system: str
    rate: float
    round: int
    length: int
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    exposed_s: float | None = None
    first_token_from: str = ""
    failed: str = ""
    trace: dict[str, Any] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def second_s(self) -> float:
        """From the first token to the second."""
        return self.gaps_s[0] if self.gaps_s else 0.0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=str(__doc__).splitlines()[0])
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--gpu", action="store_true", help="on one GPU, or two with --cards")
    place.add_argument("--rehearse", action="store_true", help="with a small model on CPU cores")
    parser.add_argument("--cards", type=cards, default=(), help="GPUs of prefill and of decode, such as 0,1")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs (default: eager)")
    parser.add_argument("--systems", type=names, default=list(SYSTEMS[:3]), help="by comma: " + ", ".join(SYSTEMS))
    parser.add_argument("--replicas", type=int, help="aggregated servers (default: one a card)")
    parser.add_argument("--rates", type=_numbers, help="requests a second, by comma (4,7; --rehearse: 1)")
    parser.add_argument("--lens", type=_numbers, help="shortest and longest prompt (1024,8192; --rehearse: 64,512)")
    parser.add_argument("--tokens", type=int, help="output tokens (128; --rehearse: 16)")
    parser.add_argument("--window", type=float, default=30.0, help="seconds of arrivals (default 30)")
    parser.add_argument("--rounds", type=int, default=2, help="windows of each system and rate (default 2)")
    parser.add_argument("--ttft-ms", type=float, default=1000.0, help="target of the column good (default 1000)")
    parser.add_argument("--itl-ms", type=float, default=30.0, help="target of the column good (default 30)")
    parser.add_argument("--seconds", type=float, default=580.0, help="bound of the whole run (default 580)")
    parser.add_argument("--settings", type=json.loads, default={}, help="pdtransport's settings, as JSON")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.rates = options.rates or ([4.0, 7.0] if options.gpu else [1.0])
    options.lens = [int(n) for n in options.lens or ((1024, 8192) if options.gpu else (64, 512))]
    options.tokens = options.tokens or (128 if options.gpu else 16)
    options.replicas = options.replicas or len(options.cards) or 1
    unknown = sorted(set(options.systems) - set(SYSTEMS))
    if unknown:
        parser.error(f"--systems: unknown {', '.join(unknown)}; known are {', '.join(SYSTEMS)}")
    longest = (FULL if options.gpu else REHEARSAL).max_len - options.tokens
    if len(options.lens) != 2 or not 1 < options.lens[0] <= options.lens[1] <= longest:
        parser.error(f"--lens: the shortest and the longest prompt, within 2..{longest}, such as 64,512")
    if min(options.rates) <= 0 or min(options.replicas, options.rounds) < 1 or options.tokens < 3:
        parser.error("--rates are above 0, --replicas and --rounds at least 1, --tokens at least 3")
    if (options.graphs or options.cards) and not options.gpu:
        parser.error("--graphs and --cards: only with --gpu")
    return options


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError("numbers separated by commas, such as 4,7") from None


def needs_of(options: argparse.Namespace) -> list[Need]:
    needs = [package("vllm", VLLM)]
    if "nixl-push" in options.systems:
        needs.append(package("nixl", NIXL))
    if options.rehearse:
        return [*needs, cores(2)]
    return [*needs, package("cupy", CUPY), gpus(max(options.cards, default=0) + 1)]


def specs_of(options: argparse.Namespace, scale: Scale, model: Path) -> dict[str, list[ServerSpec]]:
    """Servers by what they are: ``aggregated``, ``pdtransport`` (both routers'), ``nixl-push``."""
    mode: Mode = "graphs" if options.graphs else "eager"
    found: dict[str, list[ServerSpec]] = {}
    if "aggregated" in options.systems:
        found["aggregated"] = [
            scale.spec(f"aggregated-{n}", model, mode, cores=str(n % 2), cards=seated(options.cards, n % 2))
            for n in range(options.replicas)
        ]
    if set(ROUTED) & set(options.systems):
        found["pdtransport"] = list(scale.pair("pdtransport", model, mode, options.settings, options.cards))
    if "nixl-push" in options.systems:
        found["nixl-push"] = list(scale.pair("nixl-push", model, mode, None, options.cards))
    return found


class System:
    """One row: how it is asked, and what its router and its workers say afterwards."""

    def __init__(
        self, name: str, ask: Ask, router: RunningRouter | None = None, servers: Sequence[Server] = ()
    ) -> None:
        self.name, self.ask, self._router, self._servers = name, ask, router, servers

    async def explain(self, samples: Sequence[Sample]) -> None:
        """Add to ``samples``, whose traces name their transfers, the rest of what is known of them."""
        if self._router is None:
            return
        told = await asyncio.to_thread(self._router.get_json, f"/pd/traces?limit={len(samples)}")
        traces = {one["transfer_id"]: one for one in told["traces"]}
        for sample in samples:
            sample.trace = traces.get(sample.trace.get("transfer_id"), sample.trace)
            sample.exposed_s = sample.trace.get("exposed_s")
        for sample in sorted(samples, key=lambda sample: sample.second_s)[-SLOWEST:]:
            for server in self._servers:
                sample.workers += [
                    record
                    for reply in await watch.status(server, sample.trace.get("transfer_id", ""))
                    for record in reply["transfers"]
                ]


def systems_of(
    options: argparse.Namespace, servers: dict[str, list[Server]], logs: Path, stack: ExitStack
) -> list[System]:
    more = {"stream": True, "return_token_ids": False}
    found = []
    for name in options.systems:
        if name in ROUTED:
            prefill, decode = servers["pdtransport"]
            router = stack.enter_context(routed([prefill], [decode], logs, "concurrent", "--first-token", ROUTED[name]))
            found.append(
                System(name, partial(_complete, [router.url], options.tokens, more), router, servers["pdtransport"])
            )
        elif name == "nixl-push":
            found.append(System(name, partial(_pushed, servers[name], options.tokens)))
        else:
            found.append(System(name, partial(_complete, list(servers[name]), options.tokens, more)))
    return found


async def _complete(
    to: list[Server | str], tokens: int, more: dict[str, Any], client: Client, prompt: list[int]
) -> Answer:
    to.append(to.pop(0))
    return await client.complete(to[-1], prompt, tokens, **more, ignore_eos=True)


async def _pushed(pair: Sequence[Server], tokens: int, client: Client, prompt: list[int]) -> Answer:
    prefill, decode = pair
    handed = await hand_off(client, prefill, decode, prompt, tokens, stream=True, echo=False, ignore_eos=True)
    return replace(handed.decode, sent=min(handed.decode.sent, handed.prefill.sent if handed.prefill else float("inf")))


class Window:
    """Arrivals of one round: the same for all systems."""

    def __init__(self, options: argparse.Namespace, scale: Scale, rate: float, number: int) -> None:
        self._scale, self.rate, self._number = scale, rate, number
        dice = random.Random(f"{options.seed} {rate} {number}")
        self._arrivals: list[tuple[float, int]] = []
        at = dice.expovariate(rate)
        while at < options.window:
            self._arrivals.append((at, dice.randint(*options.lens)))
            at += dice.expovariate(rate)

    async def run(self, client: Client, system: System) -> list[Sample]:
        dice = random.Random(f"{system.name} {self._number} {time.time_ns()}")
        prompts = [self._scale.prompt(length, dice) for _, length in self._arrivals]
        began = time.monotonic()

        async def one(at: float, prompt: list[int]) -> Sample:
            sample = Sample(system.name, self.rate, self._number, len(prompt))
            await asyncio.sleep(at - (time.monotonic() - began))
            try:
                answer = await system.ask(client, prompt)
            except FAILURES as error:
                sample.failed = f"{type(error).__name__}: {error}"[:300]
                return sample
            sample.ttft_s = answer.ttft_s
            sample.gaps_s = [later - earlier for earlier, later in pairwise(answer.arrivals)]
            sample.first_token_from = answer.headers.get("x-pd-first-token", "")
            sample.trace["transfer_id"] = answer.headers.get("x-pd-transfer-id", "")
            return sample

        jobs = (one(at, prompt) for (at, _), prompt in zip(self._arrivals, prompts, strict=True))
        samples = await asyncio.gather(*jobs)
        await system.explain(samples)
        return samples


async def measure(
    options: argparse.Namespace, scale: Scale, systems: Sequence[System], ends: float, samples: list[Sample]
) -> None:
    """Adds to ``samples``, window by window, as long as another one fits before ``ends`` (``time.monotonic``)."""
    dice = random.Random(f"{options.seed} {time.time_ns()}")
    async with Client(REQUEST_S) as client:
        for system in systems:  # sets up connections, compiles kernels
            for length in (options.lens[0], options.lens[1], options.lens[0]):
                await system.ask(client, scale.prompt(length, dice))
        for number in range(options.rounds):
            for rate in options.rates:
                window = Window(options, scale, rate, number)
                for system in systems if number % 2 == 0 else reversed(systems):
                    if time.monotonic() + options.window > ends:
                        say("no time left for further windows")
                        return
                    async with asyncio.timeout(options.window + DRAIN_S):
                        fresh = await window.run(client, system)
                    failed = [sample.failed for sample in fresh if sample.failed]
                    say(f"round {number + 1}, {rate:g}/s, {system.name}: {len(fresh)} requests, {len(failed)} failed")
                    if failed:
                        say(f"  {failed[0]}")
                    samples += fresh


def summarise(samples: Sequence[Sample], ttft_ms: float, itl_ms: float) -> list[dict[str, Any]]:
    """A row for each rate and system; milliseconds."""
    rows = []
    for rate, system in dict.fromkeys((sample.rate, sample.system) for sample in samples):
        chosen = [sample for sample in samples if (sample.rate, sample.system) == (rate, system)]
        well = [sample for sample in chosen if not sample.failed and sample.ttft_s is not None]
        good = [
            sample
            for sample in well
            if 1e3 * (sample.ttft_s or 0) <= ttft_ms and 1e3 * float(np.mean(sample.gaps_s or [0])) <= itl_ms
        ]
        second = [sample.second_s for sample in well if sample.gaps_s]
        later = [gap for sample in well for gap in sample.gaps_s[1:]]
        exposed = [sample.exposed_s for sample in well if sample.exposed_s is not None]
        rows.append(
            {
                "rate": rate,
                "system": system,
                "requests": len(chosen),
                "failed": len(chosen) - len(well),
                **_percentiles("TTFT", [sample.ttft_s or 0.0 for sample in well]),
                **_percentiles("2nd", second, longest=True),
                **_percentiles("ITL", later, longest=True),
                **_percentiles("exposed", exposed),
                "good": len(good) / len(chosen),
                "from prefill": sum(sample.first_token_from == "prefill" for sample in well),
            }
        )
    return rows


def _percentiles(name: str, seconds: Sequence[float], longest: bool = False) -> dict[str, float | None]:
    p50, p99, most = np.percentile(seconds, [50, 99, 100]) * 1e3 if len(seconds) else (None, None, None)
    found = {f"{name} p50": p50, f"{name} p99": p99}
    return {**found, f"{name} max": most} if longest else found


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]

    def text(value: Any) -> str:
        if isinstance(value, str) or value is None:
            return value or ""
        return f"{value:g}" if value == int(value) else f"{value:.2f}" if value < 100 else f"{value:.0f}"

    return markdown(columns, [[text(row[name]) for name in columns] for row in rows])


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    if tell_lacking("benchmarks.load", needs_of(options)):
        return LACKING
    ends = time.monotonic() + options.seconds
    scale = replace(FULL, **LOADED) if options.gpu else REHEARSAL
    logs = options.logs or Path(tempfile.mkdtemp(prefix="pdtransport-load-"))
    logs.mkdir(parents=True, exist_ok=True)
    before = {**machine(), "card": card(), "cards": all_cards()}
    samples: list[Sample] = []
    with (
        measuring() as ending,
        tempfile.TemporaryDirectory(prefix="pdtransport-model-") as folder,
        ExitStack() as stack,
    ):
        specs = specs_of(options, scale, scale.write_model(Path(folder)))
        try:
            all_specs = [spec for group in specs.values() for spec in group]
            rest = list(
                stack.enter_context(fleet(*all_specs, logs=logs, timeout_s=min(scale.start_s, options.seconds)))
            )
            servers = {name: [rest.pop(0) for _ in group] for name, group in specs.items()}
            systems = systems_of(options, servers, logs, stack)
            say(f"{', '.join(spec.name for spec in all_specs)} are up")
            asyncio.run(measure(options, scale, systems, ends, samples))
        except ServerFailed as error:
            say(brief(error))
            ending.status = FAILED
    if not samples:
        return ending.status or FAILED
    rows = summarise(samples, options.ttft_ms, options.itl_ms)
    print(where(options.cards))
    print(table(rows))
    asked = {key: value for key, value in vars(options).items() if key not in ("json", "logs")}
    shown = {"machine": before, "asked": asked, "rows": rows, "samples": [asdict(sample) for sample in samples]}
    keep(options.json, json.dumps(shown) + "\n")
    return ending.status


if __name__ == "__main__":
    sys.exit(main())
