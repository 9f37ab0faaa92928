"""What the other tests' comparisons rest on, checked on the GPU at hand: the batch does not decide a sure token."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.rig.cases import MARGIN, MAX_ANSWER, assert_equal
from tests.rig.client import Answer, Client, in_parallel
from tests.rig.device import PLACE
from tests.rig.fixtures import Book, Servers, forget

AT_A_TIME = (1, 16)
PROMPTS = 60


@pytest.mark.gpu
@pytest.mark.skipif(not PLACE.gpu, reason="PDT_DEVICE=cuda is not set; on the CPU this was measured: tests.rig.cases")
def test_sure_tokens_do_not_depend_on_the_batch(servers: Servers, book: Book, with_client: Any) -> None:
    """The decode server alone, without hand-offs, gives the plain server's sure tokens one request at a time and
    sixteen at a time. Tells by how many nats the tokens that did change were sure."""
    some = book.assorted[:: max(1, len(book.assorted) // PROMPTS)]

    async def scenario(client: Client) -> None:
        asked: list[list[Answer]] = []
        for limit in AT_A_TIME:
            await forget(client, servers.decode)
            jobs = [partial(client.complete, servers.decode, c.prompt, MAX_ANSWER, logprobs=2) for c in some]
            asked.append(await in_parallel(limit, jobs))
        widest, changed = 0.0, 0
        for one, other in zip(*asked, strict=True):
            place = next((i for i in range(MAX_ANSWER) if one.tokens[i] != other.tokens[i]), None)
            if place is not None:
                changed += 1
                widest = max(widest, one.margins[place], other.margins[place])
        print(f"\n{changed} of {len(some)} changed with the batch, {widest:.3f} nats sure at most ({MARGIN} asked)")
        for answers in asked:
            for case, answer in zip(some, answers, strict=True):
                answer.tokens = answer.tokens[: len(case.tokens)]
            assert_equal(some, answers)

    with_client(scenario)
