"""Which link carries a pair: the first that both ends can use, the required one or none, and nothing left open."""

from __future__ import annotations

import fcntl
import os
from typing import Any

import pytest

from pdtransport.errors import LinkUnavailable
from pdtransport.kv.geometry import HOST, Region
from pdtransport.links import mapping
from pdtransport.links.base import Link
from pdtransport.links.negotiate import choose, open_links
from pdtransport.links.registry import load, names
from pdtransport.settings import LinkSettings


class OneChannel:
    def __init__(self, name: str, attaches: bool) -> None:
        self.link, self.why, self._attaches = name, f"{name}: works", attaches
        self.closed = False

    def attach(self) -> None:
        if not self._attaches:
            raise LinkUnavailable("it can't attach")

    def close(self) -> None:
        self.closed = True


class OneLink:
    """A link that can or can't connect, and attach."""

    def __init__(self, name: str, *, connects: bool = True, attaches: bool = True) -> None:
        self._name, self._connects, self._attaches = name, connects, attaches
        self.opened: list[OneChannel] = []

    def connect(self, peer_export: bytes, peer_host: str) -> OneChannel:
        if not self._connects:
            raise LinkUnavailable("it can't connect")
        self.opened.append(OneChannel(self._name, self._attaches))
        return self.opened[-1]


def chosen(links: dict[str, Any], require: str | None = None, offers: str = "abc") -> Any:
    return choose(links, {"z": "not built"}, ("z", "a", "b", "c"), require, dict.fromkeys(offers, b""), "h")


def test_the_first_that_works_is_taken_and_says_why_not_a_better_one() -> None:
    links = {"a": OneLink("a", connects=False), "b": OneLink("b"), "c": OneLink("c")}
    channel = chosen(links)
    assert channel.why == "b: works; z unavailable: not built; a unavailable: it can't connect"
    assert links["c"].opened == []


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_required_link_is_the_only_one_that_is_tried(name: str) -> None:
    """links.require: its place in the order does not matter, and no other carries the pair if it can't."""
    links = {each: OneLink(each) for each in "abc"}
    assert chosen(links, require=name).link == name
    assert [each for each, link in links.items() if link.opened] == [name]
    links[name] = OneLink(name, connects=False)
    with pytest.raises(LinkUnavailable, match=f"links.require is '{name}', but it can't be used: it can't connect"):
        chosen(links, require=name)
    with pytest.raises(LinkUnavailable, match="the peer does not offer it"):
        chosen(links, require=name, offers="")


def test_a_link_that_can_not_attach_is_closed_before_the_next_is_tried() -> None:
    """What it holds of the peer (a mapping, a descriptor) is given back."""
    links = {"a": OneLink("a", attaches=False), "b": OneLink("b")}
    assert chosen(links).link == "b"
    assert [channel.closed for channel in links["a"].opened + links["b"].opened] == [True, False]


def test_only_memory_that_can_not_shrink_is_mapped() -> None:
    """A peer that truncates its file would kill whoever reads it: without the seal, its memory is not touched."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    reading, writing = os.pipe()
    try:
        os.ftruncate(fd, 4096)
        with pytest.raises(LinkUnavailable, match="is not sealed memory"):
            mapping._open(os.getpid(), fd)
        with pytest.raises(LinkUnavailable, match="is not memory"):
            mapping._open(os.getpid(), reading)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, mapping.F_SEAL_SHRINK)
        os.close(mapping._open(os.getpid(), fd))
    finally:
        for each in (fd, reading, writing):
            os.close(each)


def region(device: int = HOST) -> Region:
    return Region(1 << 20, 4096, device=device)


def opening(monkeypatch: pytest.MonkeyPatch, *broken: str) -> list[str]:
    """Links open without their libraries; those of ``broken`` do not, and "crash NAME" ends in an error of
    another kind. Returns the names of those that were closed."""
    closed: list[str] = []

    def open_one(kind: type[Link], regions: object, settings: object) -> Any:
        if kind.name in broken:
            raise LinkUnavailable(f"{kind.name} is broken")
        if f"crash {kind.name}" in broken:
            raise RuntimeError("no luck")
        return type("Opened", (), {"close": lambda self: closed.append(kind.name)})()

    for name in names():
        monkeypatch.setattr(load(name), "open", classmethod(open_one))
    return closed


@pytest.mark.parametrize(
    ("device", "opens", "elsewhere"),
    [(HOST, ["shm", "cma", "ucx"], ["cuda_ipc"]), (0, ["cuda_ipc", "ucx"], ["shm", "cma"])],
)
def test_links_for_memory_of_the_other_kind_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, device: int, opens: list[str], elsewhere: list[str]
) -> None:
    """Without a word in the log: they are no fault. Required, they are refused by name."""
    opening(monkeypatch)
    settings = LinkSettings(order=("cuda_ipc", "shm", "cma", "ucx"))
    opened = open_links(settings, [region(device)])
    assert (list(opened.links), list(opened.elsewhere), opened.unavailable) == (opens, elsewhere, {})
    for name in elsewhere:
        with pytest.raises(LinkUnavailable, match=rf"links.require is '{name}', but it can't be used: KV is in"):
            open_links(settings.model_copy(update={"require": name}), [region(device)])


def test_a_required_link_is_the_only_one_that_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opening(monkeypatch)
    opened = open_links(LinkSettings(order=("cma", "ucx"), require="shm"), [region()])
    assert list(opened.links) == ["shm"]


def test_a_link_that_does_not_work_here_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX that is not installed, say: the others serve, and each pair's `why` repeats the reason."""
    opening(monkeypatch, "ucx")
    opened = open_links(LinkSettings(order=("cma", "ucx")), [region()])
    assert (list(opened.links), opened.unavailable) == (["cma"], {"ucx": "ucx is broken"})


def test_a_link_that_crashes_leaves_no_other_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker does not start; what was opened before is given back."""
    closed = opening(monkeypatch, "crash ucx")
    with pytest.raises(RuntimeError, match="no luck"):
        open_links(LinkSettings(order=("cma", "shm", "ucx")), [region()])
    assert closed == ["cma", "shm"]


def test_a_worker_that_no_link_serves_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says why, of each; a required one that is broken names the setting."""
    opening(monkeypatch, "cma", "ucx")
    why = "cuda_ipc unavailable: KV is in host memory; cma unavailable: cma is broken"
    with pytest.raises(LinkUnavailable, match=why):
        open_links(LinkSettings(order=("cuda_ipc", "cma", "ucx")), [region()])
    with pytest.raises(LinkUnavailable, match=r"links.require is 'cma', but it can't be used: cma is broken"):
        open_links(LinkSettings(order=("shm", "cma"), require="cma"), [region()])
