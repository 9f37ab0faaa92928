"""Models whose cache is not that of full attention: refused at start with our reason, or handed over as far as they can
be, and computed once beyond."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.client import Client, hand_off
from tests.rig.fixtures import forget, pair_spec
from tests.rig.odd_models import GRANITE_HYBRID, MAMBA2, with_window, without_weights
from tests.rig.prompts import Prompts
from tests.rig.proof import record_of
from tests.rig.servers import Server, ServerFailed, fleet, start

WINDOW = 64
STATES = {"Mamba2ForCausalLM": MAMBA2, "GraniteMoeHybridForCausalLM": GRANITE_HYBRID}


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=pytest.mark.long) for each in ("Mamba2ForCausalLM", "GraniteMoeHybridForCausalLM")],
)
def test_a_model_with_a_state_is_refused_at_start(architecture: str, logs: Path, tmp_path: Path) -> None:
    """Pure state-space or hybrid: one line of ours names the model, what it keeps, and what to do; the server ends."""
    model = without_weights(tmp_path / "model", STATES[architecture])
    spec = pair_spec(
        architecture.lower(),
        "kv_both",
        model=model,
        load_format="dummy",
        load_failure_policy="recompute",
        block_size=128,
    )
    with pytest.raises(ServerFailed, match=r"ended with status [^0]"):
        start([spec], logs)
    (log,) = logs.glob(f"{spec.name}-*.log")
    said = [line for line in log.read_text(errors="replace").splitlines() if "SettingsError: " in line]
    assert said
    for line in said:
        assert f"pdtransport can't hand over the cache of {architecture}" in line
        assert "--kv-transfer-config" in line


@pytest.fixture(scope="module")
def windowed(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Prefill and decode of a model all of whose layers have a window."""
    model = with_window(tmp_path_factory.mktemp("window") / "model", WINDOW)
    specs = [
        pair_spec("window-prefill", "kv_producer", cores="0", model=model, kv_cache_bytes=64 << 20),
        pair_spec(
            "window-decode", "kv_consumer", cores="1", model=model, kv_cache_bytes=64 << 20, load_failure_policy="fail"
        ),
    ]
    with fleet(*specs, logs=logs) as (prefill, decode):
        yield prefill, decode


def test_prompts_within_the_window_are_handed_over_and_longer_ones_computed_once(
    windowed: tuple[Server, Server], with_client: Any
) -> None:
    """Within: the pages come from prefill. Beyond: decode computes alone without waiting, and without a failed transfer
    (its policy would fail the request), prefill computes a token and says why. All answers are decode's own."""
    prefill, decode = windowed
    prompts = Prompts(7)
    lengths = (20, 33, WINDOW - 1, WINDOW, WINDOW + 1, 100, 300)

    async def scenario(client: Client) -> None:
        for tokens in lengths:
            prompt = prompts.one(tokens)
            alone = await client.complete(decode, prompt, 8, return_token_ids=True)
            await forget(client, decode)
            for order in ("concurrent", "serial"):
                before = [await watch.engine_state(client, server) for server in windowed]
                handed = await hand_off(client, prefill, decode, prompt, 8, order)
                after = [await watch.engine_state(client, server) for server in windowed]
                assert handed.tokens == alone.tokens, (tokens, order)
                assert handed.prefill is not None
                if tokens <= WINDOW:
                    record = await record_of(decode, handed.transfer, "consumer")
                    assert (record["state"], record["code"]) == ("ready", ""), record
                    assert after[1].external_tokens - before[1].external_tokens >= tokens - 1
                else:
                    assert handed.prefill.kv_params["not_handed_over"] == "beyond_window"
                    assert not await record_of(prefill, handed.transfer, "producer")
                    assert [b.computed_tokens - a.computed_tokens for a, b in zip(before, after, strict=True)] == [
                        1,
                        tokens,
                    ]
                await forget(client, prefill, decode)

    with_client(scenario)
    assert f"prompts of more than {WINDOW} tokens are not handed over" in decode.log.read_text(errors="replace")
    assert f"prompts of more than {WINDOW} tokens are not handed over" in prefill.log.read_text(errors="replace")
