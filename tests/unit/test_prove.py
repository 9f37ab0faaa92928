"""The proof that `pdlaunch up` asks for: it must fail where it should. The servers here are small HTTP servers that
answer what a case needs; what workers tell is set by the case."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pdtransport.launch import prove, waterfall, web, workers
from pdtransport.launch.plan import Plan, Ports, make_plan
from pdtransport.launch.reading import load
from pdtransport.launch.topology import Topology

# Another run of these tests may be under way.
FIRST = 21280 + 10 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
ROUTER, PREFILL, DECODE = FIRST, FIRST + 1, FIRST + 2
TRANSFER = "t" * 32
TOPOLOGY = f"""\
apiVersion: pdtransport/v1
name: proof
model: {{id: ./model}}
roles:
  prefill: {{port: {PREFILL}, control_port: {FIRST + 3}}}
  decode: {{port: {DECODE}, control_port: {FIRST + 4}}}
router: {{port: {ROUTER}}}
preflight: {{max_tokens: 3, timeout_s: 5}}
"""


class Case:
    """What the servers answer, what the workers tell, and what they were asked."""

    def __init__(self) -> None:
        self.tokens = {ROUTER: [1, 2, 3], DECODE: [1, 2, 3]}
        self.likely: dict[int, list[dict[int, float]]] = {ROUTER: [], DECODE: []}  # by token, at each position
        self.path = "disaggregated"
        self.status = 200
        self.record: dict[str, Any] = {
            "transfer": TRANSFER, "role": "consumer", "state": "ready", "code": "", "reason": "", "blocks": 9,
            "bytes": 9000, "link": "cma", "events": {"first_batch": 5.0, "last_batch": 5.1, "verified": 5.25},
        }  # fmt: skip
        self.crossed = 9000
        self.asked: dict[int, list[dict[str, Any]]] = {ROUTER: [], DECODE: []}

    def ask(self, address: workers.Address, control: Any, transfer: str = "", timeout_s: float = 0) -> dict[str, Any]:
        done = len(self.asked[ROUTER])
        peer = {"engine": "proof-prefill-0", "rank": 0, "link": "cma", "why": "same host", "bandwidth_bytes_s": 2e9}
        return {
            "counters": {"bytes_received": self.crossed * done, "blocks_received": 9 * done},
            "peers": [peer],
            "transfers": [self.record] if done else [],
        }


def server(port: int, case: Case) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            case.asked[port].append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            ids = case.tokens[port]
            top = [{f"token_id:{token}": value for token, value in at.items()} for at in case.likely[port]]
            choice = {
                "index": 0, "text": " ".join(map(str, ids)), "token_ids": ids, "logprobs": {"top_logprobs": top}
            }  # fmt: skip
            answer: dict[str, Any] = {
                "choices": [choice],
                "usage": {"prompt_tokens": 288, "completion_tokens": len(ids)},
            }
            if case.status != 200:
                answer = {"error": {"message": "no decode server is up", "type": "server_error"}}
            body = json.dumps(answer).encode()
            self.send_response(case.status)
            if port == ROUTER:
                self.send_header("x-pd-transfer-id", TRANSFER)
                self.send_header("x-pd-path", case.path)
                self.send_header("x-pd-decode", f"127.0.0.1:{DECODE}")
                self.send_header("x-pd-prefill", f"127.0.0.1:{PREFILL}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
    return made


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    made = Case()
    servers = [server(port, made) for port in (ROUTER, DECODE)]
    monkeypatch.setattr(workers, "ask", made.ask)
    yield made
    for one in servers:
        one.shutdown()
        one.server_close()


@pytest.fixture
def topology(tmp_path: Path) -> tuple[Topology, Plan]:
    path = tmp_path / "t.yaml"
    path.write_text(TOPOLOGY)
    loaded = load(path)[0]
    return loaded, make_plan(loaded, tmp_path, ports=Ports(FIRST + 5, FIRST + 9))


def proved(topology: tuple[Topology, Plan]) -> prove.Proof:
    return prove.prove(*topology, lambda text: None, lambda: None)


def test_a_proof_names_what_crossed(case: Case, topology: tuple[Topology, Plan]) -> None:
    """Equal tokens and pages that crossed: the line tells pair, pages, bytes, link, why, rate."""
    [crossing] = proved(topology).crossings
    assert crossing.line() == (
        "prefill-0 -> decode-0: 3 tokens equal; 9 pages, 9.0 kB in 250.0 ms over cma, 2.0 GB/s (same host)"
    )
    [through], [plain] = case.asked[ROUTER], case.asked[DECODE]
    assert plain.pop("cache_salt")  # else decode would answer from the very pages that are in question
    assert plain == through
    assert "kv_transfer_params" not in plain


def test_golden_prompts_are_cold(case: Case, topology: tuple[Topology, Plan]) -> None:
    """No two proofs send the same first page: a prefix cache can't stand in for a transfer."""
    proved(topology)
    proved_before = len(case.asked[ROUTER])
    case.asked[ROUTER], first = [], case.asked[ROUTER]
    proved(topology)
    starts = {asked["prompt"].splitlines()[0] for asked in first + case.asked[ROUTER]}
    assert len(starts) == proved_before + 1


