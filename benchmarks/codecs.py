"""What codecs of the pool's tiers save and cost: ``python -m benchmarks.codecs --model DIR``.

The KV is real: a prompt's, from the model that ``--model`` names (transformers, on the CPU), in pages of ``--block``
tokens, laid out and packed as the pool does it. Bytes and speed: of the chunks of one long prompt, one thread. Quality:
the KV of the first part of each text goes through the codec, as if it came from a tier; the rest is read by the model
exactly. Perplexity of that rest, the share of its tokens for which another token is now the likeliest, and the share of
greedily generated tokens that differ from those after exact KV, until and after the first difference.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks._figures import FAILED, keep, measuring
from benchmarks._needs import LACKING, Need, package, tell_lacking, there

DTYPES = ("float32", "bfloat16", "float16")


def main() -> int:
    arguments = parse()
    if tell_lacking("benchmarks.codecs", needs_of(arguments)):
        return LACKING
    import torch

    from benchmarks._codec_quality import load, measure

    torch.set_num_threads(arguments.threads)
    texts = [name.read_text(encoding="utf-8", errors="replace") for name in arguments.text]
    result: dict[str, Any] = {}
    with measuring() as ending:
        for dtype in arguments.dtypes:
            result[dtype] = measure(*load(arguments.model, dtype), texts, dtype, arguments)
            keep(arguments.json, json.dumps(result, indent=1) + "\n")
    if not result:
        return ending.status or FAILED
    print(table(result))
    return ending.status


def needs_of(arguments: argparse.Namespace) -> list[Need]:
    packages = [package(name, f"pip install {name}") for name in ("torch", "transformers")]
    packages.append(package("zstandard", "pip install 'pdtransport[pool]'"))
    return [
        *packages,
        there(Path(arguments.model, "config.json"), "--model: a directory of a model with real weights"),
    ] + [there(text, "--text: files with text that the model was not trained on") for text in arguments.text]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codecs", description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a model with real weights")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="files with text that the model was not trained on"
    )
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of weights and KV (default bfloat16,float32)")
    parser.add_argument(
        "--prefix", type=int, default=1024, help="tokens whose KV goes through the codec (default 1024)"
    )
    parser.add_argument("--rest", type=int, default=512, help="tokens that are then read (default 512)")
    parser.add_argument("--greedy", type=int, default=64, help="tokens that are then generated (default 64)")
    parser.add_argument("--samples", type=int, default=4, help="stretches of each text (default 4)")
    parser.add_argument("--block", type=int, default=16, help="tokens of a page (default 16)")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a chunk (default 256)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    arguments = parser.parse_args()
    arguments.dtypes = [dtype.strip() for dtype in arguments.dtypes.split(",") if dtype.strip()]
    unknown = sorted(set(arguments.dtypes) - set(DTYPES))
    if unknown:
        parser.error(f"--dtypes: unknown {', '.join(unknown)}; known are {', '.join(DTYPES)}")
    return arguments


def table(result: dict[str, Any]) -> str:
    lines = [
        "| KV | codec | bytes | encode GB/s | decode GB/s | perplexity | other likeliest token | greedy tokens that "
    ]
    lines[0] += "differ | answers that differ |"
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for dtype, found in result.items():
        for name, each in found.items():
            rates = [f"{each[f'{what} GB/s']:.2f}" if name != "none" else "" for what in ("encode", "decode")]
            shares = [f"{100 * each[what]:.2f}%" for what in list(each)[4:7]]
            cells = [dtype, name, f"{100 * each['bytes']:.1f}%", *rates, f"{each['perplexity']:.4f}", *shares]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
