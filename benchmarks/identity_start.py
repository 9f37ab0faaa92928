"""What the identity of weights costs a server: ``python -m benchmarks.identity_start [--runs N] [--json FILE]``.

A start: from the process's beginning to the first token, of a checkpoint of ``--gib`` (2) with a tiny vocabulary, whose
files are in the page cache. Systems, each a real vLLM server on the CPU, in turn, ``--runs`` (5) times:

plain       without a connector
named       pdtransport, told by ``model_id`` what the weights are, and not watching them: no digest, no sum
cold        pdtransport, which digests every byte of the checkpoint
warm        pdtransport, which remembers the digest

A token: tiny-lm streams ``--tokens`` (200) of them, without others beside it, from servers that are up at the same time
and asked in turn:

plain       without a connector
watching    pdtransport
unwatched   pdtransport that does not watch its weights (``watch_weights`` false)

Columns: medians, and each against the first row; processor seconds of the server's processes, which other programs on
the machine disturb less than the clock; ``busy`` is the share of the machine that others used meanwhile. The rig's
servers fork (``tests/rig/fork_server/forking.py``), so that a start is short and what is added shows; ``--installed``
starts them as vLLM is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._figures import FAILED, keep, measuring, say
from benchmarks._handoff_report import markdown
from benchmarks._needs import LACKING, VLLM, Need, package, room, tell_lacking
from benchmarks.handoff import machine
from tests.rig import watch
from tests.rig.client import Client, request_body
from tests.rig.fixtures import FORKING
from tests.rig.prompts import BOS, Prompts
from tests.rig.servers import TINY_LM, Server, ServerFailed, ServerSpec, fleet

STARTS = ("plain", "named", "cold", "warm")
STREAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "watching": {},
    "unwatched": {"watch_weights": False},
}
NAMED = {"model_id": "what-it-is", "watch_weights": False}
PROMPT = 200  # tokens
CACHE_BYTES = 128 << 20
LONGEST = 2048
SHARD_BYTES = 512 << 20
# A model whose layers are large and few: loading it is reading.
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 8}
HEAD = 128
VOCABULARY = 4096


@dataclass(frozen=True)
class Start:
    """One start. ``ready_s`` is when it answers /health, ``first_s`` when its first token has come, ``cpu_s`` what its
    processes have used until then; ``busy`` the share of the machine that others used."""

    system: str
    ready_s: float
    first_s: float
    cpu_s: float
    busy: float


@dataclass(frozen=True)
class Stream:
    """One stream's mean time between tokens."""

    system: str
    token_ms: float


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.identity_start", description=str(__doc__).split(":")[0])
    parser.add_argument("--runs", type=int, default=5, help="starts of each system (default 5)")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint (default 2)")
    parser.add_argument(
        "--tokens", type=int, default=200, help="of a stream (default 200, at least 2); 0 leaves streams out"
    )
    parser.add_argument("--streams", type=int, default=15, help="of each system (default 15)")
    parser.add_argument("--installed", action="store_true", help="servers that start as vLLM is installed")
    parser.add_argument("--json", type=Path, help="write every sample here")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    options = parser.parse_args(argv)
    if options.runs < 0 or options.gib <= 0 or options.tokens == 1 or options.streams < 1:
        parser.error("--runs is not negative, --gib and --streams are positive, --tokens is 0 or more than 1")
    return options


# -- the checkpoint -----------------------------------------------------------------------------------------------