def test_other_tokens_fail_the_proof(case: Case, topology: tuple[Topology, Plan]) -> None:
    """One token that differs fails the proof, and both answers are shown."""
    case.tokens[ROUTER] = [1, 2, 4]
    with pytest.raises(prove.ProofError, match=r"(?s)differs from the plain one.*\[1, 2, 4\].*\[1, 2, 3\]"):
        proved(topology)


def test_a_tie_is_tried_again_and_shown(case: Case, topology: tuple[Topology, Plan]) -> None:
    """Two equally likely tokens may swap where sums are rounded in another order: that is tried again, and said."""
    case.tokens[ROUTER] = [1, 9, 4]
    case.likely = {ROUTER: [{1: -0.1}, {9: -0.69, 2: -0.7}], DECODE: [{1: -0.12}, {2: -0.69, 9: -0.71}]}
    [crossing] = proved(topology).crossings
    assert len(case.asked[ROUTER]) == prove.TIE_TRIES
    assert (crossing.tokens, round(crossing.tie or 0, 2)) == (1, 0.02)
    assert "1 tokens equal (then a tie: 0.02 nats apart)" in crossing.line()


@pytest.mark.parametrize(
    "likely",
    [
        {ROUTER: [{1: -0.1}, {9: -0.1, 2: -2.5}], DECODE: [{1: -0.1}, {2: -0.69, 9: -0.71}]},  # moved at the tie
        {ROUTER: [{1: -1.1}, {9: -0.7, 2: -0.7}], DECODE: [{1: -0.1}, {2: -0.69, 9: -0.71}]},  # moved before it
        {ROUTER: [{1: -0.1}, {9: -0.1, 2: -2.5}], DECODE: [{1: -0.1}, {2: -0.1, 9: -2.5}]},  # no tie at all
        {ROUTER: [{1: -0.1}, {9: -0.1}], DECODE: [{1: -0.1}, {2: -0.1}]},  # not even likely
        {ROUTER: [], DECODE: []},
    ],
)
def test_what_is_no_tie_fails_at_once(case: Case, topology: tuple[Topology, Plan], likely: Any) -> None:
    """Wrong pages move log-probabilities: such a difference is no tie, and is not tried again."""
    case.tokens[ROUTER], case.likely = [1, 9, 4], likely
    with pytest.raises(prove.ProofError, match="differs from the plain one at token 1"):
        proved(topology)
    assert len(case.asked[ROUTER]) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"path": "decode-only; no prefill server is healthy"}, "the router says: no prefill server is healthy"),
        (
            {"record": {"transfer": TRANSFER, "code": "link", "reason": "cma: no permission"}},
            "link: cma: no permission",
        ),
        ({"record": {}}, "decode asked for no pages"),
        ({"record": {}, "path": ""}, "check that this port is pdrouter's"),
    ],
)
def test_equal_tokens_without_pages_fail_the_proof(
    case: Case, topology: tuple[Topology, Plan], change: dict[str, Any], why: str
) -> None:
    """Equal tokens are not enough: if no page crossed, decode computed all itself, and the reason is told."""
    case.crossed = 0
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(
        prove.ProofError, match="no page was transferred: requests are not disaggregated because"
    ) as caught:
        proved(topology)
    assert why in str(caught.value)


