"""Servers that do not fit together refuse each other by name of what differs, and each serves on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import watch
from tests.rig.cases import handed_over, plainly
from tests.rig.client import Client, RequestFailed, hand_off
from tests.rig.device import PLACE
from tests.rig.fixtures import Book, Servers, forget, pair_spec
from tests.rig.proof import crossed, record_of
from tests.rig.router import routed
from tests.rig.servers import Server, fleet

OTHERS: dict[str, dict[str, Any]] = {
    "block_size": {"block_size": 64},
    "dtype": {"dtype": "bfloat16" if PLACE.single else "float32"},
}


@pytest.fixture(scope="module")
def others(servers: Servers, logs: Path) -> Iterator[dict[str, Server]]:
    """Servers of both roles, each differing from the rest in one respect; what can't be loaded they compute."""
    specs = [
        pair_spec(f"other-{name}", "kv_both", cores=str(core), load_failure_policy="recompute", **more)
        for core, (name, more) in enumerate(OTHERS.items())
    ]
    with fleet(*specs, logs=logs) as started:
        yield dict(zip(OTHERS, started, strict=True))


@pytest.mark.parametrize("field", list(OTHERS))
def test_decode_that_may_recompute_answers_and_says_why(
    field: str, others: dict[str, Server], servers: Servers, book: Book, with_client: Any
) -> None:
    """Policy recompute: the request gets its answer, the transfer is refused, naming the field."""
    decode = others[field]

    async def scenario(client: Client) -> None:
        for case in book.spare[20:23]:
            handed = await hand_off(client, servers.prefill, decode, case.prompt, len(case.tokens))
            if field != "dtype":  # another dtype has another opinion
                assert tuple(handed.tokens) == case.tokens
            assert len(handed.tokens) == len(case.tokens)
            record = await record_of(decode, handed.transfer, "consumer")
            assert record["code"] == "refused", record
            assert field in record["reason"], record

    with_client(scenario)
    assert field in decode.log.read_text(errors="replace")


@pytest.mark.parametrize("field", list(OTHERS))
def test_decode_that_may_not_recompute_fails_the_request(
    field: str, others: dict[str, Server], servers: Servers, book: Book, with_client: Any
) -> None:
    """Policy fail: the request fails, the transfer is refused, naming the field; others are handed over."""
    prefill = others[field]

    async def scenario(client: Client) -> None:
        await forget(client, servers.decode)
        transfer = f"mismatch-{field}"
        with pytest.raises(RequestFailed):
            await hand_off(client, prefill, servers.decode, book.spare[23].prompt, 4, transfer=transfer)
        record = await record_of(servers.decode, transfer, "consumer")
        assert record["code"] == "refused", record
        assert field in record["reason"], record
        some = book.spare[24:28]
        handed = await handed_over(client, some, lambda _: servers.prefill, servers.decode, "concurrent")
        await crossed(some, handed, [servers.prefill], servers.decode)

    with_client(scenario)


def test_the_router_says_that_every_prompt_is_computed_twice(
    others: dict[str, Server], servers: Servers, book: Book, with_client: Any, logs: Path
) -> None:
    """Promise 5: from the first answer on its header says so; then a counter by reason, one warning, and /health."""
    decode = others["block_size"]

    async def scenario(client: Client) -> None:
        await forget(client, servers.prefill, decode)
        more = ("--hand-off-warn-after", "3", "--hand-off-wait-s", "5")  # decode's word may be late on a busy machine
        with routed([servers.prefill], [decode], logs, "concurrent", *more) as router:
            for case in book.spare[28:32]:
                answer = await client.complete(router.url, case.prompt, len(case.tokens), stream=True)
                assert tuple(answer.tokens) == case.tokens
                path = answer.headers["x-pd-path"]
                assert path.startswith("recomputed; refused: "), path
                assert "block_size" in path
            metrics = await client.get_text(f"{router.url}/metrics")
            assert watch.metric(metrics, "pdrouter_hand_offs_total", outcome="failed", code="refused") == 4
            health = router.get_json("/health")  # 200: completions are answered
            assert health["disaggregates"] is False
            assert health["why_not"] == "refused"
            assert "block_size" in router.get_json("/pd/status")["why_not"]
            warnings = [line for line in router.log.read_text().splitlines() if "was handed over" in line]
            assert len(warnings) == 1, warnings
            assert "block_size" in warnings[0]
        await watch.settled(client, [decode, servers.prefill])

    with_client(scenario)


def test_each_serves_on_and_holds_nothing(
    others: dict[str, Server], servers: Servers, book: Book, with_client: Any
) -> None:
    """After all refusals every server still answers plain requests, and once prefill has held its pages in vain for
    ``hold_s`` nothing is held anywhere."""

    async def scenario(client: Client) -> None:
        await watch.settled(client, [*others.values(), *servers.all])
        await plainly(client, others["block_size"], book.spare[:4])
        for server in (others["dtype"], *servers.all):
            server.must_live()

    with_client(scenario)
