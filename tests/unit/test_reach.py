"""Whom an instance calls on somebody else's word: ``control.peers``, names, and the addresses behind them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdtransport.control import names
from pdtransport.control.curve import make_keys
from pdtransport.control.reach import CallVerdict, Reach
from pdtransport.errors import SettingsError
from pdtransport.settings import ControlSettings

Resolver = Callable[[dict[str, list[str]]], list[str]]


def reach(strict: bool = True, **settings: Any) -> Reach:
    return Reach(ControlSettings(**{"allow_plaintext": True, **settings}), strict=strict)


def verdict(of: Reach, host: str) -> CallVerdict:
    """What is said of ``host`` once its name is looked up."""
    deadline = time.monotonic() + 20
    while (found := of.ask(host)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Names mean what the test says; each time that one is looked up its next addresses, the last ones for good.
    Returns the names that were looked up."""

    def means(table: dict[str, list[str]]) -> list[str]:
        asked: list[str] = []

        def answer(name: str, *_: Any, **__: Any) -> list[Any]:
            asked.append(name)
            if name not in table:
                raise socket.gaierror(-2, "Name or service not known")
            addresses = table[name].pop(0) if len(table[name]) > 1 else table[name][0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in addresses.split()]

        monkeypatch.setattr(names.socket, "getaddrinfo", answer)
        return asked

    return means


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_called_without_being_named(host: str) -> None:
    """The defaults serve one host."""
    assert verdict(reach(), host) == CallVerdict(host)


@pytest.mark.parametrize(
    "host",
    ["10.1.2.3", "0.0.0.0", "::", "169.254.169.254", "::ffff:10.1.2.3", "fe80::1", "8.8.8.8", "example.org",
     "127.0.0.1.example.org", "localhost.example.org", "[::1]", "2130706433", "0x7f.1", "x" * 255, "a..b", ".", "-"],
)  # fmt: skip
def test_no_other_machine_is_called_where_none_is_named(host: str, resolver: Resolver) -> None:
    """On loopback, loopback only: nobody is called, no name is looked up, and the reason names the setting."""
    asked = resolver({})
    found = verdict(reach(), host)
    assert not found.address
    assert "control.peers is not set" in found.problem
    assert (len(found.problem) < 300, "\n" in found.problem, asked) == (True, False, [])


def test_localhost_is_what_the_resolver_says(resolver: Resolver) -> None:
    """A resolver that sends `localhost` elsewhere sends nobody there."""
    resolver({"localhost": ["10.0.0.1 127.0.0.1"]})
    assert verdict(reach(), "LocalHost.") == CallVerdict("127.0.0.1")
    resolver({"localhost": ["10.0.0.1"]})
    assert "localhost is 10.0.0.1: " in verdict(reach(), "localhost").problem


@pytest.mark.parametrize(
    ("peers", "host", "may"),
    [
        (["10.1.0.0/16"], "10.1.2.3", True),
        (["10.1.0.0/16"], "::ffff:10.1.2.3", True),
        (["10.1.0.0/16"], "10.2.0.1", False),
        (["10.1.0.0/16"], "127.0.0.1", False),  # what is set is all there is
        (["10.1.2.3"], "10.1.2.3", True),
        (["10.1.2.3"], "10.1.2.4", False),
        (["fd00::/8"], "fd00::5", True),
        (["fd00::/8"], "fe80::5", False),
        (["0.0.0.0/0"], "fd00::5", False),
        ([], "127.0.0.1", False),
    ],
)
def test_addresses_are_called_that_the_setting_covers(peers: list[str], host: str, may: bool) -> None:
    found = verdict(reach(peers=peers), host)
    assert (found.address == host, "control.peers" in found.problem) == (may, not may)


def test_a_name_that_is_listed_is_called_at_its_address(resolver: Resolver) -> None:
    """Whatever the name means is the operator's word; how it is written does not count."""
    resolver({"prefill-1.example.org": ["fd00::7 10.9.9.9"]})
    assert verdict(reach(peers=["Prefill-1.example.org"]), "PREFILL-1.example.ORG.") == CallVerdict("10.9.9.9")


def test_a_name_that_is_not_listed_counts_by_its_address(resolver: Resolver) -> None:
    """Where networks are listed, a name may be anybody's: its address decides, and where none are, nobody asks."""
    asked = resolver({"in": ["10.1.2.3"], "out": ["10.2.0.1"], "both": ["10.2.0.1 10.1.0.9"]})
    some = reach(peers=["10.1.0.0/16", "listed"])
    assert verdict(some, "in") == CallVerdict("10.1.2.3")
    assert verdict(some, "both") == CallVerdict("10.1.0.9")
    assert verdict(some, "out").problem.startswith("out is 10.2.0.1: out is not in control.peers")
    assert "be resolved" in verdict(some, "none").problem
    before = list(asked)
    assert "control.peers" in verdict(reach(peers=["listed"]), "in").problem
    assert asked == before


def test_what_a_name_means_a_moment_later_changes_nothing(resolver: Resolver) -> None:
    """Rebinding: the address that was checked is the one that is called, for as long as the answer holds."""
    asked = resolver({"evil": ["10.1.2.3", "169.254.169.254"]})
    some = reach(peers=["10.1.0.0/16"])
    assert [verdict(some, "evil") for _ in range(3)] == [CallVerdict("10.1.2.3")] * 3
    assert asked == ["evil"]


