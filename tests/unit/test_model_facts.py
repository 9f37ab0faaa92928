"""A model's configuration is compared by what KV depends on: a difference is named with both values, and what does not
reach the KV refuses nobody."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtransport.kv.fingerprint import compare
from pdtransport.kv.model_facts import IRRELEVANT, MAX_TEXT, ModelFacts, difference

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "hidden_act": "silu",
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": None,
    "attention_bias": False,
    "_name_or_path": "/models/a",
    "transformers_version": "5.1.0",
}
DEFAULTS = {**LLAMA, "architectures": None, "hidden_size": 4096, "head_dim": None, "_name_or_path": ""}


def text(changes: dict[str, Any] | None = None, defaults: dict[str, Any] | None = None) -> str:
    return ModelFacts({**LLAMA, **(changes or {})}, DEFAULTS if defaults is None else defaults).text()


def named(ours: str, yours: str) -> tuple[str, str, str] | None:
    """What a fingerprint's comparison says; the same from both sides."""
    there, back = (
        compare({"model_config": ours}, {"model_config": yours}),
        compare({"model_config": yours}, {"model_config": ours}),
    )
    assert (there is None) == (back is None)
    if there is None or back is None:
        return None
    assert (there.field, there.ours, there.yours) == (back.field, back.yours, back.ours)
    return there.field, there.ours, there.yours


@pytest.mark.parametrize(
    ("change", "field", "ours", "yours"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
            "rope_parameters.rope_theta",
            "10000",
            "500000",
        ),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps", "1e-05", "1e-06"),
        ({"hidden_act": "gelu"}, "hidden_act", "silu", "gelu"),
        ({"sliding_window": 64}, "sliding_window", "(not given)", "64"),
        ({"attention_bias": True}, "attention_bias", "False", "True"),
        ({"query_pre_attn_scalar": 32}, "query_pre_attn_scalar", "(not given)", "32"),
        ({"vision_config": {"patch_size": 14}}, "vision_config.patch_size", "(not given)", "14"),
        ({"a_field_of_next_year": 3}, "a_field_of_next_year", "(not given)", "3"),
    ],
)
def test_a_difference_names_the_field_and_both_values(
    change: dict[str, Any], field: str, ours: str, yours: str
) -> None:
    assert named(text(), text(change)) == (f"model_config.{field}", ours, yours)
    assert ModelFacts(LLAMA, DEFAULTS).digest() != ModelFacts({**LLAMA, **change}, DEFAULTS).digest()


def test_the_text_that_people_read() -> None:
    mismatch = compare({"model_config": text()}, {"model_config": text({"hidden_act": "gelu"})})
    assert mismatch is not None
    assert mismatch.text("prefill", "decode") == (
        "model_config.hidden_act differs: prefill has silu, decode has gelu; the model's config.json (or "
        "--hf-overrides) differs: use the same on both"
    )


def test_where_the_model_lies_and_who_loaded_it_is_no_difference() -> None:
    """Another path, another transformers version, nested or not; flags of training and sampling."""
    moved = {"_name_or_path": "/elsewhere/b", "transformers_version": "5.9.9", "use_cache": False}
    assert named(text(), text(moved)) is None
    nested = {"text_config": {**LLAMA}}
    assert named(text(nested), text({"text_config": {**LLAMA, **moved}})) is None
    assert ModelFacts(LLAMA, DEFAULTS).digest() == ModelFacts({**LLAMA, **moved}, DEFAULTS).digest()
    assert "_name_or_path" in IRRELEVANT


def test_a_field_that_one_library_does_not_know_is_equal_at_the_others_default() -> None:
    newer = {**DEFAULTS, "new_scale": 1.5, "new_flag": False, "new_nothing": None}
    at_default = text({"new_scale": 1.5, "new_flag": False, "new_nothing": None}, newer)
    assert named(text(), at_default) is None
    assert named(text(), text({"new_scale": 2.0}, newer)) == ("model_config.new_scale", "(not given)", "2")


def test_unset_equals_the_default_said_aloud() -> None:
    without = {name: value for name, value in LLAMA.items() if name != "hidden_act"}
    library = {**without, "hidden_act": DEFAULTS["hidden_act"]}  # a library fills it in
    assert named(ModelFacts(library, DEFAULTS).text(), text({"hidden_act": "silu"})) is None


