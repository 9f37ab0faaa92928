"""Links by name: what the registry knows, what it demands of a link's class, and what settings may say of links."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdtransport import KVGeometry, Settings, Transport
from pdtransport.errors import SettingsError
from pdtransport.links.base import Channel, Link
from pdtransport.links.registry import check_links, host_links, load, names
from pdtransport.settings import LinkSettings

OUTSIDE = """
from pdtransport.links.cma import CmaLink

class Fine(CmaLink):
    name, memory, one_host, needs_checksums = "fine", ("host", "gpu"), False, False

class Renamed(Fine):
    name = "other"

class Vague(Fine):
    name, memory = "vague", ()

class Wrong(Fine):
    name, memory = "wrong", ("host", "tape")

class Undecided(Fine):
    name, one_host = "undecided", None

def function(): ...
"""
POINTS = """[pdtransport.links]
fine = pdt_links:Fine
renamed = pdt_links:Renamed
vague = pdt_links:Vague
wrong = pdt_links:Wrong
undecided = pdt_links:Undecided
function = pdt_links:function
absent = pdt_links:Absent
cma = pdt_links:Fine
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package of somebody else's."""
    (tmp_path / "pdt_links.py").write_text(OUTSIDE)
    info = tmp_path / "pdt_links-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pdt-links\nVersion: 1\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("pdt_links", None)


def test_our_links_are_found_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout on PYTHONPATH, where no metadata says that anything is installed."""
    monkeypatch.setattr("pdtransport.plugins.entry_points", lambda **_: ())
    assert names() == ["cma", "cuda_ipc", "shm", "ucx"]
    stated = {name: (load(name).memory, load(name).one_host, load(name).needs_checksums) for name in names()}
    assert stated == {
        "cma": (("host",), True, True),
        "cuda_ipc": (("gpu",), True, True),
        "shm": (("host",), True, True),
        "ucx": (("host", "gpu"), False, False),
    }


def test_the_defaults_name_links_that_there_are() -> None:
    check_links(Settings())
    assert LinkSettings().order == ("cuda_ipc", "cma", "ucx")


def test_links_of_other_packages_stand_beside_ours(outside: None) -> None:
    """By their entry points; nobody takes the place of one of ours."""
    assert {"cma", "fine", "shm"} < set(names())
    assert load("fine").__module__ == "pdt_links"
    assert load("cma").__module__ == "pdtransport.links.cma"
    check_links(Settings(links=LinkSettings(order=("fine", "ucx"), require="fine")))


@pytest.mark.parametrize(
    ("links", "says"),
    [
        ({"order": ["cma", "rdma"]}, r"^links\.order\.1: there is no link 'rdma', only .*cuda_ipc, fine, "),
        ({"require": "rdma"}, r"^links\.require: there is no link 'rdma', only .*: correct the name or install"),
    ],
)
def test_an_unknown_link_is_named_with_those_there_are(outside: None, links: dict[str, Any], says: str) -> None:
    """One line, when a transport opens, before a port or a link is."""
    settings = Settings.parse({"links": links})
    with pytest.raises(SettingsError, match=says) as caught:
        Transport(KVGeometry.of_array(np.zeros((1, 1, 1, 1, 8), dtype=np.uint8)), settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("renamed", "must state name = 'renamed'"),
        ("vague", "memory = a tuple of 'host' and 'gpu'"),
        ("wrong", "memory = a tuple of 'host' and 'gpu'"),
        ("undecided", "and one_host"),
        ("function", "is not a subclass of pdtransport.links.base.Link"),
        ("absent", "can't be loaded: AttributeError"),
    ],
)
def test_a_class_that_does_not_say_what_it_can_is_refused(outside: None, name: str, says: str) -> None:
    with pytest.raises(SettingsError, match=rf"link {name}: pdt_links:\w+ .*{says}"):
        load(name)


def test_links_that_need_checksums_are_refused_without(outside: None) -> None:
    """Promise 1: pages that changed while they moved are noticed, by the link or by checksums."""
    off = {"integrity": {"checksum": "off"}}
    for links, refused in (({}, "cuda_ipc and cma"), ({"order": ["shm", "ucx"]}, "shm"), ({"require": "cma"}, "cma")):
        with pytest.raises(SettingsError, match=f"integrity.checksum: off needs links.order without {refused}: only"):
            check_links(Settings.parse({**off, "links": links}))
    for links in ({"order": ["ucx"]}, {"order": ["fine", "ucx"]}, {"require": "ucx"}):
        check_links(Settings.parse({**off, "links": links}))


def test_the_pools_chunks_take_links_for_host_memory(outside: None) -> None:
    """Between hosts: those of the engine's order that can, else a default that reaches any host; unverified bytes only
    over links that vouch for them."""
    assert host_links(("cuda_ipc", "fine", "cma", "ucx"), checksums=True) == ("fine", "cma", "ucx")
    assert host_links(("cuda_ipc", "cma", "ucx"), checksums=False) == ("ucx",)
    assert host_links(("cuda_ipc",), checksums=True) == ("ucx",)


def test_the_guide_describes_the_whole_interface() -> None:
    """docs/adding/link.md leaves out no method of a link or a channel, and nothing that a class states."""
    guide = (Path(__file__).parents[2] / "docs" / "adding" / "link.md").read_text()
    methods = [name for kind in (Link, Channel) for name in vars(kind) if callable(getattr(kind, name, 0))]
    for name in [*methods, "name", "memory", "one_host", "needs_checksums"]:
        assert name.startswith("_") or f"`{name}(" in guide or f"`{name}`" in guide, name
