"""A model's configuration as facts that two engines compare field by field, by value.

All fields are compared except those in :data:`IRRELEVANT`. The opposite, a list of the fields that KV depends on, would
be shorter but unsafe: a new model's own field would be missing from it, and KV of a different model would pass as this
one's. With a list of irrelevant fields, an unknown field is compared, and at worst a compatible pair is refused with
the field's name. A field is listed only if no model code can read it on the way to a key or a value: it says where the
configuration came from, how to train, what Hugging Face's own code returns or caches, or how to sample. Fields that
look similar but are read by some model in vLLM are not listed: token ids (some models embed or mask by them), the
``dtype``, initial values, the router's jitter.

A field that only one side knows, and that has the default value of that side's library, does not count as a difference:
libraries add fields whose defaults change nothing, and a field set in the configuration reaches both sides. If both
sides know a
field, the values must be equal, whether set or default: this catches a default that changed between two versions. A
null where the library has a default value (Gemma 2 without soft caps) counts as a value that was set.

The text form is canonical JSON, ``{"set": {...}, "default": {...}}`` with dotted names. It is sent as one fact of a
fingerprint (:mod:`pdtransport.kv.fingerprint`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

# Names of fields, at any depth. The module's docstring says what may be listed.
IRRELEVANT = frozenset(
    {
        # where the configuration came from
        "_attn_implementation_autoset", "_auto_class", "_commit_hash", "_name_or_path", "auto_map", "name_or_path",
        "tokenizer_class", "transformers_version", "unsloth_version",
        # training, and losses
        "attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "classifier_dropout", "embd_pdrop",
        "embedding_dropout", "finetuning_task", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob",
        "id2label", "label2id", "output_router_logits", "pretraining_tp", "problem_type", "resid_pdrop",
        "router_aux_loss_coef", "router_z_loss_coef", "task_specific_params", "tf_legacy_loss",
        # what Hugging Face's own code returns, caches or cuts
        "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
        "use_bfloat16", "use_cache",
        # sampling, in configurations from before generation_config.json
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
        "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
        "return_dict_in_generate", "suppress_tokens", "typical_p",
    }
)  # fmt: skip

MAX_VALUE = 96  # characters of one value; a longer one (a list of layers or tensors) is replaced by its digest
MAX_TEXT = 1 << 15  # characters of the text form; a longer one is replaced by its digest
_ALIASES = {"torch_dtype": "dtype"}  # older name -> name

Value = str | int | float | bool | list[Any]


class ModelFacts:
    """Facts by dotted name: ``default`` holds values equal to the library's defaults, ``given`` all others.

    Args:
        config: as returned by ``PretrainedConfig.to_dict()``, with nested configurations.
        defaults: the same for a default-constructed configuration of the same class. If empty, every field counts as
            given.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        known = {name: value for name, value in _flat(defaults or {}) if value is not None}
        self.given: dict[str, Value | None] = {}
        self.default: dict[str, Value] = {}
        for name, value in _flat(config):
            if value is None:
                if name in known or any(each.startswith(f"{name}.") for each in known):
                    self.given[name] = None  # a default that was removed on purpose
                continue
            where = self.default if name in known and _equal(known[name], value) else self.given
            where[name] = value

    def text(self) -> str:
        """The text form, for the wire; its digest if it is longer than ``MAX_TEXT``."""
        text = json.dumps({"set": self.given, "default": self.default}, sort_keys=True, separators=(",", ":"))
        return text if len(text) <= MAX_TEXT else f"#{_digest(text)}"

    def digest(self) -> str:
        """A digest for content keys, which can't be compared field by field.

        Covers all given fields and the non-empty defaults. Defaults of None, False, 0 or an empty value are left out:
        libraries introduce new fields with such defaults.
        """
        telling = {name: value for name, value in self.default.items() if value}
        return _digest(json.dumps({**self.given, **telling}, sort_keys=True))


def difference(ours: str, yours: str) -> tuple[str, Any, Any] | None:
    """The first difference of two texts of :meth:`ModelFacts.text`: ``(field, our value, their value)``, or None.

    A value is None if that side does not know the field. The field is empty, and the values are the texts themselves,
    if a text can't be parsed (a digest, or garbage).
    """
    if ours == yours:
        return None
    mine, theirs = _parsed(ours), _parsed(yours)
    if mine is None or theirs is None:
        return "", ours, yours
    for name in sorted({*mine, *theirs}):
        here, there = mine.get(name), theirs.get(name)
        if here is None or there is None:
            only = here or there
            assert only is not None
            if only[1]:
                continue
        elif _equal(here[0], there[0]):
            continue
        return name, here and here[0], there and there[0]
    return None


def _parsed(text: str) -> dict[str, tuple[Value | None, bool]] | None:
    """Name -> ``(value, is the library's default)``; None if ``text``, which may come from anyone, has another form."""
    if len(text) > MAX_TEXT or not text.startswith("{"):
        return None
    try:
        raw = json.loads(text)
        parts = [(raw["default"], True), (raw["set"], False)]
        return {str(name): (value, usual) for part, usual in parts for name, value in part.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Value | None]]:
    """Dotted names and plain values, without irrelevant fields. A null or an empty dict is yielded as None."""
    for name, value in _without_old_rope(config).items():
        name = _ALIASES.get(str(name), str(name))
        if name in IRRELEVANT:
            continue
        if value is None or value == {}:
            yield f"{prefix}{name}", None
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _plain(value)


def _without_old_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``config`` without old rotary-embedding fields that only repeat ``rope_parameters``.

    Newer libraries keep everything about the rotary embedding there; older ones keep separate fields as well.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return config
    doubled = {name for name in ("rope_theta", "partial_rotary_factor") if rope.get(name, rope) == config.get(name)}
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping):
        named = {"rope_type" if name == "type" else name: value for name, value in scaling.items()}
        if all(name in rope and rope[name] == value for name, value in named.items()):
            doubled.add("rope_scaling")
    return {name: value for name, value in config.items() if name not in doubled}


def _plain(value: Any) -> Value:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        shown = value.removeprefix("torch.")
        return shown if len(shown) <= MAX_VALUE else f"#{_digest(shown)}"
    listed = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
    text = json.dumps(listed, sort_keys=True, default=str)
    if len(text) > MAX_VALUE:
        return f"#{_digest(text)}"
    plain = json.loads(text)
    return plain if isinstance(plain, list) else str(plain)


def _equal(mine: Any, theirs: Any) -> bool:
    return isinstance(mine, bool) == isinstance(theirs, bool) and bool(mine == theirs)  # True is not 1 here


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