def test_a_field_that_is_taken_away_is_not_the_librarys_default() -> None:
    """Gemma 2 caps attention's scores at 50 by default, and null in its configuration means: not at all. Whole parts of
    a configuration can be taken away likewise."""
    library = {**DEFAULTS, "attn_logit_softcapping": 50.0, "extra": {"scale": 2.0}}
    capped = ModelFacts({**LLAMA, "attn_logit_softcapping": 50.0, "extra": {"scale": 2.0}}, library)
    for nothing in (None, {}):
        plain = ModelFacts({**LLAMA, "attn_logit_softcapping": None, "extra": {"scale": 2.0}}, library)
        assert named(capped.text(), plain.text()) == ("model_config.attn_logit_softcapping", "50", "(not given)")
        without = ModelFacts({**LLAMA, "attn_logit_softcapping": 50.0, "extra": nothing}, library)
        assert named(capped.text(), without.text()) is not None
        assert len({capped.digest(), plain.digest(), without.digest()}) == 3
        assert named(plain.text(), ModelFacts({**LLAMA, "attn_logit_softcapping": None}, library).text()) is None


def test_a_default_that_changed_between_versions_is_seen() -> None:
    """Neither side set it, each has its library's own: the values differ, and so does the KV."""
    older, newer = {**DEFAULTS, "rms_norm_eps": 1e-5}, {**DEFAULTS, "rms_norm_eps": 1e-6}
    mine, theirs = ModelFacts(LLAMA, older), ModelFacts({**LLAMA, "rms_norm_eps": 1e-6}, newer)
    assert (mine.default["rms_norm_eps"], theirs.default["rms_norm_eps"]) == (1e-5, 1e-6)
    assert named(mine.text(), theirs.text()) == ("model_config.rms_norm_eps", "1e-05", "1e-06")
    assert mine.digest() != theirs.digest()


def test_a_pools_key_outlives_a_new_field_that_says_nothing() -> None:
    newer = {**DEFAULTS, "new_flag": False, "new_list": []}
    again = ModelFacts({**LLAMA, "new_flag": False, "new_list": []}, newer)
    assert again.digest() == ModelFacts(LLAMA, DEFAULTS).digest()


def test_the_same_rotary_embedding_said_in_two_ways() -> None:
    """Older libraries keep ``rope_theta`` and ``rope_scaling`` beside ``rope_parameters``, newer ones do not."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}
    old = {"rope_parameters": rope, "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert named(text({"rope_parameters": rope}), text(old)) is None
    other = {**old, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert named(text({"rope_parameters": rope}), text(other)) is not None


def test_the_older_name_of_dtype() -> None:
    assert named(text({"torch_dtype": "torch.bfloat16"}), text({"dtype": "bfloat16"})) is None


def test_long_values_and_long_configurations_are_compared_by_digest_and_stay_short() -> None:
    layers = ["sliding_attention"] * 80
    assert named(text({"layer_types": layers}), text({"layer_types": list(layers)})) is None
    found = named(text({"layer_types": layers}), text({"layer_types": [*layers[:-1], "full_attention"]}))
    assert found is not None
    assert found[0] == "model_config.layer_types"
    assert found[1].startswith("#")
    huge = {f"field_{i}": "x" * 90 for i in range(2000)}
    assert len(text(huge)) < 64
    assert named(text(huge), text({**huge, "field_7": "y"})) is not None
    assert named(text(huge), text(dict(reversed(huge.items())))) is None


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "#",
        "{}",
        "[]",
        '{"set":1,"default":{}}',
        '{"set":{},"default":[1]}',
        "{" * 20000,
        "[" * 9000,
        "x" * (MAX_TEXT + 9),
    ],
)
def test_a_text_from_anyone_is_a_mismatch_and_no_crash(garbage: str) -> None:
    assert named(text(), garbage) is not None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda deeper: st.lists(deeper) | st.dictionaries(st.text(), deeper),
)


@given(JSON)
def test_json_from_anyone_is_compared_without_a_crash(value: Any) -> None:
    for sent in (
        json.dumps(value),
        json.dumps({"set": value, "default": {}}),
        json.dumps({"set": {"a": value}, "default": {}}),
    ):
        difference(text(), sent), difference(sent, text())


def test_numbers_that_are_equal_are_equal() -> None:
    assert named(text({"scale": 2}), text({"scale": 2.0})) is None
    assert named(text({"scale": 1}), text({"scale": True})) is not None
