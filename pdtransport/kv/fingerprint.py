"""Fingerprints: whether the KV caches of two workers are compatible. Peers compare them before the first byte moves.

A fingerprint is a flat dict of facts. All must be equal, except a few that can be bridged or are ignored
(:func:`compare`), and the model's configuration, which is compared field by field (:mod:`pdtransport.kv.model_facts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pdtransport.kv.model_facts import difference

FingerprintValue = str | int | bool
Fingerprint = Mapping[str, FingerprintValue]

MISSING = "(not given)"
MAX_SHOWN = 96  # characters of a value shown in a message: the value may come from anyone
MAX_FIELD = 128  # likewise, of a field's name

# What to do about a mismatch, by field. Root causes first: a different model explains many other differences.
REMEDIES = {
    "protocol_version": "run the same pdtransport version on both",
    "weights": "serve the same weight files on both; after a reload, reload the same weights on the other side (of "
    "the same tensor-parallel size), or restart it",
    "model": "serve the same model on both, or set model_id where only its name differs",
    "revision": "start both with the same --revision",
    "model_config": "the model's config.json (or --hf-overrides) differs: use the same on both",
    "quantization": "start both with the same --quantization",
    "long_rope": "start both with a --max-model-len on the same side of the model's original length",
    "sliding_window": "start both with, or both without, --disable-sliding-window",
    "remote_code": "the Python files in the model's folder differ (--trust-remote-code): serve the same folder on both",
    "media": "start both with the same --mm-processor-kwargs and --video-pruning-rate, and the same "
    "preprocessor_config.json in the model's folder",
    "dtype": "start both with the same --dtype",
    "kv_cache_dtype": "start both with the same --kv-cache-dtype and --kv-cache-dtype-skip-layers",
    "page_format": "run vLLM versions with the same KV page format on both",
    "cache_groups": "start both with, or both without, --disable-hybrid-kv-cache-manager",
    "attention_kinds": "start both with, or both without, --disable-hybrid-kv-cache-manager",
    "block_size": "start both with the same --block-size",
    "kv_layout": "start both with the same VLLM_KV_CACHE_LAYOUT, or leave it unset on both",
    "attention_backend": "start both with the same --attention-backend, on CPUs of the same instruction set",
    "layers": "serve the same model on both, with the same pipeline-parallel size",
    "kv_heads": "serve the same model on both",
    "kv_slot_bytes": "start both with the same --kv-cache-dtype and model",
    "layer_names": "serve the same model on both, with the same pipeline-parallel size",
    "pp_size": "start both with the same --pipeline-parallel-size",
    "dcp_size": "start both with the same --decode-context-parallel-size",
    "pcp_size": "start both with the same --prefill-context-parallel-size",
    "cp_interleave": "start both with the same --cp-kv-cache-interleave-size",
    "key_seed": "content keys must come from the same pdtransport version on both",
    "tp_size": "choose tensor-parallel sizes that divide the KV heads evenly, or are multiples of their number",
}
_ORDER = {name: place for place, name in enumerate(REMEDIES)}
_BY_FIELD = frozenset({"model_config"})  # facts in the text form of model_facts
_NAMES = frozenset({"model", "revision"})  # ignored if the digests of the weights are equal
_IGNORED = frozenset({"tp_rank"})  # differs between ranks anyway; the geometry says which heads each one holds


@dataclass(frozen=True)
class Mismatch:
    """The first fact that differs: its name, and both sides' values as text."""

    field: str
    ours: str
    yours: str

    def text(self, us: str = "this side", them: str = "the peer") -> str:
        """One line for the user: what differs, both values, and what to do about it."""
        remedy = REMEDIES.get(self.field.partition(".")[0], f"make {self.field} the same on both")
        return f"{self.field} differs: {us} has {self.ours}, {them} has {self.yours}; {remedy}"


def compare(ours: Fingerprint, yours: Fingerprint) -> Mismatch | None:
    """The most important fact that differs, or None if the two workers can exchange pages.

    ``tp_size`` may differ if each side's divides ``kv_heads`` or is a multiple of it. Not compared: ``tp_rank``, and
    ``model`` and ``revision`` if the ``weights`` are equal. A field that one side lacks is a mismatch. Symmetric: both
    sides find the same field.
    """
    ignored = _IGNORED | _NAMES if ours.get("weights") and ours["weights"] == yours.get("weights") else _IGNORED
    for field in sorted({*ours, *yours} - ignored, key=lambda name: (_ORDER.get(name, len(_ORDER)), name)):
        mine, theirs = ours.get(field), yours.get(field)
        if _same(mine, theirs):
            continue
        if field == "tp_size" and _bridged(mine, theirs, ours.get("kv_heads")):
            continue
        if field in _BY_FIELD and isinstance(mine, str) and isinstance(theirs, str):
            found = difference(mine, theirs)
            if found is None:
                continue
            name, mine, theirs = found
            field = f"{field}.{name}" if name else field
        return Mismatch(plain(field, MAX_FIELD), _shown(mine), _shown(theirs))
    return None


def plain(text: str, limit: int) -> str:
    """``text`` on one line of at most ``limit`` characters: safe to log even if an untrusted peer wrote it."""
    line = "".join(char if char.isprintable() else "?" for char in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _same(mine: FingerprintValue | None, theirs: FingerprintValue | None) -> bool:
    return type(mine) is type(theirs) and mine == theirs  # True is not 1 here


def _bridged(mine: FingerprintValue | None, theirs: FingerprintValue | None, heads: FingerprintValue | None) -> bool:
    """Whether ``tp_size`` may differ: each rank must hold equally many whole heads, or a replica of one head."""
    counts = [_number(each) for each in heads.split("/")] if isinstance(heads, str) else [_count(heads)]
    sizes = [_count(size) for size in (mine, theirs)]
    if 0 in (*counts, *sizes):
        return False
    return all(count % size == 0 or size % count == 0 for count in counts for size in sizes)


def _count(value: FingerprintValue | None) -> int:
    """``value`` if it is a number above 0, else 0."""
    return max(value, 0) if isinstance(value, int) and not isinstance(value, bool) else 0


def _number(text: str) -> int:
    """The number that a peer wrote for one of several cache groups; 0 if it is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


def _shown(value: object) -> str:
    return MISSING if value is None else plain(str(value), MAX_SHOWN) or '""'
