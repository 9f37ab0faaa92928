"""Runs another package's placement policy in a separate thread, so that a slow policy delays requests only briefly."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue

from pdtransport.router.placement.base import PlacementPolicy, RequestView, ServerView
from pdtransport.system.log_limits import where

ANSWER_S = 0.1  # a request waits this long for the policy's choice


class NoChoice(Exception):
    """Why the policy chose no server: a reason for metrics, and a line for the log."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


@dataclass(eq=False)
class _Question:
    request: RequestView
    servers: Sequence[ServerView]
    given_up: bool = False
    # The choice, or what the policy raised. It is not set as the future's exception, because asyncio refuses some
    # kinds.
    answer: Future[str | BaseException] = field(default_factory=Future)


class PolicyThread:
    """Starts a daemon thread at the first call, so that a hanging policy does not keep the process alive."""

    def __init__(self, policy: PlacementPolicy) -> None:
        self._policy = policy
        self._questions: SimpleQueue[_Question | None] = SimpleQueue()
        self._started = False
        self._late: _Question | None = None  # the last call that was not answered in time

    async def choose(self, request: RequestView, servers: Sequence[ServerView]) -> str:
        """The policy's choice.

        Raises:
            NoChoice: it raised something, or is too slow.
        """
        if self._late is not None and not self._late.answer.done():
            raise NoChoice("late", "has not answered for an earlier request yet")
        if not self._started:
            self._started = True
            threading.Thread(target=self._run, name="pdrouter-placement", daemon=True).start()
        question = _Question(request, servers)
        self._questions.put(question)
        waiting = asyncio.wrap_future(question.answer)
        try:
            await asyncio.wait({waiting}, timeout=ANSWER_S)
        finally:
            question.given_up = True
        if not waiting.done():
            self._late = question
            raise NoChoice("late", f"did not answer within {ANSWER_S:g} s")
        answer = waiting.result()
        if isinstance(answer, BaseException):
            raise NoChoice("error", f"raised {where(answer)}") from answer
        return answer

    def close(self) -> None:
        """End the thread once the policy returns."""
        self._questions.put(None)

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            question.answer.set_result(self._ask(question))

    def _ask(self, question: _Question) -> str | BaseException:
        if question.given_up:
            return ""
        try:
            return self._policy.choose(question.request, question.servers)
        except BaseException as error:  # noqa: BLE001 - the thread must go on whatever a policy raises
            return error
