"""A request's first step begins before its last pages are there, and is held just before its forward pass.

What vLLM does between an arrival and a forward pass (schedule the request, make its state and its inputs) takes 5 ms on
an H100's host, and launching that 2 more, or 26 without CUDA graphs, for which the first token would wait. It is done
while the last pages are on their way; the worker holds the step, or its GPU, until they are verified
(:mod:`pdtransport.engine.holding`). If they fail to come, what was computed from them is thrown away before anybody
looks at it, and the request is computed anew, or fails, as ``kv_load_failure_policy`` says. If they come after that, it
is thrown away as well, and they are in the prefix cache when the request is taken up again.

Nothing else moves meanwhile, so it is done for a request that is alone in its engine, and no earlier than it must be
(:class:`Lead`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from pdtransport.engine.commands import WorkerReport
from pdtransport.vllm.patches.hold_back import can_hold_back
from pdtransport.vllm.patches.late_caching import LateCaching

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

FIRST_LEAD_S, LEAST_LEAD_S, MOST_LEAD_S = 0.006, 0.001, 0.045
HELD_S = 0.003  # wanted: expectations are wrong by some, and who takes the last pages in wants the interpreter alone
MOST_CHANGE_S, MOST_CATCH_UP_S = 0.001, 0.01
MOST_KINDS = 256
LONG_S, REST_S = 0.05, 5.0  # a step that was held for so long shows that expectations are wrong: none is believed then


class Lead:
    """How long before its last pages are expected a request begins: as long as it takes to get to where it is held,
    less what the pages take to cross. Learned from how long steps were held, or came too late."""

    def __init__(self) -> None:
        self.seconds = FIRST_LEAD_S
        self._was_late = False
        self._rests_until = 0.0

    def has_come(self, expected: float, now: float) -> bool:
        """Whether it is time to begin, and not long past what was expected, which was wrong then."""
        return now >= self._rests_until and -LONG_S < expected - now <= self.seconds

    def learn(self, held: float, now: float) -> None:
        """A step was held for so many seconds; negative: its pages were there so long before it. Whoever is late twice
        in a row catches up at once: to begin too early costs less than to begin too late."""
        if held > LONG_S:
            self._rests_until = now + REST_S
        was_late, self._was_late = self._was_late, held < 0
        if held < 0 and was_late:
            change = min(HELD_S - held, MOST_CATCH_UP_S)
        else:
            change = max(-MOST_CHANGE_S, min(MOST_CHANGE_S, HELD_S - held)) / 2
        self.seconds = max(LEAST_LEAD_S, min(MOST_LEAD_S, self.seconds + change))


class Expectations:
    """When requests' last pages are expected, by what the workers say.

    Args:
        ranks: tensor-parallel size of this engine, whose workers all must have said so.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._when: dict[str, dict[int, float]] = {}
        self.lead = Lead()

    def hear(self, req_id: str, rank: int, when: float) -> None:
        """``when``: ``time.monotonic`` seconds."""
        if rank < self._ranks:
            self._when.setdefault(req_id, {})[rank] = when

    def forget(self, req_id: str) -> None:
        self._when.pop(req_id, None)

    def almost_there(self, now: float) -> str | None:
        """A request for which it is time to begin."""
        for req_id, by_rank in self._when.items():
            if len(by_rank) == self._ranks and self.lead.has_come(max(by_rank.values()), now):
                return req_id
        return None


class Kinds:
    """Requests of one kind launch the same kernels in a first step that they have for themselves, as far as can be
    told: they ask for the same things, and are about as long.

    Raises:
        AttributeError: this vLLM's requests are others.
    """

    def __init__(self) -> None:
        from vllm.sampling_params import SamplingParams

        self._plain = SamplingParams()
        self._fields: tuple[str, ...] = SamplingParams.__struct_fields__
        self._launched: set[Hashable] = set()

    def launched(self, request: Request) -> None:
        if len(self._launched) >= MOST_KINDS:
            self._launched.clear()
        self._launched.add(self._kind(request))

    def known(self, request: Request) -> bool:
        """Whether one of its kind was launched before."""
        return request.sampling_params is not None and self._kind(request) in self._launched

    def _kind(self, request: Request) -> Hashable:
        params, plain = request.sampling_params, self._plain
        asked = [name for name in self._fields if getattr(params, name, None) != getattr(plain, name)]
        greedy = getattr(params, "temperature", None) == 0
        return request.num_tokens.bit_length(), request.lora_request is not None, greedy, *asked


