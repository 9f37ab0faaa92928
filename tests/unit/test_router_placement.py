"""Placement: the least loaded server, unless one with the same prefix is at most a margin busier."""

from __future__ import annotations

import time

from pdtransport.router.endpoints import Endpoint, Role, usable
from pdtransport.router.placement import Affinity, Placer
from pdtransport.router.settings import EndpointSettings, RouterPlacement

KEYS = (b"one", b"two", b"three")


def endpoints(count: int, role: Role = "decode") -> list[Endpoint]:
    return [Endpoint(role, EndpointSettings(url=f"http://h:{index + 1}")) for index in range(count)]


def placer(**more: int) -> Placer:
    return Placer(RouterPlacement(**{"affinity_margin_requests": 2, "affinity_margin_tokens": 100, **more}))


def test_equal_loads_are_served_in_turn() -> None:
    servers, place = endpoints(3), placer()
    assert [place.choose("decode", (), servers) for _ in range(6)] == servers * 2


def test_least_loaded_server_is_chosen_by_tokens_for_prefill_and_requests_for_decode() -> None:
    for role, loads, best in (("prefill", [(10, 1), (1, 9), (5, 5)], 1), ("decode", [(1, 9), (9, 1), (5, 5)], 1)):
        servers = endpoints(3, role)  # type: ignore[arg-type]
        for server, (tokens, requests) in zip(servers, loads, strict=True):
            server.inflight_tokens, server.inflight = tokens, requests
        assert placer().choose(role, (), servers) is servers[best]  # type: ignore[arg-type]


def test_shared_prefix_returns_to_its_server_until_that_is_a_margin_busier() -> None:
    servers, place = endpoints(3), placer()
    home = place.choose("decode", KEYS, servers)
    assert home is not None
    home.inflight = 2
    assert place.choose("decode", (*KEYS[:2], b"other"), servers) is home
    home.inflight = 3
    away = place.choose("decode", KEYS, servers)
    assert away is not home
    home.inflight = 0
    assert place.choose("decode", KEYS, servers) is away  # its pages are there now, too, and more recent


def test_longest_prefix_wins() -> None:
    first, second, _ = endpoints(3)
    affinity = Affinity(10)
    affinity.remember(KEYS, first)
    affinity.remember((*KEYS[:1], b"x"), second)
    assert affinity.find(KEYS, [first, second]) is first
    assert affinity.find((KEYS[0], b"x", b"y"), [first, second]) is second
    assert affinity.find(KEYS, [second]) is second  # the best one can't be used
    assert affinity.find((b"unknown",), [first]) is None


def test_affinity_is_bounded_and_forgets_the_least_recently_used() -> None:
    (server,) = endpoints(1)
    affinity = Affinity(4)
    for index in range(100):
        affinity.remember((b"hot", b"%d" % index), server)
    assert len(affinity) == 4
    assert affinity.find((b"hot",), [server]) is server
    off = Affinity(0)
    off.remember(KEYS, server)
    assert len(off) == 0


def test_roles_do_not_share_affinity() -> None:
    prefill, decode, place = endpoints(2, "prefill"), endpoints(2), placer()
    place.choose("prefill", KEYS, prefill)
    assert place.choose("decode", KEYS, decode) in decode


def test_unhealthy_servers_are_never_usable_and_failing_ones_only_as_the_last_resort() -> None:
    one, two = endpoints(2)
    one.ejected_until = time.monotonic() + 60
    assert usable([one, two]) == [two]
    two.set_healthy(False, "x")
    assert usable([one, two]) == [one]
    assert usable([one, two], without=[one]) == []
    assert placer().choose("decode", KEYS, usable([two])) is None


def test_work_is_counted_out_exactly_once() -> None:
    (server,) = endpoints(1)
    end = server.begin(100)
    server.begin(5)
    end()
    end()
    assert (server.inflight, server.inflight_tokens) == (1, 5)
