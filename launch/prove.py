"""Proves that a running topology is disaggregated and correct: same tokens as without, and pages were transferred.

Every golden prompt begins with a unique line, so that no cache holds it. The plain answer is requested with its own
cache salt, so that decode computes it instead of reusing the pages under test.

All tokens must be equal, with one exception, which is reported. Partial sums are rounded in a different order if
tensor-parallel sizes differ, or if the last prompt token is computed alone. So the first token that differs may be one
that the plain server itself considers almost equally likely. Such a tie is tried again with another prompt. It is
accepted only if log-probabilities agree up to that token: wrong page contents change them by far more.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from pdtransport.errors import PDTransportError
from pdtransport.launch import web, workers
from pdtransport.launch.plan import Instance, Plan
from pdtransport.launch.topology import Topology

TIE_NATS = 0.25  # reordered bfloat16 sums move log-probabilities by less; a wrong page moves them by nats
TIE_TRIES = 3  # prompts tried to get one without a tie
TOP = 5  # log-probabilities requested per token
MAX_PROMPTS = 8  # with more instances, the proof does not visit each
GOLDEN_PROMPT = '''"""Word frequencies of text files."""

import argparse
import collections
import re
import sys


def words(text):
    """Yield the words of text in lower case."""
    for match in re.finditer(r"[a-z']+", text.lower()):
        yield match.group()


def count(paths):
    """Count the words of all files in paths; "-" is standard input."""
    counter = collections.Counter()
    for path in paths:
        if path == "-":
            counter.update(words(sys.stdin.read()))
            continue
        with open(path, encoding="utf-8") as file:
            counter.update(words(file.read()))
    return counter


def show(counter, number, minimum):
    """Print the most common words, each with its count."""
    for word, times in counter.most_common(number):
        if times >= minimum:
            print(f"{times:8d} {word}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", default=["-"], help="files to read")
    parser.add_argument("-n", "--number", type=int, default=10, help="how many words to print")
    parser.add_argument(
'''


class ProofError(PDTransportError):
    """The service answers, but not as a disaggregated service must; the text says what is wrong."""


@dataclass(frozen=True)
class Crossing:
    """The result of one golden prompt."""

    transfer_id: str
    prefill: str
    decode: str
    prompt_tokens: int
    tokens: int  # number of equal tokens
    # None: all tokens are equal. Otherwise the next token is a tie of this many nats, and what follows is not compared.
    tie: float | None
    bytes: int
    pages: int
    seconds: float | None  # from decode's first batch to its last verified page
    link: str
    why: str
    bandwidth_bytes_s: float | None  # of the link while bytes move, measured by decode's worker

    def line(self) -> str:
        tie = f" (then a tie: {self.tie:.2f} nats apart)" if self.tie is not None else ""
        moved = f" in {self.seconds * 1e3:.1f} ms" if self.seconds else ""
        return (
            f"{self.prefill} -> {self.decode}: {self.tokens} tokens equal{tie}; {self.pages} pages, "
            f"{workers.size(self.bytes)}{moved} over {self.link}, {workers.rate(self.bandwidth_bytes_s)} ({self.why})"
        )


@dataclass(frozen=True)
class Proof:
    crossings: tuple[Crossing, ...]

    def public(self) -> dict[str, Any]:
        return {"crossings": [asdict(crossing) for crossing in self.crossings]}


def prove(topology: Topology, plan: Plan, say: Callable[[str], None], check: Callable[[], None]) -> Proof:
    """Send golden prompts, enough for each instance to get one if requests are distributed in turn.

    ``check`` is called between steps; it raises if a process died.

    Raises:
        ProofError: tokens differ, or no page was transferred.
    """
    crossings = []
    for _ in range(min(max(len(plan.of("prefill")), len(plan.of("decode"))), MAX_PROMPTS)):
        for _ in range(TIE_TRIES):
            check()
            try:
                crossing = _one(topology, plan)
            except (web.WebError, workers.WorkerError) as error:
                check()  # if a process died, report that instead
                raise ProofError(f"the golden prompt failed: {error}") from None
            if crossing.tie is None:
                break
        crossings.append(crossing)
        say(f"proved: {crossing.line()}")
    return Proof(tuple(crossings))


def _one(topology: Topology, plan: Plan) -> Crossing:
    text = topology.preflight.prompt or GOLDEN_PROMPT
    body = {
        "model": plan.served_name,
        "prompt": f"# {secrets.token_hex(16)}\n{text}",
        "max_tokens": topology.preflight.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "logprobs": TOP,
    }
    timeout_s = topology.preflight.timeout_s
    decoders = plan.of("decode")
    before = {one.name: workers.received(_statuses(topology, one)) for one in decoders}
    keys = topology.router.client_keys()
    answer = web.post(f"{plan.router.url}/v1/completions", body, timeout_s, _bearer(keys[0].key if keys else None))
    disaggregated = _choice(answer, "the router")
    decode = _named(decoders, answer.headers.get("x-pd-decode", ""), "decode")
    statuses = _statuses(topology, decode, answer.headers.get("x-pd-transfer-id", ""))
    total, seen = workers.received(statuses), before[decode.name]
    crossing = _crossing(plan, decode, answer, statuses, (total[0] - seen[0], total[1] - seen[1]))
    plain = web.post(
        f"{decode.url}/v1/completions",
        {**body, "cache_salt": secrets.token_hex(16)},
        timeout_s,
        _bearer(topology.router.server_key()),
    )
    return _compared(disaggregated, _choice(plain, decode.name), crossing)


def _statuses(topology: Topology, instance: Instance, transfer: str = "") -> list[dict[str, Any]]:
    control = topology.transport.control
    return [workers.ask((instance.control_host, port), control, transfer) for port in instance.control_ports]


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _choice(answer: web.HttpAnswer, who: str) -> dict[str, Any]:
    if answer.status != 200:
        error = answer.body.get("error", answer.body) if isinstance(answer.body, dict) else answer.body
        message = error.get("message", error) if isinstance(error, dict) else error
        raise ProofError(f"the golden prompt failed: {who} answered {answer.status}: {str(message)[:500]}")
    try:
        choice: dict[str, Any] = answer.body["choices"][0]
        top = (choice.get("logprobs") or {}).get("top_logprobs") or []
        return {"text": choice["text"], "token_ids": list(choice["token_ids"]), "top": top}
    except (KeyError, IndexError, TypeError):
        raise ProofError(f"the golden prompt failed: the answer of {who} holds no token ids") from None


def _named(instances: Iterable[Instance], name: str, role: str) -> Instance:
    """The instance that the router calls ``name``: its own name, or host and port of its URL."""
    found = next((one for one in instances if name in {one.name, urlsplit(one.url).netloc}), None)
    if found is None:
        raise ProofError(
            f"the router's answer does not say which {role} server it came from: check that it is pdrouter"
        )
    return found


def _crossing(
    plan: Plan, decode: Instance, answer: web.HttpAnswer, statuses: list[dict[str, Any]], received: tuple[int, int]
) -> Crossing:
    """Build the result; ``received`` is the bytes and pages that the decode instance received meanwhile."""
    transfer_id = answer.headers.get("x-pd-transfer-id", "")
    records = [
        record
        for status in statuses
        for record in status.get("transfers", ())
        if record.get("transfer") == transfer_id and record.get("role") != "producer"
    ]
    if min(received) <= 0:
        raise ProofError(f"no page was transferred: requests are not disaggregated because {_why_not(answer, records)}")
    prefill = _named(plan.of("prefill"), answer.headers.get("x-pd-prefill", ""), "prefill")
    peers = [peer for status in statuses for peer in status.get("peers", ()) if peer.get("engine") == prefill.engine_id]
    peer: dict[str, Any] = peers[0] if peers else {}
    return Crossing(
        transfer_id=transfer_id,
        prefill=prefill.name,
        decode=decode.name,
        prompt_tokens=answer.body["usage"]["prompt_tokens"],
        tokens=0,
        tie=None,
        bytes=received[0],
        pages=received[1],
        seconds=_seconds(records),
        link=str(peer.get("link") or "an unnamed link"),
        why=str(peer.get("why") or "no reason given"),
        bandwidth_bytes_s=peer.get("bandwidth_bytes_s"),
    )


def _why_not(answer: web.HttpAnswer, records: list[dict[str, Any]]) -> str:
    for record in records:
        if record.get("reason"):
            return f"the transfer ended as {record.get('code') or record.get('state')}: {record['reason']}"
    path, _, why = answer.headers.get("x-pd-path", "").partition("; ")
    if why:
        return f"the router says: {why}"
    if path == "disaggregated":
        return "decode asked for no pages; if the prompt is shorter than one KV page, set preflight.prompt"
    return "the answer does not say why; check that this port is pdrouter's"


def _seconds(records: list[dict[str, Any]]) -> float | None:
    """The longest time from a worker's first batch to its last verified page."""
    spans = []
    for record in records:
        events = record.get("events", {})
        end = events.get("verified", events.get("last_batch"))
        if end is not None and "first_batch" in events:
            spans.append(end - events["first_batch"])
    return max(spans) if spans else None


