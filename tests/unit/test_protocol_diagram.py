"""docs/protocol.md is drawn from the source, and says so when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdtransport.protocol import diagram
from pdtransport.protocol.states import CONSUMER_MOVES, PRODUCER_MOVES

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"


def test_the_document_is_up_to_date() -> None:
    """Run ``python -m pdtransport.protocol.diagram --write docs/protocol.md`` if this fails."""
    assert diagram.main(["--check", str(DOCUMENT)]) == 0


def test_every_move_is_drawn() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for table in (CONSUMER_MOVES, PRODUCER_MOVES):
        for old, moves in table.items():
            for new, why in moves.items():
                assert f"    {old.value} --> {new.value}: {why}\n" in text


def test_a_change_is_noticed_and_written(tmp_path: Path) -> None:
    """--check exits with 1 on an outdated file, --write repairs it, and hand-written text stays."""
    stale = tmp_path / "protocol.md"
    good = DOCUMENT.read_text(encoding="utf-8")
    stale.write_text(good.replace("granting --> waiting: Accept", "granting --> waiting: Hope"), encoding="utf-8")
    assert diagram.main(["--check", str(stale)]) == 1
    assert diagram.main(["--write", str(stale)]) == 0
    assert stale.read_text(encoding="utf-8") == good


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda text: text.replace("drawn: codes", "drawn: colours"), "no drawing 'colours'"),
        (lambda text: text.replace("<!-- drawn: codes -->", ""), "no block for 'codes'"),
    ],
)
def test_unknown_and_missing_blocks_are_refused(edit: object, complaint: str) -> None:
    with pytest.raises(diagram.DiagramError, match=complaint):
        diagram.redraw(edit(DOCUMENT.read_text(encoding="utf-8")))  # type: ignore[operator]


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diagram.main(["--write", str(tmp_path / "none.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
