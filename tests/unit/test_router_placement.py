"""``least_loaded``: the least loaded server, unless one with the same prefix is at most a margin busier."""

from __future__ import annotations

import time

from pdtransport.router.endpoints import Endpoint, usable
from pdtransport.router.placement.base import RequestView, Role, ServerView
from pdtransport.router.placement.least_loaded import Affinity, LeastLoaded
from pdtransport.router.settings import EndpointSettings, RouterPlacement

KEYS = (b"one", b"two", b"three")


def endpoints(count: int, role: Role = "decode") -> list[Endpoint]:
    return [Endpoint(role, EndpointSettings(url=f"http://h:{index + 1}")) for index in range(count)]


def servers(*loads: int) -> list[ServerView]:
    return [ServerView(f"s{index}", "http://h:1", 0, 0, load) for index, load in enumerate(loads)]


def request(keys: tuple[bytes, ...] = (), role: Role = "decode") -> RequestView:
    return RequestView(role, "", "m", False, 1, 1, keys)


def policy(**more: int) -> LeastLoaded:
    return LeastLoaded(RouterPlacement(**{"affinity_margin_requests": 2, "affinity_margin_tokens": 100, **more}))


def test_equal_loads_are_served_in_turn() -> None:
    place = policy()
    assert [place.choose(request(), servers(0, 0, 0)) for _ in range(6)] == ["s0", "s1", "s2"] * 2


def test_least_loaded_server_is_chosen_by_tokens_for_prefill_and_requests_for_decode() -> None:
    """What a policy sees of a server is its work under way, and load is what counts for the role."""
    for role, best in (("prefill", 1), ("decode", 0)):
        three = endpoints(3, role)  # type: ignore[arg-type]
        three[0].begin(10)
        for _ in range(9):
            three[1].begin(0)
        for _ in range(5):
            three[2].begin(1)
        views = [server.view for server in three]
        assert [(view.requests, view.prompt_tokens) for view in views] == [(1, 10), (9, 0), (5, 5)]
        assert policy().choose(request(role=role), views) == three[best].name  # type: ignore[arg-type]


def test_shared_prefix_returns_to_its_server_until_that_is_a_margin_busier() -> None:
    place = policy()
    assert place.choose(request(KEYS), servers(0, 0, 0)) == "s0"
    assert place.choose(request((*KEYS[:2], b"other")), servers(2, 0, 0)) == "s0"
    away = place.choose(request(KEYS), servers(3, 0, 0))
    assert away != "s0"
    assert place.choose(request(KEYS), servers(0, 0, 0)) == away  # its pages are there now, too, and more recent


def test_longest_prefix_wins() -> None:
    first, second, _ = servers(0, 0, 0)
    affinity = Affinity(10)
    affinity.remember(KEYS, first.name)
    affinity.remember((*KEYS[:1], b"x"), second.name)
    assert affinity.find(KEYS, [first, second]) is first
    assert affinity.find((KEYS[0], b"x", b"y"), [first, second]) is second
    assert affinity.find(KEYS, [second]) is second  # the best one can't be used
    assert affinity.find((b"unknown",), [first]) is None


def test_affinity_is_bounded_and_forgets_the_least_recently_used() -> None:
    (server,) = servers(0)
    affinity = Affinity(4)
    for index in range(100):
        affinity.remember((b"hot", b"%d" % index), server.name)
    assert len(affinity) == 4
    assert affinity.find((b"hot",), [server]) is server
    off = Affinity(0)
    off.remember(KEYS, server.name)
    assert len(off) == 0


def test_roles_do_not_share_affinity() -> None:
    """Servers of both roles may have the same name."""
    place = policy()
    assert place.choose(request(KEYS, "prefill"), servers(1, 0)) == "s1"
    assert place.choose(request(KEYS), servers(0, 1)) == "s0"


def test_unhealthy_servers_are_never_usable_and_failing_ones_only_as_the_last_resort() -> None:
    one, two = endpoints(2)
    one.ejected_until = time.monotonic() + 60
    assert usable([one, two]) == [two]
    two.set_healthy(False, "x")
    assert usable([one, two]) == [one]
    assert usable([one, two], without=[one]) == []


def test_work_is_counted_out_exactly_once() -> None:
    (server,) = endpoints(1)
    end = server.begin(100)
    server.begin(5)
    end()
    end()
    assert (server.inflight, server.inflight_tokens) == (1, 5)
    assert (server.view.requests, server.view.prompt_tokens) == (1, 5)