def test_names_that_keep_the_resolver_waiting_keep_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client makes up names whose servers never answer: asking returns at once, names of the settings have answers
    meanwhile, so many wait at most, and none longer than it may."""
    stuck, threads = threading.Event(), threading.active_count()

    def answer(name: str, *_: Any, **__: Any) -> list[Any]:
        if name != "listed":
            stuck.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", 0))]

    monkeypatch.setattr(names.socket, "getaddrinfo", answer)
    now = [0.0]
    some = Reach(
        ControlSettings(allow_plaintext=True, peers=["10.1.0.0/16", "listed"], connect_s=2.0),
        strict=True,
        clock=lambda: now[0],
    )
    try:
        first = [some.ask(f"evil-{number}") for number in range(names.MAX_QUEUED + 10)]
        assert first[: names.MAX_QUEUED] == [None] * names.MAX_QUEUED
        assert all(found is not None and "exceeds the limit" in found.problem for found in first[names.MAX_QUEUED :])
        assert verdict(some, "listed") == CallVerdict("10.1.2.3")
        assert threading.active_count() - threads == 2
        now[0] = 2.0
        late = some.ask("evil-0")
        assert late is not None
        assert "the resolver did not answer for evil-0 within 2 s" in late.problem
    finally:
        stuck.set()
        some.close()


def test_an_application_calls_whom_it_likes_until_it_sets_peers(resolver: Resolver) -> None:
    """The Python API's caller passes addresses by hand: they are its own word. With ``control.peers`` the rule holds
    for it as well."""
    resolver({"anywhere": ["10.7.7.7"]})
    free = reach(strict=False)
    assert (verdict(free, "10.1.2.3"), verdict(free, "anywhere")) == (CallVerdict("10.1.2.3"), CallVerdict("10.7.7.7"))
    assert "control.peers" in verdict(reach(strict=False, peers=["10.1.0.0/16"]), "anywhere").problem


def test_beyond_loopback_the_setting_is_required() -> None:
    """An instance that other hosts reach says once, at its start, that it lacks ``control.peers``."""
    with pytest.raises(SettingsError, match=r"control\.peers is not set, and control\.host '10.0.0.1' is not"):
        reach(host="10.0.0.1")
    for peers in ([], ["10.0.0.0/8"]):
        reach(host="10.0.0.1", peers=peers)
    reach(strict=False, host="10.0.0.1")


def test_nobody_is_called_in_plaintext_whom_peers_name() -> None:
    found = verdict(Reach(ControlSettings(peers=["10.1.0.0/16"]), strict=True), "10.1.2.3")
    assert "CURVE" in found.problem


def test_a_key_is_enough_if_it_is_the_one_that_is_asked_for(tmp_path: Path, resolver: Resolver) -> None:
    """``curve:KEY`` lets anybody be called who proves KEY. libzmq asks for one key: another one could never be proved,
    and that is said at the start."""
    resolver({"anywhere": ["10.7.7.7"]})
    public, secret = make_keys(tmp_path / "ours")
    other = make_keys(tmp_path / "others")[0].read_text().strip()
    files = {"curve_public_key_file": public, "curve_secret_key_file": secret}
    key = public.read_text().strip()
    some = reach(**files, peers=[f"curve:{key}"])
    assert (verdict(some, "10.1.2.3"), verdict(some, "anywhere")) == (CallVerdict("10.1.2.3"), CallVerdict("10.7.7.7"))
    with pytest.raises(SettingsError, match=r"none of its CURVE keys .*control\.curve_server_key"):
        reach(**files, peers=[f"curve:{other}"])
    reach(**files, peers=[f"curve:{other}"], curve_server_key=other)


@pytest.mark.parametrize(
    ("peer", "is_kept_as"),
    [
        ("10.1.0.0/16", "10.1.0.0/16"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("FD00::5", "fd00::5/128"),
        ("Prefill-1.Example.org.", "prefill-1.example.org"),
        ("node_7", "node_7"),
        ("a" * 40, "a" * 40),  # a name, though it could be a key
        ("0.0.0.0/0", "0.0.0.0/0"),
    ],
)
def test_what_peers_may_be(peer: str, is_kept_as: str) -> None:
    assert ControlSettings(peers=[peer]).peers == (is_kept_as,)


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        ("10.1.2.3/16", "write 10.1.0.0/16, or only the address"),
        ("10.1.0.0/33", "not an address, network"),
        ("10.1.256.1", "not an address, network"),
        ("127.1", "not an address, network"),
        ("", "not an address, network"),
        ("a b", "not an address, network"),
        ("a\nb", "not an address, network"),
        ("host:7670", "not an address, network"),
        ("-a", "not an address, network"),
        ("a" * 64, "not an address, network"),
        (".".join(["a" * 60] * 5), "not an address, network"),
        ("*.example.org", "no wildcards: 0.0.0.0/0 and ::/0 are all addresses"),
        ("!" * 40, "a CURVE public key is written curve:KEY"),
        ("curve:short", "must be followed by a CURVE public key of 40 characters"),
        ("curve:" + "a" * 40, "set curve_public_key_file and curve_secret_key_file"),
    ],
)
def test_a_peer_that_can_not_be_is_refused_in_one_line(peer: str, says: str) -> None:
    with pytest.raises(SettingsError) as raised:
        ControlSettings(peers=["10.0.0.0/8", peer])
    text = str(raised.value)
    assert "peers" in text
    assert says in text
    assert "\n" not in text
    assert len(text) < 300
