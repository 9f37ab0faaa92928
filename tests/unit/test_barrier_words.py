"""Words that streams of a GPU wait for are let through once, in order, and in time, whoever forgets them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pdtransport.kernels import pages
from pdtransport.kernels._cuda import let_go

pytestmark = pytest.mark.skipif(pages.BACKEND != "c", reason="needs the C kernels")
NS = 1_000_000_000
WAIT_S = 30.0


class Word:
    def __init__(self, value: int = 0) -> None:
        self.array = np.array([value], dtype=np.uint32)

    def close(self, ticket: int, seconds: float = WAIT_S) -> bool:
        return bool(c().pdt_barrier_close(self.array.ctypes.data, ticket, int(seconds * NS)) == 0)

    def open(self, ticket: int) -> bool:
        return bool(c().pdt_barrier_open(self.array.ctypes.data, ticket))

    @property
    def value(self) -> int:
        return int(self.array[0])


def c() -> Any:
    assert pages._C is not None
    return pages._C


@pytest.fixture
def word() -> Iterator[Word]:
    yield Word()
    let_go()


def test_a_ticket_is_let_through_once(word: Word) -> None:
    assert word.close(1)
    assert word.value == 0
    assert word.open(1)
    assert word.value == 1
    assert not word.open(1)
    assert not word.open(2), "nobody closed it"
    assert word.value == 1


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_it_is_let_through_when_its_time_is_over_and_who_comes_then_is_told(word: Word, seconds: float) -> None:
    """Though this thread holds the interpreter all the while."""
    began = time.monotonic()
    assert word.close(1, seconds)
    while word.value == 0 and time.monotonic() - began < WAIT_S:
        pass
    assert word.value == 1
    assert time.monotonic() - began >= seconds
    assert not word.open(1)


def test_an_earlier_deadline_is_kept_while_a_later_one_is_waited_for(word: Word) -> None:
    other = Word()
    assert other.close(1, WAIT_S)
    time.sleep(0.02)
    assert word.close(1, 0.02)
    began = time.monotonic()
    while word.value == 0 and time.monotonic() - began < WAIT_S:
        time.sleep(0.001)
    assert (word.value, other.value) == (1, 0)
    assert other.open(1)


def test_a_later_ticket_lets_earlier_ones_through_and_none_goes_back(word: Word) -> None:
    for ticket in (1, 2, 3):
        assert word.close(ticket)
    assert word.open(2)
    assert word.value == 2
    assert not word.open(1)
    assert word.value == 2
    assert word.open(3)


def test_tickets_begin_anew_after_the_last() -> None:
    word = Word((1 << 32) - 2)
    for ticket in ((1 << 32) - 1, 0, 1):
        assert word.close(ticket)
    for ticket in ((1 << 32) - 1, 0, 1):
        assert word.open(ticket)
        assert word.value == ticket


def test_all_are_let_go_before_somebody_waits_for_the_gpu(word: Word) -> None:
    other = Word()
    assert word.close(1)
    assert other.close(7)
    let_go()
    assert (word.value, other.value) == (1, 7)
    assert not word.open(1)
    assert not other.open(7)


def test_one_too_many_is_refused_and_none_is_lost() -> None:
    words = [Word() for _ in range(65)]
    closed = [each.close(1) for each in words]
    assert closed == [True] * 64 + [False]
    assert all(each.open(1) for each in words[:64])
    assert words[64].close(1)
    assert words[64].open(1)


def test_a_forked_child_closes_nothing_that_nobody_would_open() -> None:
    """The thread that opens barriers in time is not there."""
    code = f"""
import os
from tests.unit.test_barrier_words import Word, let_go
word = Word()
assert word.close(1, {WAIT_S})
child = os.fork()
if child == 0:
    let_go()
    os._exit(3 if word.value or word.close(2) or word.open(1) else 0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert word.open(1)
assert word.close(2, 0.01)
while word.value < 2:
    pass
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S)


def test_of_many_that_open_it_one_is_the_first(word: Word) -> None:

    def opens(ticket: int, first: list[bool]) -> None:
        first.append(word.open(ticket))

    for ticket in range(1, 201):
        assert word.close(ticket)
        first: list[bool] = []
        threads = [threading.Thread(target=opens, args=[ticket, first]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(first) == [False, False, True]
