"""Memory that a flood took goes back to the system, and a trim never runs in the midst of work that needs it again."""

from __future__ import annotations

from pdtransport.system.reclaim import AFTER_S, ENOUGH, LATEST_S, Reclaim


def trims(reclaim: Reclaim) -> list[float]:
    """Takes the place of the C library's trim; the list fills with times, by ``tick``'s clock."""
    times: list[float] = []
    reclaim._trim = lambda _pad: times.append(reclaim.now)  # type: ignore[attr-defined]
    return times


def run(reclaim: Reclaim, seconds: float, freed: dict[float, int]) -> None:
    """Ticks ten times a second."""
    for n in range(round(10 * seconds)):
        reclaim.now = n / 10  # type: ignore[attr-defined]
        if amount := freed.get(reclaim.now):  # type: ignore[attr-defined]
            reclaim.freed(reclaim.now, amount)  # type: ignore[attr-defined]
        reclaim.tick(reclaim.now)  # type: ignore[attr-defined]


def test_one_trim_follows_a_flood_once_it_has_ceased() -> None:
    """Not before, and no second one."""
    reclaim = Reclaim()
    times = trims(reclaim)
    run(reclaim, 10.0, {0.0: ENOUGH, 0.5: 1, 1.0: 1})
    assert times == [1.0 + AFTER_S]


def test_little_is_left_alone() -> None:
    """A quiet server pays nothing."""
    reclaim = Reclaim()
    times = trims(reclaim)
    run(reclaim, 10.0, {float(n): 1 for n in range(9)})
    assert times == []
    assert reclaim.next_deadline() is None


def test_what_does_not_cease_is_not_waited_for_without_an_end() -> None:
    """A health check every half second must not keep a flood's memory for ever."""
    reclaim = Reclaim()
    times = trims(reclaim)
    run(reclaim, 2 * LATEST_S, {0.0: ENOUGH, **{n / 2: 1 for n in range(1, 40)}})
    assert times == [LATEST_S]
