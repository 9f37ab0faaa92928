"""What of vLLM's configuration KV depends on is compared, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import ModelConfig

from pdtransport.kv.fingerprint import compare
from pdtransport.vllm import identity
from pdtransport.vllm.identity import kv_cache_dtype, long_rope, media, model_facts, model_identity, page_format

TINY_LM = Path(__file__).resolve().parents[2] / "examples" / "models" / "tiny-lm"

Configs = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configs:
    """``config(folder, flags of ModelConfig, cache=..., parallel=..., change=fields of config.json)``."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(
        folder: str = "a",
        *,
        cache: dict[str, Any] | None = None,
        parallel: dict[str, Any] | None = None,
        change: dict[str, Any] | None = None,
        **flags: Any,
    ) -> Any:
        path = tmp_path / folder / "model"
        if not path.exists():
            shutil.copytree(TINY_LM, path)
        if change:
            file = path / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        model = ModelConfig(model=str(path), **{"dtype": "float32", "max_model_len": 256, **flags})
        return SimpleNamespace(
            model_config=model,
            cache_config=SimpleNamespace(cache_dtype="auto", **(cache or {})),
            parallel_config=SimpleNamespace(**(parallel or {})),
        )

    return make


def differing(ours: Any, yours: Any) -> str:
    mismatch = compare(model_identity(ours, torch.float32), model_identity(yours, torch.float32))
    return mismatch.field if mismatch else ""


def test_the_same_model_at_another_path_is_the_same(config: Configs) -> None:
    assert differing(config("a"), config("b")) == ""
    one, other = (model_facts(config(folder).model_config).digest() for folder in "ab")
    assert one == other


def test_code_that_a_model_brings_along_counts_where_it_may_run(config: Configs) -> None:
    """A model's own Python files compute its keys and values; without leave to run they are only text."""

    def code(folder: str, text: str, *, trusted: bool = True) -> Any:
        made = config(folder)
        (Path(made.model_config.model) / "modeling_own.py").write_text(text)
        made.model_config.hf_config.auto_map = {"AutoModel": "modeling_own.Own"}
        made.model_config.trust_remote_code = trusted
        return made

    one = code("a", "scale = 1")
    assert differing(one, code("b", "scale = 1")) == ""
    assert differing(one, code("b", "scale = 2")) == "remote_code"
    assert differing(code("a", "scale = 1", trusted=False), code("b", "scale = 2", trusted=False)) == ""


def test_another_transformers_version_is_the_same(config: Configs) -> None:
    here, there = config("a"), config("b", change={"transformers_version": "4.99.0"})
    assert differing(here, there) == ""


