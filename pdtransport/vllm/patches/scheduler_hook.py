"""Lets a request resume in the first engine step that begins after its pages arrived.

In plain vLLM, the worker's report waits until a step was launched and its output read, and the request then waits for
one more step: two empty steps with a sleep of a millisecond each on an idle engine, up to two model steps on a busy
one. The workers' wakeup messages (:mod:`pdtransport.engine.wakeups`) arrive earlier. So this hook does at the start of
the next step what vLLM does on the report, and drops the report when it comes.

vLLM has no hook for this; :class:`SchedulerHook` says what is patched. If vLLM is not as expected, requests wait for
the report. The first step of a resumed request is kept short (:mod:`engine_loop`, :mod:`hold_back`,
:mod:`late_caching`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from pdtransport.engine.commands import WorkerReport
from pdtransport.settings import Settings
from pdtransport.vllm.patches import engine_loop, late_caching
from pdtransport.vllm.patches import hold_back as holding_back
from pdtransport.vllm.patches.base import Patch, expect
from pdtransport.vllm.patches.engine_loop import EngineLoop
from pdtransport.vllm.patches.hold_back import can_hold_back, hold_back
from pdtransport.vllm.patches.late_caching import LateCaching

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import ModelRunnerOutput


def _check() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import RequestStatus

    expect(KVCacheManager.new_step_starts, takes=["self"])
    expect(Scheduler.__init__, uses=["connector", "requests", "running", "waiting", "finished_recving_kv_req_ids"])
    expect(Scheduler.schedule, order=["new_step_starts", "running", "waiting"])
    expect(
        Scheduler.update_from_output,
        takes=["self", "scheduler_output", "model_runner_output"],
        uses=["kv_connector_output", "_update_from_kv_xfer_finished"],
    )
    expect(
        Scheduler._update_from_kv_xfer_finished,
        takes=["self", "kv_connector_output"],
        uses=["update_connector_output", "finished_recving", "finished_recving_kv_req_ids"],
    )
    expect(KVConnectorOutput, accepts=["finished_recving"])
    _ = RequestStatus.WAITING_FOR_REMOTE_KVS


PATCH = Patch(
    "step_ahead",
    _check,
    setting="step_ahead",
    costs="a request resumes two steps after its pages arrived, not in the next one",
)


class Arrivals:
    """Tracks which requests' pages are on all ranks, ahead of vLLM's own report.

    Args:
        ranks: tensor-parallel size of this engine.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._there: dict[str, set[int]] = {}
        self._reports: set[str] = set()  # requests that resumed and whose report is still to come

    def hear(self, told: Collection[tuple[str, int]], awaited: Collection[str]) -> set[str]:
        """Record arrivals; return the requests in ``awaited`` whose pages are now on all ranks, each once.

        Args:
            told: request ids and ranks, from the workers' messages.
        """
        ready = set()
        for req_id, rank in told:
            if req_id in awaited and rank < self._ranks:
                there = self._there.setdefault(req_id, set())
                there.add(rank)
                if len(there) == self._ranks:
                    ready.add(req_id)
        return ready

    def void(self, awaited: Collection[str]) -> set[str]:
        """Forget all arrivals so far; return the requests in ``awaited`` that have not resumed yet."""
        self._there.clear()
        return set(awaited) - self._reports

    def went_on(self, req_ids: Collection[str]) -> None:
        self._reports.update(req_ids)

    def reported(self, req_ids: Collection[str]) -> set[str]:
        """Process vLLM's report; return the requests in it that have already resumed."""
        for req_id in req_ids:
            self._there.pop(req_id, None)
        late = self._reports.intersection(req_ids)
        self._reports -= late
        return late


