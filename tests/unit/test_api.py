"""The package as a newcomer meets it in an interpreter: names, help, and errors of one line."""

from __future__ import annotations

import pydoc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import pdtransport
from pdtransport import PDTransportError, Settings, SettingsError
from pdtransport.settings import ControlSettings, LinkSettings


def test_dir_and_help_show_the_public_names() -> None:
    assert set(pdtransport.__all__) <= set(dir(pdtransport))
    text = pydoc.plain(pydoc.render_doc(pdtransport))
    for name in pdtransport.__all__:
        assert name in text, name
    assert "Sends and receives KV pages for one worker." in text


def test_every_public_name_is_there_and_documented() -> None:
    for name in pdtransport.__all__:
        assert getattr(pdtransport, name).__doc__, name
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = pdtransport.nothing_of_the_kind


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Names are looked up when they are used; ``dir`` needs none of them either."""
    heavy = "('numpy', 'zmq', 'pydantic', 'torch')"
    code = f"import sys, pdtransport; dir(pdtransport); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (lambda: Settings(control={"prot": 1}), "control.prot: unknown key"),  # type: ignore[arg-type]
    (lambda: Settings(contrl={}), "contrl: unknown key"),  # type: ignore[call-arg]
    (lambda: ControlSettings(port=70000), "port: "),
    (lambda: ControlSettings(host="10.0.0.1"), "needs CURVE keys"),
    (lambda: LinkSettings(order=("RDMA",)), "order.0: "),
    (lambda: Settings(control=ControlSettings(port=5), model_id=" "), "model_id"),
]


@pytest.mark.parametrize(("make", "says"), MISTAKES)
def test_settings_made_in_python_fail_in_one_line_of_ours(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)
    assert isinstance(caught.value, PDTransportError)


def test_settings_within_another_model_still_tell_it_where() -> None:
    """A topology file's errors name the line of each mistake, by pydantic's own account."""

    class Whole(BaseModel):
        transport: Settings

    with pytest.raises(ValidationError) as caught:
        Whole(transport={"control": {"prot": 1}, "links": {"order": []}})  # type: ignore[arg-type]
    assert {error["loc"][:2] for error in caught.value.errors()} == {("transport", "control"), ("transport", "links")}
