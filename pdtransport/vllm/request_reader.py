"""Reads what new requests ask of the connector (``kv_transfer_params``) and registers those to be handed over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from pdtransport.engine.block_tables import BlockTables
from pdtransport.engine.commands import Command, Decline
from pdtransport.engine.consuming import ConsumingRequests
from pdtransport.engine.params import Wanted, asked_transfer, parse
from pdtransport.engine.producing import Producing, ProducingRequests
from pdtransport.engine.request_batches import Batches
from pdtransport.kv.fingerprint import plain
from pdtransport.kv.keys import prompt_digest
from pdtransport.protocol.messages import Code
from pdtransport.system.log_limits import LogLimiter
from pdtransport.vllm.first_token import FirstTokens
from pdtransport.vllm.patches.appended_token import give_up

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

COMPLAIN_S = 10.0  # between two log lines about what clients ask for


class RequestReader:
    """Reads requests for one engine.

    Args:
        queue: commands for the workers are appended here.
        producing: requests that are handed over.
        consuming: requests whose pages come from prefill.
        roles: whether this engine sends KV pages, and whether it receives them.
        tables: the engine's block tables.
        first_tokens: decides which requests may continue from prefill's first token; None: no request may.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        queue: list[Command],
        producing: ProducingRequests,
        consuming: ConsumingRequests,
        roles: tuple[bool, bool],
        tables: BlockTables,
        first_tokens: FirstTokens | None,
        clock: Callable[[], float],
    ) -> None:
        self._queue, self._producing, self._consuming = queue, producing, consuming
        self._sends, self._receives = roles
        self._tables, self._first_tokens = tables, first_tokens
        self._limiter = LogLimiter(logger, COMPLAIN_S, clock=clock)  # clients choose their parameters
        self._batches = Batches()

    def parse(self, request: Request) -> Wanted:
        return parse(request.kv_transfer_params, producer=self._sends, consumer=self._receives)

    def read(self, request: Request) -> None:
        """Register the request for a hand-off, or log why it is served without one."""
        wanted = self.parse(request)
        problem = wanted.problem
        if (wanted.produce or wanted.consume) and _of_embeddings(request):
            problem = "a prompt of embeddings has no token ids to identify its KV by"
        named, transfer, without = wanted.produce or wanted.consume, "", ""
        if named is not None and named.transfer_id is not None and not problem:
            minted = wanted.produce is not None and request.kv_transfer_params.get("transfer_id") is None
            transfer, without = self._batches.transfer(request.request_id, named.transfer_id, minted=minted)
            problem = without
        if not problem and wanted.consume is not None:
            problem = self._not_with_an_adapter(request) or self._consuming.callees.why_not(wanted.consume)
        elif not problem and wanted.produce is not None:
            problem = self._not_with_an_adapter(request) or self._not_held(request)
        if problem:
            self.complain(request, problem)
            # A request without a transfer of its own must not decline the one in its body, which another request owns.
            asked = asked_transfer(request.kv_transfer_params)
            declined = "" if without or not asked else transfer or asked
            if declined:
                self._queue.append(Decline(declined, Code.REFUSED, problem))
            if wanted.lost:
                give_up(request)
            return
        req_id, tokens, adapter = request.request_id, request.num_prompt_tokens, request.lora_request
        if wanted.produce is not None:
            first = wanted.produce.first_token
            digest = prompt_digest_of(request)
            self._producing.add(req_id, transfer, digest, tokens, request=request, adapter=adapter, first_token=first)
        elif wanted.consume is not None:
            params = wanted.consume.model_copy(update={"transfer_id": transfer})
            first = params.first_token and self._may_go_on(request)
            digest = prompt_digest_of(request)
            self._consuming.add(req_id, params, digest, tokens, request=request, adapter=adapter, first_token=first)
        elif wanted.continue_from is not None:
            self.go_on(request, wanted.continue_from if self._may_go_on(request) else None)

    def complain(self, request: Request, problem: str) -> None:
        self._limiter.warn(f"request {plain(request.request_id, 128)} is not handed over: {problem}")

    def _not_with_an_adapter(self, request: Request) -> str:
        if request.lora_request is not None and len(self._tables) > 1:
            return "LoRA adapters are not handed over yet by a model with several cache groups"
        return ""

    def _not_held(self, request: Request) -> str:
        """Prefill: why it can't keep this prompt's pages until decode has them; empty if it can."""
        window = self._tables.window
        if window is None or request.max_tokens == 1 or request.num_prompt_tokens + request.max_tokens - 1 <= window:
            return ""
        return (
            f"vLLM gives back what lies behind the model's window of {window} tokens while prefill computes "
            f"{request.max_tokens} tokens behind the prompt: ask it for one (max_tokens)"
        )

    def _may_go_on(self, request: Request) -> bool:
        """Whether continuing from prefill's first token is exact and leaves at least one token to compute here."""
        may = self._first_tokens is not None and not self._first_tokens.why_not(request)
        return may and request.max_tokens > 1

    def go_on(self, request: Request, token: int | None) -> None:
        """Continue from ``token``, or end the request: the client may already have received that token."""
        if token is None or self._first_tokens is None or not self._first_tokens.append(request, token):
            logger.warning("request %s can't continue from the first token that prefill returned", request.request_id)
            give_up(request)

    def first_token_of(self, entry: Producing, request: Request) -> tuple[int | None, str]:
        """The first token, if decode continues from it and the router may return it; else None and a reason code."""
        if not entry.first_token or self._first_tokens is None:
            return None, "unsupported"
        return self._first_tokens.of(request, entry.promised)


def _of_embeddings(request: Request) -> bool:
    """Whether any part of the prompt is given as embeddings, whose KV token ids do not identify.

    Parts of a chat can be embeddings, too.
    """
    embedded = getattr(request, "prompt_embeds", None), getattr(request, "prompt_is_token_ids", None)
    return request.prompt_token_ids is None or any(each is not None for each in embedded)


def prompt_digest_of(request: Request) -> bytes:
    """Digest of what identifies the request's KV: tokens, multimodal inputs and the tenant's salt.

    The model is compared separately. Workers add the LoRA adapter's content, which only they know.
    """
    assert request.prompt_token_ids is not None
    extra: list[str] = []
    for feature in request.mm_features or ():
        extra.append(f"mm:{feature.identifier}:{feature.mm_position.offset}:{feature.mm_position.length}")
    return prompt_digest(request.prompt_token_ids, salt=request.cache_salt or "", extra=extra)