@pytest.mark.parametrize(
    ("field", "there"),
    [
        (
            "model_config.rope_parameters.rope_theta",
            {"hf_overrides": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}},
        ),
        ("model_config.rms_norm_eps", {"change": {"rms_norm_eps": 1e-6}}),
        (
            "model_config.rope_parameters.factor",
            {"change": {"rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 2.0}}},
        ),
        ("dtype", {"dtype": "bfloat16"}),
        ("kv_cache_dtype", {"cache": {"kv_cache_dtype_skip_layers": ["0"]}}),
        ("dcp_size", {"parallel": {"decode_context_parallel_size": 2}}),
        ("pcp_size", {"parallel": {"prefill_context_parallel_size": 2}}),
        ("cp_interleave", {"parallel": {"cp_kv_cache_interleave_size": 16}}),
    ],
)
def test_what_kv_depends_on_refuses_by_name(config: Configs, field: str, there: dict[str, Any]) -> None:
    assert differing(config("a"), config("b", **there)) == field


@pytest.mark.parametrize(
    "there",
    [
        {"max_model_len": 128},
        {"served_model_name": "other"},
        {"seed": 7},
        {"enforce_eager": True},
        {"max_logprobs": 3},
        {"change": {"use_cache": False, "attention_dropout": 0.1, "tokenizer_class": "Other"}},
    ],
)
def test_what_kv_does_not_depend_on_refuses_nobody(config: Configs, there: dict[str, Any]) -> None:
    assert differing(config("a"), config("b", **there)) == ""


def test_quantization_on_the_fly_is_told(config: Configs) -> None:
    here, there = config("a"), config("b")
    there.model_config.quantization = "fp8"
    assert differing(here, there) == "quantization"


def test_a_window_that_a_flag_takes_away_is_told(config: Configs) -> None:
    change = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    assert differing(config("a", change=change), config("b", change=change)) == ""
    assert (
        differing(config("c", change=change), config("d", change=change, disable_sliding_window=True, max_model_len=64))
        != ""
    )


def test_longrope_depends_on_the_longest_text_of_the_server(config: Configs) -> None:
    """vLLM then uses the long factors from the first token on."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "long_factor": [2.0] * 16,
        "short_factor": [1.0] * 16,
        "original_max_position_embeddings": 200,
    }
    change = {"rope_parameters": rope, "original_max_position_embeddings": 200}
    short, long = config("a", change=change, max_model_len=200), config("b", change=change, max_model_len=256)
    assert differing(short, long) == "long_rope"
    assert differing(long, config("c", change=change, max_model_len=300)) == ""


@pytest.mark.parametrize(
    ("flags", "dtype", "shown"),
    [
        ({"cache_dtype": "auto"}, torch.bfloat16, "bfloat16"),
        ({"cache_dtype": "bfloat16"}, torch.bfloat16, "bfloat16"),
        ({"cache_dtype": "fp8_e5m2"}, torch.uint8, "fp8_e5m2/uint8"),
        ({"cache_dtype": "fp8_e4m3"}, torch.uint8, "fp8_e4m3/uint8"),
    ],
)
def test_the_caches_dtype_is_what_is_stored(flags: dict[str, Any], dtype: torch.dtype, shown: str) -> None:
    assert kv_cache_dtype(SimpleNamespace(**flags), dtype) == shown


def test_scales_that_each_engine_finds_for_itself_are_never_the_same() -> None:
    cache = SimpleNamespace(cache_dtype="fp8", calculate_kv_scales=True)
    assert kv_cache_dtype(cache, torch.uint8) != kv_cache_dtype(cache, torch.uint8)


def test_flags_that_change_what_pictures_become_are_told() -> None:
    from vllm.config.multimodal import MultiModalConfig

    def of(**flags: Any) -> str:
        config = MultiModalConfig(**flags)
        return media(SimpleNamespace(multimodal_config=config, model=TINY_LM, revision=None))  # type: ignore[arg-type]

    assert of() == of(mm_processor_cache_gb=0, skip_mm_profiling=True, mm_encoder_tp_mode="data") == ""
    assert of(mm_processor_kwargs={"min_pixels": 4}) != of() != of(video_pruning_rate=0.5)


def test_the_switch_of_longrope_is_what_the_model_was_built_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that finds its longest text by itself builds the model for the longest of all, and shortens it then."""
    from vllm.model_executor.layers import rotary_embedding

    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    model: Any = SimpleNamespace(hf_text_config=SimpleNamespace(rope_parameters=rope), max_model_len=2048)
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    assert not long_rope(model)
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {(): SimpleNamespace(use_long_rope=True), (1,): object()})
    assert long_rope(model)


def test_files_that_say_what_images_become_count(tmp_path: Path) -> None:
    """Two servers of the same weights whose processors normalize pictures otherwise embed the same picture otherwise.
    Where the processor came from is no difference; nor is the place of the encoder's scales."""
    from vllm.config.multimodal import MultiModalConfig

    def of(folder: Path, processor: dict[str, Any] | None = None, scales: str = "") -> str:
        folder.mkdir(exist_ok=True)
        flags: dict[str, Any] = {}
        if processor is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        if scales:
            (folder / "scales.json").write_text(scales)
            flags = {"mm_encoder_attn_dtype": "fp8", "mm_encoder_fp8_scale_path": str(folder / "scales.json")}
        config = MultiModalConfig(**flags)
        return media(SimpleNamespace(multimodal_config=config, model=str(folder), revision=None))  # type: ignore[arg-type]

    a, b = tmp_path / "a", tmp_path / "b"
    assert of(a) == of(b) == ""
    usual = {"image_mean": [0.5, 0.5, 0.5], "_name_or_path": "x"}
    assert of(a, usual) == of(b, {**usual, "_name_or_path": "y"}) != ""
    assert of(a) != of(b, {"image_mean": [0.4, 0.5, 0.5]})
    assert of(a, usual, "{}") == of(b, usual, "{}") != of(b, usual, '{"layer": 1}')


@pytest.mark.parametrize("version", ["0.31.4", "0.32.0", "0.32.1+cpu"])
def test_versions_whose_pages_are_known_to_be_the_same_agree(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    here = page_format()
    monkeypatch.setattr(vllm, "__version__", version)
    assert page_format() == here == identity.PAGE_FORMAT


def test_a_version_that_nobody_looked_at_agrees_with_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.77.1")
    assert page_format() == "vllm 0.77.1"
