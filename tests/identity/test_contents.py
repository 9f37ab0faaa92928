"""The rig's own verdicts, which need no server: what is equal by content, and what a run must complain of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.identity import contents
from tests.identity.makers import ADAPTERS, CONFIGS, OTHER_CONFIGS, SAME_CONFIGS, WEIGHTS, Model, write_adapter
from tests.identity.outcomes import Outcome, Report

pytest.importorskip("torch")


def test_weights_are_equal_by_their_tensors_alone(tmp_path: Path) -> None:
    """The same tensors in other files are the same weights; other bytes under the same names and sizes are not."""
    found = {}
    for number, (name, sharded) in enumerate((name, sharded) for name in WEIGHTS for sharded in (False, True)):
        folder = Model(name, sharded=sharded, folder=f"{number}/tiny").make(tmp_path)
        sizes = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
        found[name, sharded] = contents.weights(folder), sizes
    for name in WEIGHTS:
        assert found[name, False][0] == found[name, True][0]
        assert found[name, True][1] == found["base", True][1]
        assert found[name, False][1] == found["base", False][1]
    assert len({content for content, _ in found.values()}) == len(WEIGHTS)


def test_a_checkpoint_written_over_another_keeps_name_size_and_time(tmp_path: Path) -> None:
    """What a cache of digests might go by stays as it was, and the contents change."""
    one = Model("base").make(tmp_path)
    file = one / "model.safetensors"
    before, content = file.stat(), contents.weights(one)
    Model("kv").make(tmp_path)
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert contents.weights(one) != content


def test_configurations_are_equal_by_what_kv_depends_on(tmp_path: Path) -> None:
    """Names, versions and spelling change nothing; RoPE's base and scaling and the norm's epsilon do, and whether they
    stand in the file or in ``--hf-overrides`` does not."""
    found = {}
    for name in CONFIGS:
        model = Model(config=name, folder=f"{name}/tiny")
        model.make(tmp_path)
        found[name] = model.config_content(tmp_path)
    assert len({found[name] for name in SAME_CONFIGS}) == 1
    assert len(set(found.values())) == 1 + len(OTHER_CONFIGS)
    for name in OTHER_CONFIGS:
        model = Model(folder=f"{name}/overridden", overrides_of=name)
        model.make(tmp_path)
        assert model.config_content(tmp_path) == found[name]


def test_adapters_are_equal_by_tensors_and_scale(tmp_path: Path) -> None:
    """The name of the base model changes nothing; alpha does, though the tensors are the same."""
    found = {}
    for name in ADAPTERS:
        write_adapter(tmp_path / name, name)
        found[name] = contents.adapter(tmp_path / name)
    assert found["a"] == found["renamed a"]
    assert len(set(found.values())) == len(ADAPTERS) - 1


def outcome(**changed: object) -> Outcome:
    facts = {
        "number": 1, "verdict": "equal", "why": "", "differs": (), "labels": (), "how": "client", "pair": "a>b",
        "handed": True, "used": 64, "right": True, "off": 0.0, "telling": False,
    }  # fmt: skip
    return Outcome(**{**facts, **changed})  # type: ignore[arg-type]


REFUSED = {"verdict": "different", "differs": ("weights",), "handed": False, "used": 0, "telling": True}


def test_a_run_complains_of_what_must_not_be() -> None:
    """A wrong answer, an equal pair that is refused, a different one that is not, or is for another reason, and counts
    of ours that vLLM's contradict are failures; a pair that may be either is none."""
    right = [
        outcome(),
        outcome(**REFUSED, reason="weights differ"),
        outcome(verdict="either", why="changed meanwhile", handed=False, used=0),
    ]
    wrong = [
        outcome(right=False),
        outcome(handed=False, used=0),
        outcome(telling=True),
        outcome(used=0),
        outcome(**{**REFUSED, "handed": True, "used": 64}),
        outcome(**REFUSED, reason="model differs"),
        outcome(**REFUSED),
    ]
    assert [each.complaint for each in right] == ["", "", ""]
    assert all(each.complaint for each in wrong), wrong
    report = Report(1, [*right, *wrong])
    assert report.failed == wrong
    assert report.counts()["answers equal decode's own"] == "9 of 10"


def test_a_run_in_which_everything_answers_alike_is_void() -> None:
    """Then a wrong KV would have shown nothing."""
    alike = outcome(**{**REFUSED, "telling": False}, reason="weights differ")
    assert Report(1, [outcome(), alike]).void
    assert Report(1, [outcome()]).void
    assert not Report(1, [outcome(), outcome(**REFUSED, reason="weights differ")]).void
