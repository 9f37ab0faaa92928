"""The checkpoint's identity is that of the files that vLLM loads, and is there when the model is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from pdtransport.errors import SettingsError
from pdtransport.kv.checkpoint import FILES, TENSORS, digest_tensors
from pdtransport.settings import Settings
from pdtransport.vllm import checkpoint
from pdtransport.vllm.checkpoint import CheckpointDigest, NoFiles, checkpoint_identity, weight_files
from tests.rig.checkpoints import alter
from tests.rig.servers import TINY_LM

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "_begun", {})


def config(model: Path | str, load_format: str = "auto", **more: Any) -> Any:
    from vllm.config.load import LoadConfig

    load = LoadConfig(load_format=load_format, **more)
    return SimpleNamespace(model_config=SimpleNamespace(model=str(model), revision=None), load_config=load)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_LM, tmp_path / "model"))


def test_an_inner_layer_counts(model: Path) -> None:
    """Two checkpoints that differ in the keys and values of one inner layer, of the same names, sizes and ends, are not
    equal; nor is one that was replaced in place; a copy at another path is."""
    first = checkpoint_identity(config(TINY_LM), Settings())
    assert first.startswith("safetensors:")
    assert checkpoint_identity(config(model), Settings()) == first
    alter(model)
    checkpoint._begun.clear()
    assert checkpoint_identity(config(model), Settings()) != first
    alter(model)
    checkpoint._begun.clear()
    assert checkpoint_identity(config(model), Settings()) == first


def test_a_file_that_vllm_does_not_load_does_not_matter(model: Path) -> None:
    """Where there is an index, vLLM loads what it names."""
    (file,) = model.glob("*.safetensors")
    shutil.copy(file, model / "extra.safetensors")
    with_extra = weight_files(config(model, "safetensors"))
    assert len(with_extra[1]) == 2
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": file.name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(config(model, "safetensors")) == (TENSORS, [file])


def test_mistrals_own_format_is_chosen_as_vllm_does(model: Path) -> None:
    """``consolidated*.safetensors`` beside the others are loaded instead of them, and count instead of them."""
    (file,) = model.glob("*.safetensors")
    shutil.copy(file, model / "consolidated.safetensors")
    assert weight_files(config(model)) == (TENSORS, [model / "consolidated.safetensors"])
    assert weight_files(config(model, "hf"))[1] != [model / "consolidated.safetensors"]


def test_pickles_and_single_files_count_whole(tmp_path: Path) -> None:
    """Nothing of them is unpickled."""
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04evil")
    (tmp_path / "pickled" / "training_args.bin").write_bytes(b"x")
    found = weight_files(config(tmp_path / "pickled"))
    assert found == (FILES, [tmp_path / "pickled" / "pytorch_model.bin"])
    assert checkpoint_identity(config(tmp_path / "pickled"), Settings()).startswith("files:")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert weight_files(config(gguf)) == (FILES, [gguf])


@pytest.mark.parametrize("load_format", ["dummy", "sharded_state", "ipc_cache"])
def test_weights_from_no_files_have_no_such_identity(model: Path, load_format: str) -> None:
    """Then what is loaded is compared; where that is not looked at, the start asks for a name."""
    with pytest.raises(NoFiles):
        weight_files(config(model, load_format))
    assert checkpoint_identity(config(model, load_format), Settings()) == ""
    with pytest.raises(SettingsError, match="model_id"):
        checkpoint_identity(config(model, load_format), Settings(watch_weights=False))


def test_a_stream_from_a_local_folder_counts_as_the_folder(model: Path) -> None:
    """Run:ai's streamer reads the same safetensors."""
    try:
        found = weight_files(config(model, "runai_streamer"))
    except NoFiles:
        pytest.skip("vLLM has no such loader here")
    assert found == weight_files(config(model))


def test_a_model_of_a_hub_is_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the hub's library keeps of it on this host; one that is not here has none, and costs no error."""
    repo = tmp_path / "hub" / "models--some--model"
    snapshot = repo / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(TINY_LM, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    here = config("some/model", download_dir=str(tmp_path / "hub"))
    assert weight_files(here)[1] == [snapshot / "model.safetensors"]
    with pytest.raises(NoFiles):
        weight_files(config("other/model", download_dir=str(tmp_path / "hub")))


def test_a_name_takes_the_digests_place(model: Path) -> None:
    """``model_id`` is for those who know; nothing is read then. Another name is another identity."""
    for file in model.glob("*.safetensors"):
        file.write_bytes(b"")
    assert checkpoint_identity(config(model), Settings(model_id="mine")) == "named:mine"


def test_a_damaged_file_ends_the_start_in_one_line(model: Path) -> None:
    """Instead of an identity of whatever was there."""
    for file in model.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SettingsError, match="not a valid safetensors") as caught:
        checkpoint_identity(config(model), Settings())
    assert "\n" not in str(caught.value)


def test_files_that_change_while_the_model_loads_have_no_identity(model: Path) -> None:
    """Nobody knows which of them vLLM read."""
    digest = CheckpointDigest.begin(config(model), WAIT_S)
    assert digest._thread is not None
    digest._thread.join(WAIT_S)
    alter(model)
    with pytest.raises(SettingsError, match="changed while the model was loaded"):
        digest.result(WAIT_S)


def test_a_newer_revision_that_came_meanwhile_has_no_identity(tmp_path: Path) -> None:
    """The digest began with what the hub's library had on this host; loading the model brought another snapshot. The
    old files still lie there, and are not what was loaded."""
    repo = tmp_path / "hub" / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    for revision in ("abc", "def"):
        shutil.copytree(TINY_LM, repo / "snapshots" / revision)
    alter(repo / "snapshots" / "def")
    (repo / "refs" / "main").write_text("abc")
    digest = CheckpointDigest.begin(config("some/model", download_dir=str(tmp_path / "hub")), WAIT_S)
    (repo / "refs" / "main").write_text("def")
    with pytest.raises(SettingsError, match="changed while the model was loaded"):
        digest.result(WAIT_S)


def test_it_is_begun_once(model: Path) -> None:
    """By the hook before the model loads and by the connector after it, which may have a copy of the configuration."""
    one, other = CheckpointDigest.begin(config(model), WAIT_S), CheckpointDigest.begin(config(model), WAIT_S)
    assert one is other
    (file,) = model.glob("*.safetensors")
    assert one.result(WAIT_S) == digest_tensors([file])


def test_it_begins_before_the_model_loads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker whose configuration has the connector, alone or among several, and in no other."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from pdtransport.vllm.patches.model_loading import watch_loading

    begun: list[Any] = []
    monkeypatch.setattr(CheckpointDigest, "begin", classmethod(lambda _, config, wait_s: begun.append(config)))
    done: list[Any] = []

    def init_device(self: Any) -> None:
        assert self.vllm_config
        self.worker.init_device()
        done.append(self)

    monkeypatch.setattr(WorkerWrapperBase, "init_device", init_device)
    watch_loading()
    watch_loading()
    ours = {"kv_connector": "PDTransportConnector", "kv_connector_extra_config": {}}
    several = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [ours]}}
    named = {**ours, "kv_connector_extra_config": {"model_id": "mine"}}
    other = {"kv_connector": "NixlConnector", "kv_connector_extra_config": {}}
    for transfer in (ours, several, named, other, None):
        made = config(model)
        made.kv_transfer_config = SimpleNamespace(**transfer) if transfer else None
        worker = SimpleNamespace(init_device=lambda: None)
        WorkerWrapperBase.init_device(SimpleNamespace(vllm_config=made, worker=worker))
    assert len(begun) == 2
    assert len(done) == 5
