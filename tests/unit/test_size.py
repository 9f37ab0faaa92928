"""``pdlaunch size``: arithmetic on a model's config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdtransport.launch.cli import USAGE, main
from pdtransport.launch.size import SizeError, kv_size, parse_rate, read_config, report

TINY = Path(__file__).resolve().parents[2] / "examples" / "models" / "tiny-lm"
GROUPED: dict[str, Any] = {  # an 8B-shaped Llama: 128 KiB a token
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}
LATENT: dict[str, Any] = {  # of DeepSeek-V3's shape
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("config", "options", "token", "rank"),
    [
        (GROUPED, {}, 128 << 10, 128 << 10),
        (GROUPED, {"tp": 4}, 128 << 10, 32 << 10),
        (GROUPED, {"tp": 16}, 128 << 10, 16 << 10),  # two ranks hold the same head
        (GROUPED, {"dtype": "fp8"}, 64 << 10, 64 << 10),
        ({**GROUPED, "num_key_value_heads": None}, {}, 512 << 10, 512 << 10),  # no grouping: a KV head a query head
        ({**GROUPED, "head_dim": 256}, {}, 256 << 10, 256 << 10),
        (LATENT, {"tp": 8}, 61 * 576 * 2, 61 * 576 * 2),  # every rank holds the whole latent
    ],
)
def test_bytes_of_a_token(config: dict[str, Any], options: dict[str, Any], token: int, rank: int) -> None:
    size = kv_size(config, **options)
    assert (size.token_bytes, size.rank_token_bytes) == (token, rank)


def test_a_prompt_crosses_in_whole_blocks() -> None:
    size = kv_size(GROUPED, block_size=16)
    told = report(size, [16, 17], {"wire": 1.0})
    assert [prompt["bytes"] for prompt in told["prompts"]] == [16 * 131072, 32 * 131072]
    assert told["prompts"][0]["seconds"] == {"wire": pytest.approx(16 * 131072 / 1e9)}
    assert told["page_bytes"] == 64 << 10
    assert told["chunk_bytes"][64] == 64 * 131072


@pytest.mark.parametrize(
    ("config", "options", "why"),
    [
        ({}, {}, "no 'num_hidden_layers'"),
        ({**GROUPED, "num_hidden_layers": "32"}, {}, "'num_hidden_layers' is '32'"),
        ({**GROUPED, "num_hidden_layers": True}, {}, "'num_hidden_layers' is True"),
        ({**GROUPED, "num_attention_heads": 0}, {}, "'num_attention_heads' is 0"),
        ({**GROUPED, "hidden_size": "x"}, {}, "'hidden_size' is 'x'"),
        ({**GROUPED, "torch_dtype": "int3"}, {}, "'int3': must be one of"),
        ({**GROUPED, "layer_types": ["full_attention", "linear_attention"]}, {}, "linear_attention keep a state"),
        (GROUPED, {"tp": 3}, "can't be split over tp 3"),
        (GROUPED, {"tp": 0}, "must be 1 or more"),
        ({**LATENT, "qk_rope_head_dim": None}, {}, "no 'qk_rope_head_dim'"),
    ],
)
def test_what_is_missing_or_nonsense_is_named(config: dict[str, Any], options: dict[str, Any], why: str) -> None:
    with pytest.raises(SizeError, match=why):
        kv_size(config, **options)


def test_the_language_part_of_a_multimodal_model_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"dtype": "bfloat16", "num_hidden_layers": 1, "text_config": {**GROUPED, "torch_dtype": None}})
    )
    assert kv_size(read_config(tmp_path)).token_bytes == 128 << 10


@pytest.mark.parametrize("text", [None, "", "[1]", "nonsense", "[" * 5000, "\udcff"])
def test_a_file_that_is_no_config_is_one_line(text: str | None, tmp_path: Path, capsys: Any) -> None:
    """No traceback, whatever the file holds."""
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert main(["size", str(tmp_path)]) == USAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("pdlaunch: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "x", "=1", "x=", "x=0", "x=-1", "x=nan", "x=inf", "x=1e999"])
def test_a_rate_needs_a_name_and_a_number(text: str) -> None:
    with pytest.raises(SizeError, match="NAME=GB/s"):
        parse_rate(text)


def test_the_command_agrees_with_what_crossed(capsys: Any) -> None:
    """tests.rig.proof counts 2,048 elements a token of tiny-lm on the wire."""
    assert main(["size", str(TINY), "--json", "--tokens", "4000", "--block-size", "32", "--rate", "a=b=2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes_per_token"] == 2048 * 2
    assert told["prompts"] == [
        {"tokens": 4000, "bytes": 4000 * 4096, "seconds": {"a=b": pytest.approx(4000 * 4096 / 2e9)}}
    ]
    assert main(["size", str(TINY), "--tokens", "0"]) == USAGE