def make_model(folder: Path, gib: float) -> int:
    """A Llama of random weights in bfloat16, in several files; returns its bytes.

    Raises:
        OSError: no room for it.
    """
    import torch
    from safetensors.torch import save_file

    hidden, inner, heads, groups = SHAPE.values()
    shapes = {
        "self_attn.q_proj": (heads * HEAD, hidden),
        "self_attn.k_proj": (groups * HEAD, hidden),
        "self_attn.v_proj": (groups * HEAD, hidden),
        "self_attn.o_proj": (hidden, heads * HEAD),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layer_bytes = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    layers = max(1, round(gib * (1 << 30) / layer_bytes))
    wanted = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in shapes.items()}
    wanted |= {"model.embed_tokens": (VOCABULARY, hidden), "lm_head": (VOCABULARY, hidden), "model.norm": (hidden,)}
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = [{}]
    held = total = 0
    places = {}
    for name, shape in wanted.items():
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) > 1:
            tensor.uniform_(-0.02, 0.02)
        if held and held + tensor.nbytes > SHARD_BYTES:
            save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors", metadata={"format": "pt"})
            shards[-1].clear()
            shards.append({})
            held = 0
        shards[-1][f"{name}.weight"] = tensor
        places[f"{name}.weight"] = f"model-{len(shards):05}.safetensors"
        held += tensor.nbytes
        total += tensor.nbytes
    save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((TINY_LM / "config.json").read_text())
    config |= {**SHAPE, "head_dim": HEAD, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config |= {"tie_word_embeddings": False, "max_position_embeddings": LONGEST}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY_LM / name).read_bytes())
    return total


def read_whole(folder: Path) -> None:
    """Into the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


# -- starts -------------------------------------------------------------------------------------------------------


def start_spec(system: str, model: Path, caches: Path, installed: bool) -> ServerSpec:
    """``caches`` holds the remembered digests: those of a cold start's are removed before it."""
    spec = ServerSpec(
        system,
        cores="0-1" if (os.cpu_count() or 1) > 1 else "0",
        dtype="bfloat16",
        max_model_len=LONGEST,
        kv_cache_bytes=CACHE_BYTES,
        model=model,
        env={"XDG_CACHE_HOME": str(caches / system), "VLLM_CACHE_ROOT": str(caches / "vllm")},
        script=None if installed else FORKING,
    )
    if system == "plain":
        return spec
    return replace(spec, connector="pdtransport", extra_config=NAMED if system == "named" else {})


def started(spec: ServerSpec, logs: Path) -> Start:
    """
    Raises:
        ServerFailed: it did not start.
    """

    async def first_token(server: Server) -> None:
        async with Client() as client:
            await client.complete(server, [BOS, 5, 6, 7], 1)

    before = watch.machine_busy_seconds()
    with fleet(spec, logs=logs) as (server,):
        asyncio.run(first_token(server))
        first_s = time.monotonic() - server.started_at
        cpu_s = watch.cpu_seconds(server.members())
        others = watch.machine_busy_seconds() - before - cpu_s
        assert server.ready_s is not None
        return Start(spec.name, server.ready_s, first_s, cpu_s, others / first_s / (os.cpu_count() or 1))


def starts(options: argparse.Namespace, scratch: Path, logs: Path) -> Iterator[Start]:
    """In turn, each system first in its turn; the first warm one after a start that is not counted."""
    model, caches = scratch / "model", scratch / "caches"
    size = make_model(model, options.gib)
    say(f"a checkpoint of {size / (1 << 30):.2f} GiB in {len(list(model.glob('*.safetensors')))} files")
    for run in range(-1, options.runs):  # once for nothing: it fills caches, vLLM's own among them
        for place in range(len(STARTS)):
            system = STARTS[(place + run) % len(STARTS)]
            if system == "cold":
                shutil.rmtree(caches / system, ignore_errors=True)
            read_whole(model)
            sample = started(start_spec(system, model, caches, options.installed), logs)
            say(f"{'not counted' if run < 0 else f'run {run}'}: {sample}")
            if run >= 0:
                yield sample


def starts_table(samples: Sequence[Start]) -> str:
    lines = []
    base: dict[str, float] = {}
    for system in STARTS:
        group = [sample for sample in samples if sample.system == system]
        if not group:
            continue
        middle = {
            name: median(getattr(each, name) for each in group) for name in ("ready_s", "first_s", "cpu_s", "busy")
        }
        base = base or middle
        more = middle["first_s"] - base["first_s"]
        lines.append(
            [
                system,
                str(len(group)),
                f"{middle['ready_s']:.2f}",
                f"{middle['first_s']:.2f}",
                f"{more:+.2f} s, {more / base['first_s']:+.1%}",
                f"{min(each.first_s for each in group):.2f} to {max(each.first_s for each in group):.2f}",
                f"{middle['cpu_s']:.2f}",
                f"{middle['cpu_s'] - base['cpu_s']:+.2f}",
                f"{middle['busy']:.0%}",
            ]
        )
    head = ["start", "n", "ready s", "first token s", "more", "range", "cpu s", "more", "busy"]
    return markdown(head, lines)