class SchedulerHook:
    """Patches one scheduler, to call back when a step begins and before a step's output is processed.

    ``begins`` is called from ``new_step_starts`` of the cache manager, which ``schedule()`` calls before it looks at
    any request. ``hears`` is called with the workers' report from ``update_from_output``, before the scheduler reads
    the step's output, since that may already contain outputs of resumed requests.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        manager: KVCacheManager,
        begins: Callable[[SchedulerHook], None],
        settings: Settings,
        hears: Callable[[WorkerReport], None],
    ) -> None:
        from vllm.v1.outputs import KVConnectorOutput
        from vllm.v1.request import RequestStatus

        self._scheduler = scheduler
        self._output, self._waiting = KVConnectorOutput, RequestStatus.WAITING_FOR_REMOTE_KVS
        self._loop: EngineLoop | None = None
        self._looked = False
        self._first: set[str] = set()  # requests kept out of the next step: their first step is processed before it
        self._caching: LateCaching | None = None
        engine_loop.PATCH.allowed(settings)
        holding_back.PATCH.allowed(settings)
        try:
            if late_caching.PATCH.allowed(settings):
                self._caching = LateCaching(manager)
        except AttributeError as error:
            late_caching.PATCH.fail(str(error))
        starts, update = manager.new_step_starts, scheduler.update_from_output

        def looked_at(output: SchedulerOutput, result: ModelRunnerOutput) -> Any:
            news = getattr(result.kv_connector_output, "kv_connector_worker_meta", None)
            if isinstance(news, WorkerReport):
                hears(news)
            return update(output, result)

        scheduler.update_from_output = looked_at  # type: ignore[method-assign]

        def started() -> Any:
            first, self._first = self._first, set()
            self._catch_up()
            begins(self)
            self._hold_back(first)
            return starts()

        manager.new_step_starts = started  # type: ignore[method-assign]

    @classmethod
    def of(
        cls,
        connector: Any,
        manager: Any,
        begins: Callable[[SchedulerHook], None],
        settings: Settings,
        hears: Callable[[WorkerReport], None] = lambda news: None,
    ) -> SchedulerHook | None:
        """Hook the scheduler that owns ``connector``; None if it is switched off or vLLM is not as expected."""
        if not PATCH.allowed(settings):
            return None
        try:
            from vllm.v1.core.sched.scheduler import Scheduler

            owner = next(
                thing
                for thing in gc.get_objects()
                if issubclass(type(thing), Scheduler) and getattr(thing, "connector", None) is connector
            )
            for needed in ("requests", "running", "waiting", "finished_recving_kv_req_ids", "update_from_output"):
                getattr(owner, needed)
            if callable(owner._update_from_kv_xfer_finished) and callable(manager.new_step_starts):
                return cls(owner, manager, begins, settings, hears)
            PATCH.fail("its scheduler has other methods")
        except (ImportError, StopIteration, AttributeError) as error:
            PATCH.fail(str(error) or "its scheduler was not found")
        return None

    def _catch_up(self) -> None:
        """Do the work that the last step delayed."""
        if not self._looked:
            self._looked = True
            self._loop = EngineLoop.of(self._scheduler) if engine_loop.PATCH.active else None
        if self._caching is not None:
            self._caching.catch_up()

    def forget(self) -> None:
        """The weights changed: do not cache blocks computed so far."""
        if self._caching is not None:
            self._caching.forget()

    def _hold_back(self, first: set[str]) -> None:
        """Keep requests ``first`` out of this step: their first step must be processed before another one is launched.

        If launches are slow, the first token would otherwise wait until the next step is launched.
        """
        for request in self._scheduler.running if first else ():
            if request.request_id in first and can_hold_back(self._scheduler, request):
                hold_back(self._scheduler, request)

    @property
    def clients_wait(self) -> Callable[[], bool] | None:
        """A function that tells whether client messages are queued for the engine; None if there is no way to know."""
        return self._loop.clients_wait if self._loop is not None else None

    def _waiting_requests(self) -> list[Any]:
        scheduler = self._scheduler
        return [*scheduler.waiting, *getattr(scheduler, "kv_holding_waiting", ())]

    def idle(self) -> bool:
        """Whether all requests wait for pages, so that this step would compute nothing."""
        return not self._scheduler.running and all(
            request.status is self._waiting and request.request_id not in self._scheduler.finished_recving_kv_req_ids
            for request in self._waiting_requests()
        )

    def go_on(self, req_ids: Collection[str]) -> set[str]:
        """Let these requests resume, as vLLM does on the workers' report; return those that were waiting for it."""
        requests = self._scheduler.requests
        ours = {
            req_id for req_id in req_ids if req_id in requests and requests[req_id].status is self._waiting
        } - self._scheduler.finished_recving_kv_req_ids
        if ours:
            self._scheduler._update_from_kv_xfer_finished(self._output(finished_recving=set(ours)))
            self._hurry(ours)
        return ours

    def _hurry(self, req_ids: set[str]) -> None:
        """Keep the first step of these requests short."""
        # Caching can wait only if no other request of this step could find their blocks in the prefix cache.
        if self._caching is not None and all(each.request_id in req_ids for each in self._waiting_requests()):
            self._caching.put_off(req_ids)
        if self._loop is not None and self._loop.slow_launches and not self._scheduler.running:
            self._first = set(req_ids)
