"""Policies: each evicts in the order it is named for, and none loses or doubles a chunk."""

from __future__ import annotations

import random

import pytest

from pdtransport.pool.core.eviction import POLICIES, S3_TURNS, Links, Policy, PolicyName, make_policy


def filled(name: PolicyName, count: int = 6) -> Policy:
    policy = make_policy(name, Links(64))
    for entry in range(count):
        policy.add(entry, entry)
    return policy


def drained(policy: Policy) -> list[int]:
    return [policy.evict(lambda _: True) for _ in range(len(policy))]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("fifo", [0, 1, 2, 3, 4, 5]),
        ("lru", [1, 3, 4, 5, 2, 0]),
        ("mru", [0, 2, 5, 4, 3, 1]),
        ("lfu", [1, 3, 4, 5, 2, 0]),  # 0 was read twice
        ("s3fifo", [1, 2, 3, 4, 5, 0]),  # read once is not enough to stay
    ],
)
def test_order_of_eviction(name: PolicyName, order: list[int]) -> None:
    """What goes first is what the policy's name says."""
    policy = filled(name)
    for entry in (0, 2, 0):
        policy.touch(entry)
    assert drained(policy) == order
    assert policy.evict(lambda _: True) == -1


@pytest.mark.parametrize("name", POLICIES)
def test_a_referenced_chunk_is_passed_over(name: PolicyName) -> None:
    """Eviction skips what may not go, says so when nothing may, and takes it later."""
    policy = filled(name)
    assert policy.evict(lambda _: False) == -1
    assert policy.evict(lambda entry: entry == 3) == 3
    assert sorted(drained(policy)) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_lost_or_doubled(name: PolicyName) -> None:
    """After any mix of steps a policy holds exactly what came in and did not leave."""
    chance, policy, inside = random.Random(7), make_policy(name, Links(64)), set()
    for _ in range(5000):
        step, entry = chance.random(), chance.randrange(64)
        if entry not in inside and step < 0.5:
            policy.add(entry, entry % 50)
            inside.add(entry)
        elif entry in inside and step < 0.7:
            policy.touch(entry)
        elif entry in inside and step < 0.8:
            policy.remove(entry)
            inside.remove(entry)
        elif step > 0.9:
            gone = policy.evict(lambda entry: entry % 5 != 0)
            assert gone == -1 or gone % 5
            inside.discard(gone)
        assert len(policy) == len(inside)
    assert set(drained(policy)) == inside


def test_s3fifo_keeps_what_is_read_through_a_scan() -> None:
    """A scan of chunks that nobody reads again does not push out those that are read."""
    policy = make_policy("s3fifo", Links(1024))
    for entry in range(10):
        policy.add(entry, entry)
        policy.touch(entry)
        policy.touch(entry)
    for entry in range(10, 1000):
        policy.add(entry, entry)
        if len(policy) > 100:
            assert policy.evict(lambda _: True) >= 10


def test_s3fifo_remembers_what_it_evicted_too_early() -> None:
    """A chunk that comes back soon after it went is kept longer than new ones."""
    policy = filled("s3fifo", 20)
    assert policy.evict(lambda _: True) == 0
    policy.add(0, 0)
    assert drained(policy)[-1] == 0


def test_s3fifo_does_not_walk_for_ever() -> None:
    """One eviction takes a bounded number of steps, even if every chunk was read often."""
    count = 4 * S3_TURNS
    policy = make_policy("s3fifo", Links(count))
    for entry in range(count):
        policy.add(entry, entry)
        for _ in range(3):
            policy.touch(entry)
    asked = 0

    def usable(_entry: int) -> bool:
        nonlocal asked
        asked += 1
        return True

    assert policy.evict(usable) >= 0
    assert asked <= S3_TURNS
