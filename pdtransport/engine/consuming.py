"""The scheduler's half of hand-offs on decode: whose pages come from prefill, and the commands that fetch them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdtransport.engine.block_tables import Blocks, BlockTables
from pdtransport.engine.callees import Callees
from pdtransport.engine.commands import Adapter, CancelLoad, Command, Decline, SendClaim, StartReceive
from pdtransport.engine.params import ConsumeParams
from pdtransport.protocol.messages import Code
from pdtransport.settings import Settings

LEFT = "the request was aborted on decode before it had room"
CLAIM_EVERY_S = 2.0  # interval at which a request that waits for blocks here asks prefill to keep its pages


@dataclass
class Consuming:
    """A request whose pages come from prefill.

    Attributes:
        params: the request's parameters about prefill; ``remote_host`` is an address once ``found`` is set.
        request: the engine's own object for it.
        tokens: number of prompt tokens.
        first_token: continue from prefill's first token; decode promises that when it starts loading.
        named: prefill's host as given in the request.
        found: ``params.remote_host`` now holds an address that this engine may connect to.
        state: "waiting" -> "loading" -> "done"; straight to "done" if there is nothing to load.
        claim_at: when to send the next claim.
    """

    params: ConsumeParams
    prompt_digest: bytes
    tokens: int
    request: Any
    adapter: Adapter | None
    first_token: bool
    named: str
    claim_at: float
    found: bool = False
    state: str = "waiting"


class ConsumingRequests:
    """Requests whose pages come from prefill, from their arrival until they finish. Used by the scheduler's thread.

    Args:
        queue: commands for the workers are appended here; workers run them before the next step's forward pass.
        tables: the engine's block tables.
        heads: attention heads of the model; a peer's tensor-parallel size must divide them. 0: unknown.
        strict: hosts come from requests, so without ``control.peers`` only this machine may be connected to.
        refused: called with a request and a reason if the request is not handed over because prefill's host must not be
            connected to.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        queue: list[Command],
        settings: Settings,
        *,
        tables: BlockTables,
        heads: int = 0,
        strict: bool = True,
        refused: Callable[[str, Consuming, str], None] = lambda req_id, entry, why: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._tables = tables
        self._tombstones = settings.tombstones
        self._refused, self._clock = refused, clock
        self._requests: dict[str, Consuming] = {}
        self._declining: list[tuple[ConsumeParams, Code, str]] = []  # to be sent once prefill's host is resolved
        self._taken: OrderedDict[str, None] = OrderedDict()  # recent transfers that were received or declined
        self.callees = Callees(settings.control, heads, strict=strict, clock=clock)

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, req_id: str) -> Consuming | None:
        return self._requests.get(req_id)

    def add(
        self,
        req_id: str,
        params: ConsumeParams,
        prompt_digest: bytes,
        tokens: int,
        *,
        request: Any = None,
        adapter: Adapter | None = None,
        first_token: bool = False,
    ) -> None:
        """Register a request whose pages come from the prefill instance in ``params``.

        Args:
            prompt_digest: workers add the content of ``adapter`` to it.
            tokens: number of prompt tokens.
        """
        self._requests[req_id] = Consuming(
            params, prompt_digest, tokens, request, adapter, first_token, params.remote_host, self._clock()
        )

    def ours(self, req_id: str) -> bool:
        """Whether this request's pages are still to come from prefill."""
        entry = self._requests.get(req_id)
        return entry is not None and entry.state != "done"

    def lacking(self, req_id: str, computed: int) -> int | None:
        """Prompt tokens beyond ``computed`` that prefill supplies; None if that is not known yet: ask again."""
        if not self._find(req_id):
            return None
        entry = self._requests.get(req_id)
        # The last prompt token is always computed here: its logits give the first output token.
        if entry is None or entry.state != "waiting" or entry.tokens - computed <= 1:
            return 0
        return self._tables.handed(entry.tokens) - computed

    def allocated(self, req_id: str, blocks: Blocks, expected: int) -> Consuming | None:
        """The request has its blocks: ask prefill for its pages. It must not run until the workers report it received.

        Args:
            blocks: all of the request's blocks.
            expected: the tokens that :meth:`lacking` returned. 0: all of the prompt's blocks are here already, and
                prefill may free its pages. Fewer: what is asked for does not reach the prompt's end, so prefill
                refuses it and the engine computes the request itself.

        Returns:
            The request; None if there is nothing to wait for.
        """
        entry = self._requests.get(req_id)
        if entry is None or entry.state != "waiting":
            return None
        handed = self._tables.handed(entry.tokens)
        entry.state = "loading" if expected else "done"
        if expected:
            whole = all(len(ids) >= end for ids, end in zip(blocks, self._tables.counts(handed), strict=True))
            first, pages = self._tables.missing(blocks, handed - expected if whole else 0, handed)
        else:
            first, pages = self._tables.counts(handed), ([],) * len(self._tables)
        self._take(req_id, entry, handed, first, pages)
        return entry if expected else None

    def _take(self, req_id: str, entry: Consuming, tokens: int, first_block: tuple[int, ...], pages: Blocks) -> None:
        p = entry.params
        self._note_taken(p.transfer_id)
        self._queue.append(
            StartReceive(
                req_id,
                p.transfer_id,
                entry.prompt_digest,
                tokens,
                first_block,
                pages,
                p.remote_host,
                p.remote_port,
                p.tp_size,
                entry.first_token and entry.state == "loading",
                entry.adapter,
            )
        )

    def received(self, req_id: str) -> Consuming | None:
        """The workers reported the end of this request's transfer; None if it has none."""
        entry = self._requests.get(req_id)
        if entry is not None:
            entry.state = "done"
        return entry

    def finished(self, req_id: str) -> Consuming | None:
        """The request finished or was aborted; returns it if its pages came from prefill.

        If it was loading, the engine must keep its blocks until the workers report it as received.
        """
        entry = self._requests.pop(req_id, None)
        if entry is not None and entry.state == "loading":
            self._queue.append(CancelLoad(req_id))
        elif entry is not None and entry.state == "waiting":
            self.decline(entry.params, Code.CANCELLED, LEFT)
        return entry

    def decline(self, params: ConsumeParams, code: Code, reason: str) -> None:
        """Decline the transfer of a request that has ended, so that prefill can free its pages.

        A transfer that was received or declined is not declined again.
        """
        if params.transfer_id not in self._taken:
            self._note_taken(params.transfer_id)
            self._declining.append((params, code, reason))
            self._tell_declined()

    @property
    def declining(self) -> bool:
        """Whether a decline waits for a step."""
        return bool(self._declining)

    def step(self) -> None:
        """Send claims for requests that have no blocks yet, and waiting declines; called once a step."""
        now = self._clock()
        for req_id, entry in list(self._requests.items()):
            if entry.state == "waiting" and now >= entry.claim_at and self._find(req_id) and entry.found:
                entry.claim_at = now + CLAIM_EVERY_S
                p = entry.params
                self._queue.append(SendClaim(p.transfer_id, p.remote_host, p.remote_port, p.tp_size))
        self._tell_declined()

    def _find(self, req_id: str) -> bool:
        """Resolve the address of this request's prefill.

        Returns:
            False while the lookup is running: ask again. True otherwise; if the host must not be connected to, the
            request has been declined and will not be handed over.
        """
        entry = self._requests.get(req_id)
        if entry is None or entry.found or entry.state != "waiting":
            return True
        found = self.callees.find(entry.params)
        if isinstance(found, str):
            del self._requests[req_id]
            self._note_taken(entry.params.transfer_id)
            self._queue.append(Decline(entry.params.transfer_id, Code.REFUSED, found))
            self._refused(req_id, entry, found)
        elif found is not None:
            entry.params, entry.found = found, True
        return found is not None

    def _tell_declined(self) -> None:
        """Send the declines whose prefill host is resolved.

        If that host must not be connected to, the decline carries no address and only watchers of the transfer see it.
        """
        declining, self._declining = self._declining, []
        for params, code, reason in declining:
            found = self.callees.find(params)
            if found is None:
                self._declining.append((params, code, reason))
            elif isinstance(found, str):
                self._queue.append(Decline(params.transfer_id, code, reason))
            else:
                where = found.remote_host, found.remote_port, found.tp_size
                self._queue.append(Decline(params.transfer_id, code, reason, *where))

    def _note_taken(self, transfer: str) -> None:
        self._taken[transfer] = None
        if len(self._taken) > self._tombstones:
            self._taken.popitem(last=False)

    def close(self) -> None:
        self.callees.close()