def _compared(disaggregated: dict[str, Any], plain: dict[str, Any], crossing: Crossing) -> Crossing:
    """``crossing`` with the number of equal tokens.

    Raises:
        ProofError: the answers differ by more than a tie.
    """
    ours, theirs = disaggregated["token_ids"], plain["token_ids"]
    if not ours:
        raise ProofError("the golden prompt failed: the answer holds no tokens (see preflight.max_tokens)")
    if ours == theirs:
        return replace(crossing, tokens=len(ours))
    at = next((n for n, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), None)
    drift = None
    if at is not None:
        gap = _gap(plain["top"], at, ours[at], theirs[at])
        drift = _drift(disaggregated["top"], plain["top"], at)
        if max(gap, drift) < TIE_NATS:
            return replace(crossing, tokens=at, tie=gap)
    way = f"{crossing.prefill} -> {crossing.decode} (transfer {crossing.transfer_id})"
    told = f" at token {at}, and log-probabilities by {drift:.2f} nats" if drift is not None else " in its length"
    raise ProofError(
        f"{way}: the disaggregated answer differs from the plain one{told}.\n"
        f"  disaggregated: {_short(disaggregated)}\n  plain:         {_short(plain)}"
    )


def _gap(top: list[dict[str, float]], at: int, ours: int, theirs: int) -> float:
    """How much the plain server prefers its own token to ours, in nats; infinite if one is not in its top list."""
    likely = top[at] if at < len(top) else {}
    names = [f"token_id:{token}" for token in (ours, theirs)]
    return abs(likely[names[1]] - likely[names[0]]) if all(name in likely for name in names) else math.inf


def _drift(ours: list[dict[str, float]], theirs: list[dict[str, float]], at: int) -> float:
    """The largest difference of log-probabilities up to token ``at``, over the tokens that are in both top lists."""
    if min(len(ours), len(theirs)) <= at:
        return math.inf
    pairs = zip(ours[: at + 1], theirs[: at + 1], strict=True)
    shared = [abs(one[name] - other[name]) for one, other in pairs for name in one.keys() & other.keys()]
    return max(shared, default=math.inf)


def _short(choice: dict[str, Any]) -> str:
    return f"{choice['text']!r:.200} {choice['token_ids']!s:.300}"
