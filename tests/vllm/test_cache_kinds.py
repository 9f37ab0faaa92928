"""Models whose cache is not that of full attention: refused at start with our reason, or handed over by cache group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.client import Client, hand_off
from tests.rig.device import DTYPES, PLACE
from tests.rig.fixtures import forget, pair_spec
from tests.rig.odd_models import GRANITE_HYBRID, MAMBA2, with_mixed_layers, with_window, without_weights
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


@pytest.fixture(scope="module", params=["window", "mixed"])
def servers(
    request: pytest.FixtureRequest, logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """Prefill and decode of a model with a window: in all layers (one cache group), or in most of them (several)."""
    make = {"window": with_window, "mixed": with_mixed_layers}[request.param]
    model = make(tmp_path_factory.mktemp(request.param) / "model", WINDOW)
    facts: dict[str, Any] = {"model": model, "kv_cache_bytes": 64 << 20}
    specs = [
        pair_spec(f"{request.param}-prefill", "kv_producer", cores="0", **facts),
        pair_spec(f"{request.param}-decode", "kv_consumer", cores="1", load_failure_policy="fail", **facts),
    ]
    with fleet(*specs, logs=logs) as (prefill, decode):
        yield prefill, decode


# Around the edges of a block and of the window; then whole windows that are left behind, with and without a rest.
LENGTHS = (20, PLACE.block_size + 1, *range(WINDOW - 1, WINDOW + 4), 2 * WINDOW + 1, 300, 353, 1000)


def test_prompts_of_every_length_are_handed_over_with_what_is_still_attended_to(
    servers: tuple[Server, Server], with_client: Any
) -> None:
    """Decode computes the last token alone, and its answer is the one that it gives without prefill. Its policy would
    fail the request if the transfer failed."""
    prefill, decode = servers
    prompts = Prompts(7)

    async def scenario(client: Client) -> None:
        for tokens in LENGTHS:
            prompt = prompts.one(tokens)
            alone = await client.complete(decode, prompt, 8, return_token_ids=True)
            await forget(client, decode)
            for order in ("concurrent", "serial"):
                before = await watch.engine_state(client, decode)
                handed = await hand_off(client, prefill, decode, prompt, 8, order)
                after = await watch.engine_state(client, decode)
                assert handed.tokens == alone.tokens, (tokens, order)
                record = await record_of(decode, handed.transfer, "consumer")
                assert (record["state"], record["code"]) == ("ready", ""), record
                assert after.external_tokens - before.external_tokens == tokens - 1
                await forget(client, prefill, decode)

    with_client(scenario)


def test_what_lies_behind_the_window_is_not_moved(servers: tuple[Server, Server], with_client: Any) -> None:
    """A prompt of many windows costs its layers with a window no more bytes than one of two windows."""
    prefill, decode = servers
    prompts, moved = Prompts(8), []

    async def scenario(client: Client) -> None:
        for tokens in (4 * WINDOW + 1, 12 * WINDOW + 1):
            handed = await hand_off(client, prefill, decode, prompts.one(tokens), 2, "concurrent")
            record = await record_of(decode, handed.transfer, "consumer")
            moved.append(record["bytes"])
            await forget(client, prefill, decode)

    with_client(scenario)
    layers = 8
    everywhere = 2 if "mixed" in decode.spec.name else 0  # layers that attend to the whole prompt
    token_bytes = 4 * 32 * 2 * DTYPES[PLACE.dtype]  # of one layer: heads, head size, keys and values
    assert moved[1] - moved[0] == 8 * WINDOW * everywhere * token_bytes
    assert moved[0] <= (everywhere * 4 * WINDOW + (layers - everywhere) * (WINDOW + PLACE.block_size)) * token_bytes
