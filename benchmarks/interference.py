"""What arriving pushes cost the requests that decode is working on, and what pushing costs prefill.

    python -m benchmarks.interference --gpu [--graphs] [--length 4096] [--rounds 4] [--window 6] [--json FILE]

A prefill and a decode server of the model of ``benchmarks.handoff --gpu`` run side by side. Decode answers
``--streams`` requests without pause. Windows of ``--window`` seconds take turns between three loads, ABC CBA:

computing   prefill computes prompts of ``--length`` tokens, ``--at-a-time`` of them, and keeps what it computed
joining     the same, and for each decode answers one token to a prompt as long that lies in its own prefix cache
pushing     the same, and each prompt is handed over to decode, which answers one token

Columns: *prefill tok/s*: prompt tokens a second, from the first prefill that ended in a window to the last; *ITL p50*,
*p99*: milliseconds between two tokens of decode's streams. Beside them a row of windows without any load (*quiet*), and
the ratios of pushing to the other two. On one GPU prefill itself slows decode in all loads, and any engine takes time
to admit a long prompt, wherever its KV comes from: *pushing / joining* is what pushes cost decode, *pushing /
computing* what they cost together with the requests that they belong to.
``--cards 0,1`` puts prefill on the first GPU and decode on the second: then decode only feels what arrives, and prefill
what is read from its memory. ``--rehearse`` runs on CPU cores with a small model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks._decode_streams import Gap, Streams, within
from benchmarks._figures import FAILED, keep, measuring, say
from benchmarks._gpu_handoff import brief
from benchmarks._gpu_scale import FULL, REHEARSAL, Mode, Scale
from benchmarks._handoff_report import markdown
from benchmarks._needs import CUPY, LACKING, VLLM, Need, cores, gpus, package, tell_lacking
from benchmarks.handoff import cards, machine, where
from tests.rig.client import Answer, Client, Prepared, RequestFailed, new_transfer, prepare, to_decode, to_prefill
from tests.rig.device import all_cards, card
from tests.rig.servers import Server, ServerFailed, fleet

LOADS = ("computing", "joining", "pushing")
PLAIN = {"return_token_ids": False}  # else decode's server spends milliseconds on the echo of each long prompt
STREAM_PROMPT = 32
STREAM_TOKENS = 4096  # then a stream begins anew
SETTLE_S = 1.0  # of each window, before it counts
MAX_BEHIND = 4  # decode's halves that may be unfinished when prefill gets its next prompt
FAILURES = (RequestFailed, aiohttp.ClientError, asyncio.TimeoutError)
REQUEST_S = 60.0
BOUND = 1.03  # the worst ratio that is wanted, either way


@dataclass
class Window:
    """``done``: when prefill finished prompts of ``length`` tokens, within ``begin .. end`` (``time.time`` seconds)."""

    load: str
    begin: float
    end: float
    length: int = 0
    done: list[float] = field(default_factory=list)
    failed: int = 0
    gaps_s: list[float] = field(default_factory=list)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interference", description=str(__doc__).splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpu", action="store_true", help="on one GPU")
    where.add_argument("--rehearse", action="store_true", help="with a small model on CPU cores")
    parser.add_argument("--cards", type=cards, default=(), help="GPUs of prefill and of decode, such as 0,1")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs (default: eager)")
    parser.add_argument("--length", type=int, help="prompt tokens (4096; --rehearse: 512)")
    parser.add_argument("--streams", type=int, default=4, help="requests that decode works on (default 4)")
    parser.add_argument("--at-a-time", type=int, default=2, help="prompts under way on prefill (default 2)")
    parser.add_argument("--window", type=float, default=6.0, help="seconds of a window (default 6)")
    parser.add_argument("--rounds", type=int, default=4, help="windows of each load (default 4)")
    parser.add_argument("--seconds", type=float, default=200.0, help="bound of the whole run (default 200)")
    parser.add_argument("--settings", type=json.loads, default={}, help="pdtransport's settings, as JSON")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    scale = FULL if options.gpu else REHEARSAL
    options.length = options.length or (4096 if options.gpu else 512)
    if not 1 < options.length < scale.max_len - 1:
        parser.error(f"--length: 2..{scale.max_len - 2}")
    if min(options.streams, options.at_a_time, options.rounds) < 1 or options.window <= SETTLE_S:
        parser.error(f"--streams, --at-a-time and --rounds are at least 1, --window more than {SETTLE_S} s")
    if options.streams + options.at_a_time > scale.max_num_seqs:
        parser.error(f"--streams and --at-a-time: the servers take {scale.max_num_seqs} requests at a time")
    if (options.graphs or options.cards) and not options.gpu:
        parser.error("--graphs and --cards: only with --gpu")
    return options


def schedule(rounds: int) -> list[str]:
    """Quiet, then the loads in the order ABC CBA ..., so that a drift falls on all, then quiet."""
    loads: list[str] = []
    for index in range(rounds):
        loads += LOADS if index % 2 == 0 else reversed(LOADS)
    return ["quiet", *loads, "quiet"]


class Load:
    """Prompts that prefill works on, ``at_a_time`` of them, until told to stop."""

    def __init__(self, client: Client, servers: Sequence[Server], scale: Scale, options: argparse.Namespace) -> None:
        self._client, self._servers, self._scale, self._options = client, servers, scale, options
        self._dice = random.Random(f"{options.seed} {time.time_ns()}")
        whole = options.length // scale.block_size * scale.block_size  # all but the last token can be found
        self._cached = scale.prompt(min(whole + 1, scale.max_len - 2), self._dice)
        self._decoding: set[asyncio.Task[Answer]] = set()  # decode's halves, which nobody has waited for yet

    async def one(self, load: str) -> float:
        """Send one prompt; when prefill had answered (``time.time``). Decode's half may go on: waiting for it would
        give prefill less to do than it has without pushing."""
        prefill, decode = self._servers
        prompt = self._scale.prompt(self._options.length, self._dice)
        if load == "computing":
            return (await self._client.complete(prefill, prompt, 1, **PLAIN)).done
        if load == "joining":
            return await self._both(prepare(decode, self._cached, 1, **PLAIN), prepare(prefill, prompt, 1, **PLAIN))
        transfer = new_transfer()
        return await self._both(
            prepare(decode, prompt, 1, to_decode(prefill, transfer), **PLAIN),
            prepare(prefill, prompt, 1, to_prefill(prefill, transfer), **PLAIN),
        )

    async def _both(self, to_decode: Prepared, to_prefill: Prepared) -> float:
        decoding, prefilling = (asyncio.create_task(self._client.send(half)) for half in (to_decode, to_prefill))
        self._decoding.add(decoding)
        answer = await prefilling
        if len(self._decoding) > MAX_BEHIND:
            await self.settle()
        return answer.done

    async def settle(self) -> None:
        """Wait for decode's halves.

        Raises:
            RequestFailed, aiohttp.ClientError, asyncio.TimeoutError: of the first that failed.
        """
        waiting, self._decoding = self._decoding, set()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def window(self, load: str) -> Window:
        begin = time.time() + SETTLE_S
        window = Window(load, begin, begin + self._options.window - SETTLE_S, self._options.length)
        if load == "quiet":
            await asyncio.sleep(window.end - time.time())
            return window
        if load == "joining":
            await self._client.complete(self._servers[1], self._cached, 1, **PLAIN)  # other loads may have evicted it
        await asyncio.gather(*(self._worker(load, window) for _ in range(self._options.at_a_time)))
        try:
            await self.settle()
        except FAILURES as error:
            window.failed += 1
            say(f"{load}: decode's half of a request failed: {error}")
        return window

    async def _worker(self, load: str, window: Window) -> None:
        while time.time() < window.end:
            try:
                done = await self.one(load)
            except FAILURES as error:
                window.failed += 1
                if window.failed == 1:
                    say(f"{load}: a request failed: {error}")
                await asyncio.sleep(0.1)
                continue
            if window.begin <= done <= window.end:
                window.done.append(done)


def needs_of(options: argparse.Namespace) -> list[Need]:
    if options.rehearse:
        return [package("vllm", VLLM), cores(2)]
    return [package("vllm", VLLM), package("cupy", CUPY), gpus(max(options.cards, default=0) + 1)]


async def measure(
    options: argparse.Namespace, scale: Scale, servers: Sequence[Server], ends: float, windows: list[Window]
) -> None:
    """Adds to ``windows`` one after another; their gaps are there at the end, however that comes."""
    async with Client(REQUEST_S) as client:
        load = Load(client, servers, scale, options)
        for kind in LOADS:  # sets up the connection, compiles kernels
            for _ in range(2):
                await load.one(kind)
                await load.settle()
        tokens = min(STREAM_TOKENS, scale.max_len - STREAM_PROMPT - 1)
        streams = Streams(servers[1].url, options.streams, STREAM_PROMPT, tokens, scale.vocabulary)
        try:
            await asyncio.sleep(2 * SETTLE_S)
            for kind in schedule(options.rounds):
                if time.monotonic() + options.window > ends:
                    say("no time left for further windows")
                    break
                windows.append(await load.window(kind))
        finally:
            gaps, failed = await asyncio.to_thread(streams.close)
            with_gaps(windows, gaps)
            if failed:
                say(f"{failed} of decode's streams failed")


def with_gaps(windows: list[Window], gaps: Sequence[Gap]) -> list[Window]:
    for window in windows:
        window.gaps_s = within(gaps, window.begin, window.end)
    return windows


def summarise(windows: Sequence[Window]) -> list[dict[str, Any]]:
    """A row for each load, and the ratios of pushing to the other two where they are there."""
    rows: list[dict[str, Any]] = []
    for load in ("quiet", *LOADS):
        chosen = [window for window in windows if window.load == load]
        gaps = [gap for window in chosen for gap in window.gaps_s]
        if not gaps:
            continue
        p50, p99 = (float(value) * 1e3 for value in np.percentile(gaps, [50, 99]))
        rate = _rate(chosen)
        failed = sum(window.failed for window in chosen)
        row = {"load": load, "windows": len(chosen), "tok_s": rate, "p50": p50, "p99": p99, "gaps": len(gaps)}
        rows.append({**row, "failed": failed})
    by_load = {row["load"]: row for row in rows}
    pushing = by_load.get("pushing")
    for load in ("joining", "computing"):
        other = by_load.get(load)
        if pushing and other and other["tok_s"]:
            ratios = {key: pushing[key] / other[key] for key in ("tok_s", "p50", "p99")}
            rows.append({"load": f"pushing / {load}", **ratios})
    return rows


def _rate(windows: Sequence[Window]) -> float:
    """Tokens a second between the first and the last prompt that ended in each window: a window has room for two dozen
    prompts, and counted whole they would tell 4% apart at best."""
    spans = [(sorted(window.done), window.length) for window in windows if len(window.done) > 1]
    seconds = sum(done[-1] - done[0] for done, _ in spans)
    return sum((len(done) - 1) * length for done, length in spans) / seconds if seconds else 0.0


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "windows" not in row:
            good = row["p50"] <= BOUND and row["p99"] <= BOUND and 1 / max(row["tok_s"], 1e-9) <= BOUND
            verdict = f"{'within' if good else 'not within'} {BOUND - 1:.0%}"
            lines.append([row["load"], *(f"{row[key]:.3f}" for key in ("tok_s", "p50", "p99")), verdict, ""])
            continue
        cells = [f"{row['tok_s']:.0f}", f"{row['p50']:.2f}", f"{row['p99']:.2f}", str(row["gaps"]), str(row["failed"])]
        lines.append([row["load"], *cells])
    return markdown(["load", "prefill tok/s", "ITL p50", "ITL p99", "gaps", "failed"], lines)


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    if tell_lacking("benchmarks.interference", needs_of(options)):
        return LACKING
    ends = time.monotonic() + options.seconds
    scale = FULL if options.gpu else REHEARSAL
    logs = options.logs or Path(tempfile.mkdtemp(prefix="pdtransport-interference-"))
    logs.mkdir(parents=True, exist_ok=True)
    before = {**machine(), "card": card(), "cards": all_cards()}
    windows: list[Window] = []
    with measuring() as ending, tempfile.TemporaryDirectory(prefix="pdtransport-model-") as folder:
        model = scale.write_model(Path(folder))
        mode: Mode = "graphs" if options.graphs else "eager"
        pair = scale.pair("pdtransport", model, mode, options.settings, options.cards)
        try:
            with fleet(*pair, logs=logs, timeout_s=min(scale.start_s, options.seconds)) as servers:
                asyncio.run(measure(options, scale, servers, ends, windows))
        except ServerFailed as error:
            say(brief(error))
            ending.status = FAILED
    if not windows:
        return ending.status or FAILED
    rows = summarise(windows)
    print(where(options.cards))
    print(table(rows))
    asked = {key: value for key, value in vars(options).items() if key not in ("json", "logs")}
    shown = {"machine": before, "asked": asked, "rows": rows, "windows": [asdict(window) for window in windows]}
    keep(options.json, json.dumps(shown) + "\n")
    return ending.status


if __name__ == "__main__":
    sys.exit(main())