# -- tokens -------------------------------------------------------------------------------------------------------


def stream_spec(system: str) -> ServerSpec:
    """All on one core, which only the one that is asked uses."""
    spec = ServerSpec(f"stream-{system}", max_model_len=LONGEST, kv_cache_bytes=CACHE_BYTES, script=FORKING)
    return spec if system == "plain" else replace(spec, connector="pdtransport", extra_config=STREAMS[system])


async def stream(client: Client, server: Server, prompt: list[int], tokens: int) -> float:
    """Mean milliseconds between two tokens of one stream, whose lines may come bunched."""
    times: list[float] = []
    body = request_body(prompt, tokens, stream=True)
    async with client.post(f"{server.url}/v1/completions", body) as response:
        async for raw in response.content:
            if raw.startswith(b"data: {"):
                times.append(time.perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1) * 1000


def streams(options: argparse.Namespace, logs: Path, note: Callable[[Stream], None]) -> None:
    """``note`` is told each as soon as it is there."""
    prompts = Prompts(1)

    async def ask(servers: Sequence[Server]) -> None:
        async with Client() as client:
            for run in range(-1, options.streams):  # once for nothing
                prompt = prompts.one(PROMPT)
                for place in range(len(servers)):
                    number = (place + run) % len(servers)
                    token_ms = await stream(client, servers[number], prompt, options.tokens)
                    if run >= 0:
                        note(Stream(list(STREAMS)[number], token_ms))

    with fleet(*map(stream_spec, STREAMS), logs=logs) as servers:
        asyncio.run(ask(servers))


def streams_table(samples: Sequence[Stream]) -> str:
    """Each stream is compared with the plain server's of the same turn: the machine was as busy then. A turn that was
    not finished is left out."""
    by = {system: [each.token_ms for each in samples if each.system == system] for system in STREAMS}
    turns = min(map(len, by.values()))
    lines = []
    for system, every in by.items():
        found = every[:turns]
        if not found:
            continue
        ratios = [one / other for one, other in zip(found, by["plain"][:turns], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        lines.append([system, str(len(found)), f"{median(found):.3f}", f"{median(ratios):.3f}", spread])
    return markdown(["token", "n", "ms", "of plain", "range"], lines)


def needs_of(options: argparse.Namespace, scratch: Path) -> list[Need]:
    return [
        package("vllm", VLLM),
        package("safetensors", "pip install safetensors"),
        room(scratch, int(options.gib * (1 << 30)) if options.runs else 0, "or choose a smaller --gib, or TMPDIR"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    if tell_lacking("benchmarks.identity_start", needs_of(options, Path(tempfile.gettempdir()))):
        return LACKING
    before, began, streamed = machine(), list[Start](), list[Stream]()

    def note(sample: Start | Stream) -> None:
        (began if isinstance(sample, Start) else streamed).append(sample)  # type: ignore[arg-type]
        found = {"machine": before, "starts": [*map(asdict, began)], "streams": [*map(asdict, streamed)]}
        keep(options.json, json.dumps(found, indent=1))

    print(f"{before['cpu']}, {before['cores']} cores")
    with measuring(ServerFailed) as ending, ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdtransport-identity-")))
        logs = options.logs or scratch / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        if options.tokens:
            streams(options, logs, note)
        if options.runs:
            for sample in starts(options, scratch, logs):
                note(sample)
    if streamed:
        print(streams_table(streamed))
    if began:
        print(starts_table(began))
    return ending.status or (0 if streamed or began else FAILED)


if __name__ == "__main__":
    sys.exit(main())