class EarlyStep:
    """At most one is under way; its outcome is settled before the scheduler looks at it.

    Raises:
        AttributeError: this vLLM's scheduler is another; nothing is taken hold of.
    """

    def __init__(self, scheduler: Scheduler, caching: LateCaching) -> None:
        self._scheduler, self._caching = scheduler, caching
        self._recompute: bool = scheduler.recompute_kv_load_failures
        for needed in ("_preempt_request", "prev_step_scheduled_req_ids", "kv_cache_manager"):
            getattr(scheduler, needed)
        config = scheduler.vllm_config
        # A step that is held would hold other data-parallel ranks in their collectives; drafts are made of its tokens.
        self._may = (
            config.parallel_config.data_parallel_size == 1
            and config.speculative_config is None
            and (self._recompute or len(scheduler.kv_cache_config.kv_cache_groups) == 1)
        )
        self._kinds = Kinds()
        self.under_way: str | None = None
        self.known = False  # a step of its kind was launched before
        self._arrived = False  # by the workers' word
        self._well = False  # by their report
        self._void = False  # likewise: well or not, they came after the step
        update = scheduler.update_from_output

        def looked_at(output: SchedulerOutput, result: ModelRunnerOutput) -> Any:
            req_id, told = self.under_way, result.kv_connector_output
            if req_id is not None:
                if told is not None and req_id in (told.finished_recving or ()):  # maybe with the step before
                    self._well = req_id not in (told.failed_recving or ())
                news = getattr(told, "kv_connector_worker_meta", None)
                self._void = self._void or (isinstance(news, WorkerReport) and req_id in news.void)
                if req_id in getattr(output.kv_connector_metadata, "hold", ()):
                    self._settle(req_id, result)
            return update(output, result)

        scheduler.update_from_output = looked_at  # type: ignore[method-assign]

    def may(self, request: Request) -> bool:
        """Whether this request, alone in its engine, can begin now and be given up again."""
        pause = getattr(self._scheduler, "_pause_state", None)
        return (
            self._may
            and self.under_way is None
            and can_hold_back(self._scheduler, request)
            and not request.use_structured_output
            and not request.num_preemptions
            and (pause is None or pause.name == "UNPAUSED")
        )

    def begin(self, req_id: str) -> None:
        self.under_way, self._arrived, self._well, self._void = req_id, False, False, False
        self.known = self._kinds.known(self._scheduler.requests[req_id])
        self._caching.doubt(req_id)

    def arrived(self) -> None:
        """The pages are there, on all ranks."""
        self._arrived = True

    @property
    def doubtful(self) -> set[str]:
        """Whose first step may come to nothing."""
        return set() if self.under_way is None or self._arrived else {self.under_way}

    def _settle(self, req_id: str, result: ModelRunnerOutput) -> None:
        self.under_way = None
        request = self._scheduler.requests.get(req_id)
        if request is None or request.is_finished() or request.num_stale_output_tokens:
            return  # aborted or preempted meanwhile: its blocks were not entered into the cache
        running = request in self._scheduler.running  # if not, it did not get its turn
        if running:
            self._kinds.launched(request)
        if self._well and not (running and self._void):
            self._caching.trust(req_id)
        elif self._well:
            logger.info("request %s: its first step was over before its pages came, and is taken again", req_id)
            self._caching.trust(req_id, request.num_prompt_tokens - 1)  # what that step wrote itself is void
            self._preempt(request)
        else:
            logger.warning("request %s began before its pages, which did not come: what it computed is dropped", req_id)
            self._give_up(request, result, running)

    def _preempt(self, request: Request) -> None:
        scheduler = self._scheduler
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)

    def _give_up(self, request: Request, result: ModelRunnerOutput, running: bool) -> None:
        from vllm.v1.outputs import KVConnectorOutput

        scheduler = self._scheduler
        if not running:
            scheduler.kv_cache_manager.free(request)
            request.num_computed_tokens = 0
        elif self._recompute:
            self._preempt(request)
        else:
            # vLLM fails whoever has an invalid block. The last one computed before this step is the request's own.
            told = result.kv_connector_output = result.kv_connector_output or KVConnectorOutput()
            (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
            told.invalid_block_ids = {blocks[(request.num_prompt_tokens - 2) // scheduler.block_size]}
