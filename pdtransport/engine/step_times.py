"""How long this engine's steps of prefill take, learned from those before.

Prefill tells decode when it expects a step to end, so that decode can be ready just then. A step's time is taken as
``a + b * tokens + c * tokens x context`` (projections and attention), by least squares in which older steps count
less and less. It is an expectation and no more: nothing depends on it but when somebody wakes up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FORGET = 0.97  # what a step's weight is multiplied by with each later one
ENOUGH = 3  # steps that were seen before one is foretold
BEYOND = 1.5  # times what was seen at most: of a larger step nothing is known
_TOKENS, _CONTEXT = 1e3, 1e6  # so that the sums' sizes are alike


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens ``first .. first + tokens`` of one request, computed in a step."""

    first: int
    tokens: int


class Step:
    """One step. ``due``: when it is expected to end, as ``time.monotonic`` seconds; None: nobody knows yet."""

    def __init__(self, times: StepTimes, shape: np.ndarray, began: float) -> None:
        self._times, self._shape, self._began = times, shape, began
        self._over = False
        seconds = times.expect(shape)
        self.due = None if seconds is None else max(began, times.busy_until) + seconds

    def ended(self, now: float) -> None:
        """The GPU is through with it. Each of its requests may say so."""
        if not self._over:
            self._over = True
            self._times.learn(self._shape, now - max(self._began, self._times.last_end))
            self._times.last_end = now
            if self._times.last is self:
                self._times.busy_until = now


class StepTimes:
    """For the steps of one worker, which its GPU computes one after the other. :meth:`begin` and :meth:`Step.ended`
    may be called from different threads."""

    def __init__(self) -> None:
        self.last_end = 0.0
        self.busy_until = 0.0
        self.last: Step | None = None  # begun
        self._most = np.zeros(3)
        self._squares, self._products = np.zeros((3, 3)), np.zeros(3)
        self._seen = 0
        self._weights: np.ndarray | None = None

    def begin(self, chunks: Sequence[Chunk], now: float) -> Step:
        """A step with these parts of prompts is launched at ``now``."""
        tokens = sum(chunk.tokens for chunk in chunks)
        context = sum(chunk.tokens * (chunk.first + chunk.tokens / 2) for chunk in chunks)
        step = Step(self, np.array([1.0, tokens / _TOKENS, context / _CONTEXT]), now)
        self.busy_until, self.last = step.due if step.due is not None else now, step
        return step

    def expect(self, shape: np.ndarray) -> float | None:
        weights = self._weights
        if weights is None or (shape > BEYOND * self._most).any():
            return None
        return max(0.0, float(shape @ weights))

    def learn(self, shape: np.ndarray, seconds: float) -> None:
        self._squares = FORGET * self._squares + np.outer(shape, shape)
        self._products = FORGET * self._products + shape * seconds
        self._most = np.maximum(self._most, shape)
        self._seen += 1
        if self._seen >= ENOUGH:
            # The ridge decides where steps of one shape alone were seen, and is too small to matter elsewhere.
            self._weights = np.linalg.solve(self._squares + 1e-6 * np.eye(3), self._products)
