"""The engine: a scheduler and a worker in one process and one thread. Of pdtransport it uses what its docs name."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from paged_transformers.pages import Pages
from pdtransport import Settings, Transport, prompt_digest
from pdtransport.engine.block_tables import BlockTables
from pdtransport.engine.commands import Command, Commands
from pdtransport.engine.consuming import ConsumingRequests
from pdtransport.engine.params import parse
from pdtransport.engine.producing import ProducingRequests
from pdtransport.engine.wakeups import WakeupReceiver
from pdtransport.engine.weight_sums import loaded_weights
from pdtransport.engine.worker import EngineWorker


@dataclass
class Request:
    req_id: str
    tokens: list[int]  # the prompt, and what was answered
    prompt: int
    end: int  # tokens at which it ends
    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose KV is in the blocks
    prefilled: int = 0  # of the prompt, how many tokens this engine computed


@dataclass(frozen=True)
class Answer:
    """``kv_transfer_params`` lead decode to the prompt's pages; None where there are none to fetch."""

    req_id: str
    tokens: list[int]
    prefilled: int
    kv_transfer_params: dict[str, Any] | None


class Engine:
    """Runs one request a step: a chunk of its prompt, or one token of its answer, the likeliest."""

    def __init__(
        self, path: str, *, name: str, blocks: int = 256, block_size: int = 16, chunk: int = 64, **settings: Any
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.pages = Pages(self.model.config, blocks, block_size, self.model.dtype)
        self.chunk = chunk
        self.waiting: deque[Request] = deque()
        self.running: deque[Request] = deque()
        self.loading: dict[str, Request] = {}
        self.sending: dict[str, Request] = {}
        self._attach(Settings.parse(settings), name)

    def _attach(self, settings: Settings, name: str) -> None:
        self.transport = Transport(
            self.pages.geometry(),
            settings.calling_anyone(),  # ConsumingRequests checks whom requests name
            engine=name,
            port=0,
            fingerprint={
                "weights": loaded_weights([self.model]).checksum,
                "dtype": str(self.model.dtype),
                "page_format": "paged-transformers 1",
            },
        )
        self.worker = EngineWorker(settings)
        self.worker.open(self.transport)
        tables, port = BlockTables((self.pages.block_size,)), self.transport.port
        self.bell = WakeupReceiver()
        self.queue: list[Command] = []
        self.producing = ProducingRequests(self.queue, settings, tables=tables, engine=name, port=port)
        self.consuming = ConsumingRequests(self.queue, settings, tables=tables)

    def add(self, req_id: str, prompt: list[int], max_tokens: int, kv_transfer_params: Any = None) -> None:
        self.waiting.append(Request(req_id, list(prompt), len(prompt), len(prompt) + max_tokens))
        wanted = parse(kv_transfer_params, producer=True, consumer=True)
        if wanted.problem:
            logging.warning("request %s is not handed over: %s", req_id, wanted.problem)
        elif wanted.produce is not None:
            self.producing.add(req_id, wanted.produce.transfer_id, prompt_digest(prompt), len(prompt))
        elif wanted.consume is not None:
            self.consuming.add(req_id, wanted.consume, prompt_digest(prompt), len(prompt))

    def step(self) -> list[Answer]:
        self._admit()
        self.consuming.step()
        request, after, end = self.running[0] if self.running else None, [], 0
        if request is not None:
            end = min(request.computed + self.chunk, len(request.tokens))
            pages = self.producing.progress(request.req_id, [request.blocks], request.computed, end, request.computed)
            after = [pages] if pages is not None else []
        elif not self.queue:
            self.bell.wait(0.05)  # nothing to compute: a transfer that ends rings
        commands = Commands(self.queue.copy(), after, self.bell.name)
        self.queue.clear()
        self.worker.before_forward(commands)
        answers = self._forward(request, end) if request is not None else []
        self.worker.after_forward(commands)
        self._hear()
        return answers

    def _admit(self) -> None:
        """Give blocks to requests, in their order, as long as there are any."""
        while self.waiting:
            request = self.waiting[0]
            found = self.pages.found(request.tokens)
            held = len(found) * self.pages.block_size
            lacking = self.consuming.lacking(request.req_id, held)
            blocks = self.pages.take(found, request.end) if lacking is not None else None
            if lacking is None or blocks is None:
                return
            self.waiting.popleft()
            request.blocks, request.computed = blocks, held
            if self.consuming.allocated(request.req_id, [blocks], lacking) is not None:
                self.loading[request.req_id] = request
            else:
                self.running.append(request)

    @torch.inference_mode()
    def _forward(self, request: Request, end: int) -> list[Answer]:
        """Compute the request's KV up to ``end``; behind its last token, the next one."""
        tokens = torch.tensor([request.tokens[request.computed : end]])
        cache = self.pages.cache(request.blocks, request.computed)
        logits = self.model(tokens, past_key_values=cache, use_cache=True).logits
        request.prefilled += max(0, min(end, request.prompt) - request.computed)
        request.computed = end
        self.pages.computed(request.tokens[:end], request.blocks)
        self.running.rotate(-1)
        if end < len(request.tokens):
            return []
        request.tokens.append(int(logits[0, -1].argmax()))
        done = len(request.tokens) == request.end or request.tokens[-1] == self.model.config.eos_token_id
        return [self._finish(request)] if done else []

    def _finish(self, request: Request) -> Answer:
        self.running.remove(request)
        self.consuming.finished(request.req_id)
        params = None
        if request.req_id in self.producing:
            params = self.producing.finish(request.req_id, [request.blocks])
            self.sending[request.req_id] = request  # its blocks stay until decode has them
        else:
            self.pages.give_back(request.blocks)
        return Answer(request.req_id, request.tokens[request.prompt :], request.prefilled, params)

    def abort(self, req_id: str) -> None:
        self.consuming.finished(req_id)  # if it is loading, `_hear` gives its blocks back
        for queue in (self.waiting, self.running):
            for request in [each for each in queue if each.req_id == req_id]:
                queue.remove(request)
                if self.producing.drop(req_id):
                    self.sending[req_id] = request
                else:
                    self.pages.give_back(request.blocks)

    def _hear(self) -> None:
        """Take in what ended."""
        sent, received, failed = self.worker.collect()
        self.worker.take_news()  # for usage and for first tokens, which this engine does not have
        self.producing.freed(sent)
        for req_id in sent:
            self.pages.give_back(self.sending.pop(req_id).blocks)
        for req_id in received:
            request = self.loading.pop(req_id)
            if self.consuming.received(req_id) is None:  # it was aborted
                self.pages.give_back(request.blocks)
                continue
            if req_id not in failed:
                request.computed = request.prompt - 1  # the last one's logits are the answer's first token
                self.pages.computed(request.tokens, request.blocks)
            self.running.append(request)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.loading or self.sending or self.queue)

    def close(self) -> None:
        self.worker.close()
        self.consuming.close()
        self.bell.close()