def test_an_error_of_the_router_fails_the_proof(case: Case, topology: tuple[Topology, Plan]) -> None:
    """An error answer is passed on in its own words."""
    case.status = 503
    with pytest.raises(prove.ProofError, match="the router answered 503: no decode server is up"):
        proved(topology)


def test_silence_fails_the_proof(topology: tuple[Topology, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that is not there fails the proof; it does not hang it."""
    monkeypatch.setattr(workers, "ask", Case().ask)
    with pytest.raises(prove.ProofError, match=rf"the golden prompt failed: http://127\.0\.0\.1:{ROUTER}"):
        proved(topology)


def test_a_stream_that_breaks_off_is_an_error(case: Case) -> None:
    """A stream without its [DONE] counts as failed, not as a short answer."""
    _, events = web.stream(f"http://127.0.0.1:{ROUTER}/v1/completions", {}, 5)
    with pytest.raises(web.WebError, match="ended early"):
        list(events)


TRACE = {
    "at": 100.0,
    "events": {"dispatched": 0.002, "first_token": 0.09},
    "why_not_disaggregated": None,
    "workers": {
        "decode": {
            "ranks": [
                {"transfers": [{"bytes": 4096, "blocks": 1, "skipped_blocks": 2, "link": "ucx",
                                "events": {"first_batch": 100.03, "last_batch": 100.05, "verified": 100.06}}]},
                {"transfers": [{"bytes": 4096, "blocks": 1, "link": "ucx",
                                "events": {"first_batch": 100.02, "last_batch": 100.04, "verified": 100.07}}]},
                None,
            ]
        }
    },
}  # fmt: skip


def test_a_waterfall_accounts_for_all_of_the_time() -> None:
    """The stretches follow each other without gaps, over all ranks, and add up to the whole."""
    passed = waterfall.milestones(TRACE, 0.1)
    expected = {"dispatched": 0.002, "first_batch": 0.02, "last_batch": 0.05, "verified": 0.07, "first_token": 0.09}
    assert {name: round(passed[name], 6) for name in expected} == expected
    lengths = [float(line.rpartition("|")[2].split()[0]) for line in waterfall.bars(passed)]
    assert lengths == [2.0, 18.0, 30.0, 20.0, 20.0, 10.0]
    assert waterfall.moved(TRACE) == "2 pages, 0.01 MB over ucx, 2 already cached"


def test_a_waterfall_of_a_request_that_was_not_disaggregated() -> None:
    """Without a transfer the reason is told, and the bars still add up."""
    trace = {"at": 1.0, "events": {}, "why_not_disaggregated": "echo returns the prompt", "workers": {}}
    assert waterfall.moved(trace) == "no page was transferred: echo returns the prompt"
    [line] = waterfall.bars(waterfall.milestones(trace, 0.25))
    assert " 250.0 ms" in line


def test_a_waterfall_of_an_early_first_token() -> None:
    """Prefill's first token comes before decode has verified: the stretches stand in the order in which they ended."""
    trace = {**TRACE, "events": {"dispatched": 0.002, "first_token": 0.06}}
    lines = waterfall.bars(waterfall.milestones(trace, 0.1))
    assert [float(line.rpartition("|")[2].split()[0]) for line in lines] == [2.0, 18.0, 40.0, 10.0, 30.0]
    assert lines[2].endswith("prefill computes the rest and answers with the first token")
    assert lines[4].endswith("decode continues from the first token")
