"""docs/reference is made from the models, says so when it is out of date, and leaves nothing out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from pdtransport.pool.remote import remote_messages  # noqa: F401 - its messages are subclasses then
from pdtransport.protocol.messages import Message
from scripts import reference
from scripts.reference import FOLDER, ReferenceGap, Tree, Wire

SETTINGS, MESSAGES = FOLDER / "settings.md", FOLDER / "messages.md"


def test_the_pages_are_up_to_date() -> None:
    """Run ``python -m scripts.reference --write`` if this fails: readers find each setting and message as it is."""
    assert reference.main(["--check"]) == 0


def test_a_stale_page_is_noticed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--check exits with 1 and names the page that is out of date, or missing; --write mends it."""
    (tmp_path / "settings.md").write_text(SETTINGS.read_text(encoding="utf-8").replace("4 MiB", "5 MiB", 1))
    (tmp_path / "messages.md").write_text(MESSAGES.read_text(encoding="utf-8"))
    assert reference.main(["--check"], tmp_path) == 1
    assert "settings.md not up to date: run python -m scripts.reference --write" in capsys.readouterr().err
    (tmp_path / "messages.md").unlink()
    assert reference.main(["--write"], tmp_path) == 0
    assert reference.main(["--check"], tmp_path) == 0


def kinds(message: type[Message]) -> list[type[Message]]:
    below = [kind for each in message.__subclasses__() for kind in kinds(each)]
    return [message, *below] if isinstance(message.model_fields["kind"].default, str) else below


def test_every_message_is_listed_once() -> None:
    """Whoever adds a message to a wire finds it on the page; none is left out, none is there twice."""
    ours = sorted(each.__name__ for each in kinds(Message) if each.__module__.startswith("pdtransport."))
    assert sorted(re.findall(r"^### (\w+)$", reference.messages_page(), re.MULTILINE)) == ours


@pytest.mark.parametrize(
    ("name", "unit"),
    [("ack_s", "s"), ("tries_per_s", "per s"), ("rate_bytes_s", "bytes/s"), ("batch_bytes", "bytes"), ("world", "")],
)
def test_a_names_end_is_its_unit(name: str, unit: str) -> None:
    assert reference.unit_of(name) == unit


def test_every_setting_is_listed_once() -> None:
    """All paths that a model accepts have one row each."""
    listed = re.findall(r"^\| `([^`]+)` \|", reference.settings_page(), re.MULTILINE)
    for tree in reference.TREES:
        assert {f"{tree.path}{name}" for name in tree.model.model_fields} <= set(listed)
    for path in ("control.port", "{prefill,decode}[].url", "disk.bytes", "tiers.NAME.options", "hosts.NAME.via"):
        assert listed.count(path) == 1, path


@pytest.mark.parametrize("page", ["settings.md", "messages.md"])
def test_links_within_the_reference_lead_somewhere(page: str) -> None:
    """Each link of a page has a title that it leads to, in this page or in the document that it names."""
    text = reference.PAGES[page]()
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", re.sub("`[^`]*`", "", text)):
        there = text if not target else (FOLDER / target).read_text(encoding="utf-8")
        titles = {reference.anchor(title) for title in re.findall(r"^#+ (.+)$", there, re.MULTILINE)}
        assert not anchor or anchor in titles, f"{target}#{anchor}"


class _Inner(BaseModel):
    """A section."""

    size_bytes: int = Field(3 << 20, ge=1, description="How *much* of a|b.")


class _Outer(BaseModel):
    one: _Inner = _Inner()
    other: _Inner = _Inner()
    wait_s: float = Field(gt=0, le=2, description="How long.")


class _FromNobody(BaseModel):
    """Somebody: says something."""

    kind: str = "nothing"


class _Undescribed(BaseModel):
    thing: int = 1


def test_a_row_has_path_type_bounds_default_unit_and_text() -> None:
    """What a reader looks up is in the row; sections of one kind share one table; Markdown's own signs do no harm."""
    (_, top), (title, inner) = reference.sections(Tree("t", "", _Outer))
    assert title == "t: `{one,other}`"
    assert "| `one` | [section](#t-oneother) |  |  | A section. |" in top
    assert "| `wait_s` | number, > 0, ≤ 2 | required | s | How long. |" in top
    assert r"| `{one,other}.size_bytes` | integer, ≥ 1 | 3 MiB | bytes | How \*much\* of a\|b. |" in inner


def test_a_setting_without_description_is_refused() -> None:
    with pytest.raises(ReferenceGap, match=r"_Undescribed\.thing has no description"):
        list(reference.sections(Tree("t", "", _Undescribed)))


def test_a_message_without_sender_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "WIRES", (Wire("w", "", (_FromNobody,)),))
    assert reference.main(["--write"], tmp_path) == 2
    assert capsys.readouterr().err.startswith(
        "reference: _FromNobody: its docstring must begin with the sender: Consumer,"
    )
