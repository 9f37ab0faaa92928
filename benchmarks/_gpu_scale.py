"""What the GPU benchmarks run: an 8B-shaped model with dummy weights, prefill and decode side by side on one GPU, or on
one each.

Dummy weights make times, not answers: the KV that moves has the size and the layout of the real model's. ``REHEARSAL``
is the same with a small model on CPU cores, to try a benchmark where there is no GPU.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.rig.device import Device, seated
from tests.rig.servers import TINY_LM, Connector, KVRole, ServerSpec

Mode = Literal["eager", "graphs"]
GIB = 1 << 30


@dataclass(frozen=True)
class Scale:
    """A model's shape and what servers of it get.

    Args:
        kv_bytes: KV cache of each server.
        kv_token_bytes: KV of one token over all layers.
        lengths: prompt lengths that are measured unless others are asked for.
        max_len: longest prompt and answer together, in tokens.
        start_s: what servers get to come up, together.
        idle_s: pause before each measured request; vLLM's workers on the CPU spin for a second after a step.
    """

    device: Device
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    block_size: int
    kv_bytes: int
    lengths: tuple[int, ...]
    max_len: int
    max_num_seqs: int
    idle_s: float
    start_s: float
    window: int = 0  # three of four layers attend to so many tokens only; 0: all layers attend to all

    @property
    def kv_token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * 2

    @property
    def kv_tokens(self) -> int:
        """Tokens that a server's KV cache holds."""
        return self.kv_bytes // self.kv_token_bytes

    @property
    def modes(self) -> tuple[Mode, ...]:
        return ("eager", "graphs") if self.device == "cuda" else ("eager",)

    def write_model(self, folder: Path) -> Path:
        """Write what ``--load-format dummy`` reads: the model's ``config.json``, and tiny-lm's tokenizer, without which
        no text of a first token can be passed on."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.window:
            kinds = ["sliding_attention"] * 3 + ["full_attention"]
            config |= {"sliding_window": self.window, "layer_types": kinds * (self.layers // 4)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY_LM / name, folder)
        return folder

    def prompt(self, length: int, dice: random.Random) -> list[int]:
        """Random token ids, so that no two prompts share a block."""
        return [dice.randrange(3, self.vocabulary) for _ in range(length)]

    def spec(
        self,
        name: str,
        model: Path,
        mode: Mode,
        connector: Connector = "none",
        role: KVRole = "kv_both",
        settings: Mapping[str, Any] | None = None,
        cores: str = "0",
        cards: tuple[int, ...] = (),
    ) -> ServerSpec:
        """A server of this scale. ``settings``: pdtransport's own; ``cards``: GPUs that it sees, its own first."""
        return ServerSpec(
            name,
            connector=connector,
            kv_role=role,
            cores=cores,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_len,
            max_batched_tokens=None,
            kv_cache_bytes=self.kv_bytes,
            load_failure_policy="fail" if connector == "pdtransport" else None,
            extra_config=settings or {},
            model=model,
            load_format="dummy",
            device=self.device,
            eager=mode == "eager",
            cards=cards,
        )

    def pair(
        self,
        connector: Connector,
        model: Path,
        mode: Mode,
        settings: Mapping[str, Any] | None = None,
        cards: Sequence[int] = (),
    ) -> tuple[ServerSpec, ServerSpec]:
        """A prefill and a decode server: on the first and the second of ``cards``, or both on what is visible."""
        ours = connector == "pdtransport"
        roles: tuple[KVRole, KVRole] = ("kv_producer", "kv_consumer") if ours else ("kv_both", "kv_both")
        return (
            self.spec(f"{connector}-p", model, mode, connector, roles[0], settings, "0", seated(cards, 0)),
            self.spec(f"{connector}-d", model, mode, connector, roles[1], settings, "1", seated(cards, 1)),
        )


FULL = Scale(
    device="cuda",
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    intermediate=14336,
    vocabulary=4096,  # tiny-lm's tokenizer has as many
    block_size=16,
    kv_bytes=6 * GIB,  # 49,152 tokens: three of the longest prompts
    lengths=(1024, 4096, 8192, 16000),
    max_len=17000,
    max_num_seqs=8,
    idle_s=0.1,
    start_s=240.0,  # 160 with CUDA graphs, a little more where five start together
)
REHEARSAL = Scale(
    device="cpu",
    hidden=256,
    layers=4,
    heads=8,
    kv_heads=4,
    intermediate=512,
    vocabulary=4096,
    block_size=32,
    kv_bytes=GIB // 64,
    lengths=(64, 512),
    max_len=1024,
    max_num_seqs=8,
    idle_s=0.5,
    start_s=500.0,
)
