"""Scheduler half of pool use: looks prompts up in the shared pool and decides which pages to load and to store."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pdtransport.engine.commands import LoadChunks, StoreChunks
from pdtransport.errors import PoolUnavailable
from pdtransport.kv.keys import KeySpace, chunk_keys
from pdtransport.pool.client.pool_client import Pending, PoolClient, PrefixFound
from pdtransport.pool.messages import MAX_KEYS, MAX_MANAGED, MAX_SPACE
from pdtransport.settings import PoolUse, Settings
from pdtransport.vllm.pool_events import PoolEvents
from pdtransport.vllm.pool_space import Shard, introduction, salt_of, why_unkeyable

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from pdtransport.vllm.adapter_requests import AdapterRequests

logger = logging.getLogger(__name__)

# How long a lookup may stay unanswered after its request stopped waiting for it. Until that lookup ends, no request
# waits for the pool, since the pool does not answer.
ANSWER_S = 10.0


@dataclass
class _Prompt:
    """A request's whole chunks: those of its prompt, and those that its output completes.

    All counts of chunks start at the prompt's first chunk.
    """

    request: Request
    shards: list[list[KeySpace]]  # by rank: key spaces of its parts, with the salt
    keys: dict[KeySpace, list[bytes]]  # one key for each whole chunk
    tokens: int  # number of prompt tokens
    content: str | None  # digest of its adapter, if it has one
    sought: int = 0  # chunks that were looked up
    lookups: Collection[Pending[PrefixFound]] = ()
    until: float = 0.0  # when the request stops waiting for the lookups
    state: str = "asking"  # -> "found" -> "loading" -> "done"
    there: int = 0  # chunks that the pool holds
    asked_at: int = 0  # value of PoolEvents.now at the lookup
    computed: int = 0  # tokens that the engine had when vLLM last asked for matched tokens
    stored: int = 0  # chunks that are in the pool or being stored
    open: int = 0  # stores that the workers have not reported as done, over all ranks
    stale: bool = False  # its KV belongs to replaced weights: neither store nor load any of it
    kept_out: bool = False  # its KV came from an untrusted producer: store none of it

    @property
    def whole(self) -> int:
        """Number of chunks that have keys."""
        return len(self.keys[self.shards[0][0]])

    def parts(self, first: int, end: int) -> list[tuple[bytes, ...]]:
        """For each of the chunks ``first..end``, the keys of all its parts."""
        spaces = [space for parts in self.shards for space in parts]
        return [tuple(self.keys[space][i] for space in spaces) for i in range(first, end)]

    def cut(self, first: int, end: int) -> list[list[bytes]]:
        """For each rank, the keys of its parts of the chunks ``first..end``, chunk by chunk."""
        return [[self.keys[space][i] for i in range(first, end) for space in parts] for parts in self.shards]


@dataclass
class _HandOff:
    """A finished prompt whose pages prefill holds for decode; they can be freed once the pool has them."""

    keys: list[list[bytes]]  # by key space: keys of its whole chunks
    at: float  # when to look them up
    open: int  # stores that the workers have not reported as done
    lookups: Collection[Pending[PrefixFound]] = ()


class PoolScheduler:
    """Scheduler half of pool use, one per engine. Does nothing until :meth:`start`.

    Args:
        block_size: tokens per scheduler block.
        ranks: tensor-parallel size of this engine.
        clock: monotonic seconds.
        ring: wakes the scheduler when a lookup is answered; called from any thread.
        events: publish the pool's chunks in vLLM's KV events.
        client: a client of the pool to use instead of a new one, for tests.
        settings: the engine's, needed for a pool on another host.
        adapters: adapters of the engine's requests; None: LoRA is off.

    Raises:
        SettingsError: the salt file can't be used.
    """

    def __init__(
        self,
        use: PoolUse,
        *,
        block_size: int,
        ranks: int,
        clock: Callable[[], float],
        ring: Callable[[], None],
        events: bool = False,
        client: PoolClient | None = None,
        settings: Settings | None = None,
        adapters: AdapterRequests | None = None,
    ) -> None:
        self._adapters = adapters
        self._use, self._settings = use.with_salt(), settings or Settings()
        self._block_size, self._ranks = block_size, ranks
        self._chunk = use.chunk_blocks * block_size
        self._generated = use.store and use.generated
        self._clock, self._ring = clock, ring
        self._client = client
        self._shards: list[list[KeySpace]] = []  # by rank
        self._prompts: dict[str, _Prompt] = {}
        self._late: list[Pending[PrefixFound]] = []
        self._unhinted: list[str] = []  # requests that were looked up and for which no hint was sent yet
        self._hand_offs: dict[str, _HandOff] = {}
        self._counts: Counter[str] = Counter()
        self._events: PoolEvents | None = None
        if events:
            self._events = PoolEvents(block_size=block_size, chunk_blocks=use.chunk_blocks, ranks=ranks, clock=clock)

    def start(self, shards: Mapping[int, Shard], served: Sequence[str] = (), tokenizer: str = "") -> None:
        """Start using the pool, if all workers can use it.

        Also describes this engine's keys to the pool, so that users can look prompts up there.

        Args:
            shards: key spaces of each worker's chunks, by rank.
            served: names under which clients ask for the model.
            tokenizer: name of the model's tokenizer.
        """
        if sorted(shards) != list(range(self._ranks)):
            logger.warning("the pool is not used: %d of %d workers can use it", len(shards), self._ranks)
            return
        self._shards = [shards[rank].spaces for rank in range(self._ranks)]
        if self._client is None:
            who = f"vllm-{os.getpid()}-lookup"
            self._client = PoolClient.of(
                self._settings, self._use, deadline_s=ANSWER_S, threads=1, who=who, copies=False
            )
            self._introduce(shards, served, tokenizer)

    def _introduce(self, shards: Mapping[int, Shard], served: Sequence[str], tokenizer: str) -> None:
        assert self._client is not None
        told = introduction([shards[rank] for rank in range(self._ranks)], self._use, served, tokenizer)
        if len(told) <= MAX_SPACE:
            self._client.introduce(told)

    def restart(self, shards: Mapping[int, Shard], served: Sequence[str], tokenizer: str) -> None:
        """Use new keys after a change of weights; current requests are neither stored nor loaded any more."""
        if not self._shards:
            return
        self._hand_offs.clear()
        for req_id in self._prompts:
            self.set_apart(req_id)
        self._shards = []
        self.start(shards, served, tokenizer)
        if self._shards:
            self._introduce(shards, served, tokenizer)

    def set_apart(self, req_id: str) -> None:
        """Neither store nor load anything of this request from now on."""
        prompt = self._prompts.get(req_id)
        if prompt is None:
            return
        prompt.stale = True
        if prompt.state in ("asking", "found"):
            prompt.lookups, prompt.sought, prompt.there, prompt.state = (), 0, 0, "found"

    def keep_out(self, req_id: str) -> None:
        """Store nothing of this request: its pages come from an untrusted producer."""
        prompt = self._prompts.get(req_id)
        if prompt is not None:
            prompt.kept_out = True

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    @property
    def asking(self) -> bool:
        """Whether a request waits for a lookup."""
        return any(prompt.state == "asking" for prompt in self._prompts.values())

    def take_counts(self) -> Counter[str]:
        """Counts of chunks by outcome since the last call."""
        counts, self._counts = self._counts, Counter()
        return counts

    def _count(self, what: str, chunks: int) -> None:
        if chunks > 0:
            self._counts[what] += chunks * sum(map(len, self._shards))

    # -- look up -------------------------------------------------------------------------------------------------

    def arrive(self, request: Request, look_up: bool = True) -> None:
        """Register a new request and look its prompt up at once.

        Args:
            look_up: false if its pages come from prefill.
        """
        whole = request.num_prompt_tokens // self._chunk
        if not self._shards or not (whole or self._generated):
            return
        content = self._content(request)
        if why_unkeyable(request) or content is None:
            self._count("skipped", whole)
            return
        assert request.prompt_token_ids is not None
        salt = salt_of(self._use.salt, request)
        salted = [[replace(space, salt=salt, lora=content) for space in parts] for parts in self._shards]
        keys = {
            space: chunk_keys(space, request.prompt_token_ids, tail=False)
            for space in dict.fromkeys(space for parts in salted for space in parts)
        }
        prompt = _Prompt(request, salted, keys, request.num_prompt_tokens, content or None, state="done")
        self._prompts[request.request_id] = prompt
        if look_up:
            self.ask(request.request_id)

    def _content(self, request: Request) -> str | None:
        """Digest of the request's adapter; empty without one, None until a worker reports what it loaded."""
        if request.lora_request is None:
            return ""
        return self._adapters.content(request) if self._adapters is not None else None

    def ask(self, req_id: str) -> None:
        """Look this prompt up in the pool; :meth:`matched_tokens` returns the result."""
        prompt = self._prompts.get(req_id)
        if prompt is None:
            return
        prompt.state = "asking"
        # The last prompt token is always computed here: its logits give the first output token.
        prompt.sought = min((prompt.tokens - 1) // self._chunk, MAX_KEYS)
        self._late = [late for late in self._late if not late.future.done()]
        if not self._use.load or not prompt.sought or prompt.stale or prompt.request.skip_reading_prefix_cache:
            prompt.sought, prompt.state = 0, "found"
        elif self._late:
            self._give_up(prompt)
        else:
            self._look_up(prompt, [some[: prompt.sought] for some in prompt.keys.values()])

    def _look_up(self, prompt: _Prompt, questions: Iterable[list[bytes]]) -> None:
        assert self._client is not None
        try:
            prompt.lookups = [self._client.lookup(keys) for keys in questions]
        except PoolUnavailable:
            self._give_up(prompt)
            return
        if self._events is not None:
            self._events.watch(self._client)
            prompt.asked_at = self._events.now
        prompt.until = self._clock() + self._use.lookup_s
        for lookup in prompt.lookups:
            lookup.future.add_done_callback(lambda _: self._ring())
        if self._use.hint:
            self._unhinted.append(prompt.request.request_id)

    def hint(self) -> None:
        """Send hints for requests that were looked up and still wait in the queue; call after a step is scheduled.

        While they wait, the pool can bring their chunks from lower tiers into memory.
        """
        unanswered = []
        for req_id in self._unhinted:
            prompt = self._prompts.get(req_id)
            if prompt is None or prompt.state not in ("asking", "found"):
                continue
            if all(lookup.future.done() for lookup in prompt.lookups):
                self._bring_up(prompt)
            else:
                unanswered.append(req_id)
        self._unhinted = unanswered

    def _bring_up(self, prompt: _Prompt) -> None:
        """Send hints for chunks that the engine lacks and the pool holds outside memory. Best effort."""
        if self._client is None or any(lookup.future.exception() for lookup in prompt.lookups):
            return
        found = [lookup.future.result() for lookup in prompt.lookups]
        there = min(each.there for each in found)
        held = prompt.computed // self._chunk  # by the engine; 0 if the scheduler has not reached this request yet
        for keys, each in zip(prompt.keys.values(), found, strict=True):
            for first in range(held, there if each.in_memory < each.there else 0, MAX_MANAGED):
                with suppress(PoolUnavailable):
                    self._client.manage(keys[first : min(first + MAX_MANAGED, there)], "hint")

    def _give_up(self, prompt: _Prompt) -> None:
        self._count("failed", prompt.sought)
        prompt.sought, prompt.state = 0, "found"

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Number of tokens beyond ``computed`` that the pool holds, and whether they load asynchronously.

        The number is None while the lookup is running: vLLM asks again.
        """
        prompt = self._prompts.get(request.request_id)
        if prompt is None or prompt.state in ("loading", "done") or request.num_output_tokens:
            return 0, False
        if prompt.state == "asking" and not self._answered(prompt):
            return None, False
        prompt.computed = computed
        more = max(0, prompt.there * self._chunk - computed)
        return more, more > 0

    def _answered(self, prompt: _Prompt) -> bool:
        """Whether the request can stop waiting: its lookups are answered, failed or timed out."""
        waiting = [lookup for lookup in prompt.lookups if not lookup.future.done()]
        if waiting and self._clock() < prompt.until:
            return False
        if waiting or any(lookup.future.exception() for lookup in prompt.lookups):
            self._late += waiting
            self._give_up(prompt)
        else:
            prompt.there = min(prompt.sought, *(lookup.future.result().there for lookup in prompt.lookups))
            prompt.state = "found"
            if self._events is not None:
                self._events.found(prompt.request, prompt.parts(0, prompt.there), prompt.asked_at)
        return True

    # -- load ----------------------------------------------------------------------------------------------------

    def allocated(self, request: Request, blocks: list[int], external_tokens: int) -> LoadChunks | None:
        """Build the load for a request that got ``blocks``; None if nothing is to be loaded.

        Args:
            external_tokens: tokens that vLLM expects from the pool.
        """
        prompt = self._prompts.get(request.request_id)
        if prompt is None or prompt.state != "found":
            return None
        prompt.stored = prompt.there
        self._count("miss", prompt.sought - max(prompt.there, prompt.computed // self._chunk))
        if not external_tokens:
            prompt.state = "done"
            return None
        prompt.state = "loading"
        held = prompt.there * self._chunk - external_tokens
        first = held // self._chunk
        return LoadChunks(
            request.request_id,
            prompt.cut(first, prompt.there),
            held % self._chunk // self._block_size,
            blocks[held // self._block_size : prompt.there * self._use.chunk_blocks],
            request.lora_request,
            prompt.content,
        )

    def loading(self, req_id: str) -> bool:
        prompt = self._prompts.get(req_id)
        return prompt is not None and prompt.state == "loading"

    def loaded(self, req_id: str, ok: bool) -> None:
        """A load ended; after a failed one the chunks are computed here and stored again."""
        prompt = self._prompts.get(req_id)
        if prompt is not None and prompt.state == "loading":
            prompt.state = "done"
            if not ok:
                prompt.there = prompt.stored = 0

    # -- store ---------------------------------------------------------------------------------------------------

    def progress(self, output: SchedulerOutput, computed: Mapping[str, int]) -> list[StoreChunks]:
        """Stores for the chunks that this step completes.

        Args:
            computed: for each scheduled request, tokens computed before this step.
        """
        found: list[StoreChunks] = []
        if not self._use.store:
            return found
        for req_id, before in computed.items():
            prompt = self._prompts.get(req_id)
            if prompt is None or prompt.state != "done" or prompt.stale or prompt.kept_out:
                continue
            first, end = prompt.stored, min(before + output.num_scheduled_tokens[req_id], prompt.tokens) // self._chunk
            if self._generated and before > prompt.tokens:
                end = max(end, self._lengthen(prompt, before))
            if end <= first:
                continue
            block_state = output.kv_connector_block_state
            ids = block_state.get_block_ids(req_id) if block_state is not None else None
            if ids is None:
                continue
            per = self._use.chunk_blocks
            found.append(
                StoreChunks(req_id, prompt.cut(first, end), list(ids[0][first * per : end * per]), prompt.content)
            )
            if self._events is not None:
                self._events.storing(prompt.request, first, prompt.parts(first, end))
            prompt.stored = end
            prompt.open += self._ranks
        return found

    def _lengthen(self, prompt: _Prompt, computed: int) -> int:
        """Add keys for the output's whole chunks, and return the number of whole chunks that can be stored.

        A chunk can be stored if it was computed before this step and all its tokens are final: the scheduler's
        ``computed`` also includes draft tokens and tokens that are still being sampled.
        """
        end, known = min(computed, prompt.request.num_tokens - 1) // self._chunk, prompt.whole
        if end > known:
            tokens = prompt.request.all_token_ids[known * self._chunk : end * self._chunk]
            for space, keys in prompt.keys.items():
                keys += chunk_keys(space, tokens, tail=False, after=keys[-1] if keys else None)
        return end

    def stored(self, reports: Mapping[bytes, int]) -> None:
        """Record how many more workers stored their parts of a chunk, by the key of the chunk's first part."""
        if self._events is not None:
            self._events.stored(reports)

    def take_events(self) -> list[KVCacheEvent]:
        """KV events for vLLM to publish."""
        if self._events is None or self._client is None:
            return []
        self._events.watch(self._client)
        return self._events.take()

    def kept(self, reports: Mapping[str, int]) -> None:
        """Record how many more stores of each request no longer read its pages."""
        for req_id, count in reports.items():
            of = self._prompts.get(req_id) or self._hand_offs.get(req_id)
            if of is not None:
                of.open -= count

    def preempted(self, req_id: str) -> bool:
        """The request was preempted and this step overwrites its pages; True if stores may still read them."""
        prompt = self._prompts.get(req_id)
        if prompt is None:
            return False
        prompt.stored = prompt.there
        return prompt.open > 0

    def finished(self, req_id: str, hand_off: bool = False) -> bool:
        """Forget the request; True if stores may still read its pages.

        Args:
            hand_off: prefill holds its pages for decode.
        """
        prompt = self._prompts.pop(req_id, None)
        if prompt is None:
            return False
        whole, after = prompt.tokens // self._chunk, self._use.hand_off_s
        if hand_off and not prompt.stale and after is not None and 0 < whole <= MAX_KEYS:
            keys = [some[:whole] for some in prompt.keys.values()]
            self._hand_offs[req_id] = _HandOff(keys, self._clock() + after, prompt.open)
        return prompt.open > 0

    # -- hand over -----------------------------------------------------------------------------------------------

    def freed(self, req_ids: Iterable[str]) -> None:
        """The pages of these requests were freed."""
        for req_id in req_ids:
            self._hand_offs.pop(req_id, None)

    def handed_over(self) -> list[str]:
        """Requests held for decode longer than ``hand_off_s`` whose whole chunks are all in the pool.

        Each request is looked up once and returned at most once.
        """
        found = []
        for req_id, hand_off in list(self._hand_offs.items()):
            if not hand_off.lookups:
                if self._clock() >= hand_off.at and not hand_off.open:
                    self._inquire(req_id, hand_off)
            elif all(lookup.future.done() for lookup in hand_off.lookups):
                del self._hand_offs[req_id]
                there = [
                    0 if lookup.future.exception() else lookup.future.result().there for lookup in hand_off.lookups
                ]
                if min(there) >= len(hand_off.keys[0]):
                    found.append(req_id)
        return found

    def _inquire(self, req_id: str, hand_off: _HandOff) -> None:
        assert self._client is not None
        try:
            hand_off.lookups = [self._client.lookup(keys) for keys in hand_off.keys]
        except PoolUnavailable:
            del self._hand_offs[req_id]
