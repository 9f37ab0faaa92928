"""Prompts together with the answer that a plain server is sure of: what tests of token equality compare with.

Measured on tiny-lm with two plain servers (chunks of 256 and of 2048 tokens, 1 and 16 requests at a time, cached and
not; 202 prompts of 16 answer tokens): answers differed only where the chosen token lay at most 0.0625 nats above the
runner-up. Between TP 1 and TP 2: at most 0.125. The margins below are four times as wide; float32 needs next to none.
Damaged KV moves answers by whole nats; ``test_answers_depend_on_every_part_of_the_context`` keeps this honest.

On a GPU the batch's shape decides which kernels run and how CUDA graphs pad it, and decode computes a prompt's last
token in a batch of its own: bits need not be equal even one request at a time. The margin covers that too
(``test_numerics.py`` checks it on the card at hand); ``PDT_INVARIANT=1`` compares every token instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tests.rig.answers import Answers
from tests.rig.client import Answer, Client, Handed, Order, hand_off, in_parallel
from tests.rig.device import PLACE
from tests.rig.prompts import Prompts
from tests.rig.servers import Server

MARGIN = PLACE.margin_or(0.02 if PLACE.single else 0.25)  # nats; same tensor-parallel size
MARGIN_TP = 0.02 if PLACE.single else 0.5  # nats; other tensor-parallel sizes
MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)  # of a block: lengths of prompts
SURE_OF_HALF = not PLACE.single  # about half of all prompts meet the wider margins: twice as many are tried
BLOCK = PLACE.block_size
MAX_ANSWER = 16
ENOUGH = 4  # tokens of an answer to compare
LONGEST = 8000  # tokens of a prompt


class WrongAnswer(AssertionError):
    """What was answered, or arrived, is not what a plain server answers or prefill had: never tried again."""


@dataclass(frozen=True)
class Case:
    """A prompt and the tokens that must follow it: as many as the plain server was sure of."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return -(-len(self.prompt) // BLOCK)


async def cases(
    answers: Answers,
    candidates: Sequence[Sequence[int]],
    *,
    margin: float = MARGIN,
    least: int = 2,
    longest: int = MAX_ANSWER,
) -> list[Case]:
    """A case of each candidate that the plain server is sure of for at least ``least`` tokens."""
    made = []
    for prompt, known in zip(candidates, await answers.learn(candidates, longest), strict=True):
        sure = next((i for i, value in enumerate(known.margins) if value < margin), longest)
        if sure >= least:
            made.append(Case(tuple(prompt), tuple(known.tokens[:sure])))
    return made


async def best_of(answers: Answers, groups: Sequence[Sequence[Sequence[int]]], *, margin: float = MARGIN) -> list[Case]:
    """Of each group of candidates the first that the plain server is sure of for ``ENOUGH`` tokens, else the one that
    it is sure of for longest, if for any token. What comes after such a first one is not asked."""
    best: dict[int, Case] = {}
    for turn in range(max(map(len, groups))):
        asked = {number: tuple(group[turn]) for number, group in enumerate(groups) if turn < len(group)}
        asked = {number: prompt for number, prompt in asked.items() if not _enough(best.get(number))}
        made = {case.prompt: case for case in await cases(answers, list(asked.values()), margin=margin, least=1)}
        for number, prompt in asked.items():
            tried = [case for case in (best.get(number), made.get(prompt)) if case is not None]
            if tried:
                best[number] = max(tried, key=lambda case: len(case.tokens))
    return [best[number] for number in sorted(best)]


def _enough(case: Case | None) -> bool:
    return case is not None and len(case.tokens) >= ENOUGH


async def assorted(answers: Answers, seed: int, *, margin: float = MARGIN) -> list[Case]:
    """Prompts of all sizes: every length below a block, multiples of a block and one more and one less, anything up
    to 2,500 tokens, and a few of up to ``LONGEST``. Some 210 to 230."""
    prompts = Prompts(seed)
    tries, middling, lengthy = (3, 230, 30) if SURE_OF_HALF else (1, 125, 20)
    lengths = [*range(1, BLOCK), *[k * BLOCK + more for k in MULTIPLES for more in (-1, 0, 1)]]
    lengths += [LONGEST // 2, LONGEST - 1, LONGEST]
    groups = [[prompts.one(n) for _ in range(tries)] for n in lengths]
    singles = [prompts.one(prompts.below(BLOCK + 1, 700)) for _ in range(middling)]
    singles += [prompts.one(prompts.below(700, 2500)) for _ in range(lengthy)]
    return await best_of(answers, groups, margin=margin) + await cases(answers, singles, margin=margin, least=ENOUGH)


async def plainly(client: Client, server: Server, wanted: Sequence[Case], at_a_time: int = 8) -> None:
    """Assert that a server answers all cases alone."""
    jobs = [partial(client.complete, server, case.prompt, len(case.tokens)) for case in wanted]
    assert_equal(wanted, await in_parallel(at_a_time, jobs))


async def handed_over(
    client: Client,
    wanted: Sequence[Case],
    prefill: Callable[[int], Server],
    decode: Server,
    order: Order,
    at_a_time: int = 16,
) -> list[Handed]:
    """Hand all cases over, case ``i`` from ``prefill(i)``, and assert that the tokens are right."""
    jobs = [
        partial(hand_off, client, prefill(i), decode, case.prompt, len(case.tokens), order)
        for i, case in enumerate(wanted)
    ]
    handed = await in_parallel(at_a_time, jobs)
    failed = [f"{h.transfer}: {h.prefill_error}" for h in handed if h.prefill_error]
    assert not failed, f"prefill failed {len(failed)} of {len(handed)}: {failed[:3]}"
    assert_equal(wanted, handed)
    return handed


def assert_equal(wanted: Sequence[Case], got: Sequence[Handed | Answer]) -> None:
    """Raises WrongAnswer naming the first prompts whose tokens differ from the plain server's."""
    wrong = []
    for case, answer in zip(wanted, got, strict=True):
        if tuple(answer.tokens) != case.tokens:
            wrong.append(f"{len(case.prompt)} tokens: {list(case.tokens)} expected, {answer.tokens} came")
    if wrong:
        differ = f"{len(wrong)} of {len(wanted)} answers differ from the plain server's: "
        raise WrongAnswer(differ + "; ".join(wrong[:5]))
