"""The scheduler's half of hand-offs on prefill: which requests are handed over, and the commands that do it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pdtransport.engine.block_tables import Blocks, BlockTables
from pdtransport.engine.commands import Adapter, Command, Drop, Finish, Open, Pages, ReleaseIfPooled
from pdtransport.engine.crowding import REASON, Crowding
from pdtransport.engine.params import marked
from pdtransport.settings import Settings

logger = logging.getLogger(__name__)


@dataclass
class Producing:
    """A request that is handed over.

    Attributes:
        request: the engine's own object for it.
        tokens: number of prompt tokens that are handed over.
        first_token: the router asked prefill to return its first token.
        promised: decode promised to continue from that token.
        begun: its first step was scheduled.
    """

    transfer: str
    request: Any
    tokens: int
    first_token: bool = False
    promised: bool = False
    begun: bool = False


class ProducingRequests:
    """Requests that an engine hands over, from their arrival until they finish. Used by the scheduler's thread.

    Args:
        queue: commands for the workers are appended here; workers run them before the next step's forward pass.
        tables: the engine's block tables.
        engine: name of the engine, for routers.
        port: control port of its rank-0 worker; decode connects to it at ``control.host``.
        ranks: number of its workers.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        queue: list[Command],
        settings: Settings,
        *,
        tables: BlockTables,
        engine: str,
        port: int,
        ranks: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._tables = tables
        self._engine, self._host, self._port, self._ranks = engine, settings.control.host, port, ranks
        self._requests: dict[str, Producing] = {}
        self._crowding = Crowding(clock, settings.pool.lookup_s if settings.pool is not None else 0.0)

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[str]:
        return iter(self._requests)

    def get(self, req_id: str) -> Producing | None:
        return self._requests.get(req_id)

    def add(
        self,
        req_id: str,
        transfer: str,
        prompt_digest: bytes,
        tokens: int,
        *,
        request: Any = None,
        adapter: Adapter | None = None,
        first_token: bool = False,
    ) -> None:
        """Hand over this request as ``transfer``; :meth:`progress` hands over its pages.

        Args:
            prompt_digest: workers add the content of ``adapter`` to it.
            tokens: number of prompt tokens.
        """
        tokens = self._tables.handed(tokens)
        self._requests[req_id] = Producing(transfer, request, tokens, first_token)
        self._queue.append(Open(req_id, transfer, prompt_digest, tokens, adapter))

    def promised(self, req_ids: Iterable[str]) -> None:
        """Decode promised to continue from these requests' first tokens."""
        for req_id in req_ids:
            if req_id in self._requests:
                self._requests[req_id].promised = True

    def progress(self, req_id: str, blocks: Blocks, before: int, after: int, cached: int | None = None) -> Pages | None:
        """The command to run after this step's forward pass; None if there is nothing to hand over.

        Args:
            blocks: the request's blocks.
            before: number of tokens computed before this step.
            after: number of tokens computed after this step.
            cached: prompt tokens found in the engine's caches; used in the request's first step only.
        """
        entry = self._requests.get(req_id)
        if entry is None or before >= entry.tokens:
            return None
        cached, entry.begun = None if entry.begun else cached, True
        held = tuple(ids[:end] for ids, end in zip(blocks, self._tables.counts(entry.tokens), strict=True))
        return Pages(req_id, held, min(after, entry.tokens), cached)

    def finish(self, req_id: str, blocks: Sequence[Sequence[int]], first_token: int | None = None) -> dict[str, Any]:
        """The request finished. The engine must keep its blocks until the workers report it as sent.

        Args:
            first_token: the token that decode promised to continue from.

        Returns:
            The ``kv_transfer_params`` of its response, which tell decode where the pages are.
        """
        entry = self._requests.pop(req_id)
        self._queue.append(Finish(req_id, first_token))
        self._crowding.keep(req_id)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": entry.transfer,
            "remote_engine_id": self._engine,
            "remote_request_id": marked(entry.transfer),
            "remote_block_ids": [list(ids) for ids in blocks],
            "remote_host": self._host,
            "remote_port": self._port,
            "tp_size": self._ranks,
        }

    def drop(self, req_id: str, *, report: bool = True, reason: str = Drop.reason) -> bool:
        """Stop handing over this request; False if it was not being handed over.

        With ``report`` the engine must keep its blocks until the workers report it as sent. Without, something else
        makes that report, or the request goes on.
        """
        if self._requests.pop(req_id, None) is None:
            return False
        self._queue.append(Drop(req_id, report, reason))
        return True

    def freed(self, req_ids: Iterable[str]) -> None:
        """The pages of these requests were freed."""
        self._crowding.freed(req_ids)

    def make_room(self, still: bool) -> None:
        """Release a finished prompt if its pages keep other prompts from being computed; called once a step.

        Args:
            still: prompts wait for room, and this step computes nothing.
        """
        if (req_id := self._crowding.let_go(still and bool(self._requests))) is not None:
            logger.warning("request %s is not handed over: %s", req_id, REASON)
            self._queue.append(ReleaseIfPooled(req_id, REASON))
