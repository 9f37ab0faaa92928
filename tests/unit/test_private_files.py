"""What is written is for its owner alone, whatever the umask says, and never through a link."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pdtransport.control.curve import make_keys
from pdtransport.errors import SettingsError
from pdtransport.kv.geometry import KVGeometry
from pdtransport.kv.groups import CacheGroups
from pdtransport.launch.rundir import LOCK, POOL_KEY, RECORD, RunError, RunFolder, read_record
from pdtransport.pool.server.key_space_file import SpaceFile
from pdtransport.system.private_files import make_private_folder, open_private, open_regular
from pdtransport.transfer.audit import Audit


@pytest.fixture(autouse=True)
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(folder: Path) -> dict[str, str]:
    """Whatever in ``folder`` others may read, write or enter."""
    paths = [path for path in (folder, *folder.rglob("*")) if not path.is_symlink()]
    return {str(path): stat.filemode(path.stat().st_mode) for path in paths if path.stat().st_mode & 0o077}


def test_folders_and_files_are_closed_to_others(tmp_path: Path) -> None:
    """All that is made, above it as well; a file that was there is closed, a folder that was there is left as it is."""
    (tmp_path / "there").mkdir(mode=0o755)
    folder = tmp_path / "there" / "a" / "b"
    make_private_folder(folder)
    make_private_folder(folder)
    old = folder / "old"
    old.write_text("x")
    assert stat.S_IMODE(old.stat().st_mode) == 0o666
    for path in (old, folder / "new"):
        os.close(open_private(path, os.O_WRONLY | os.O_APPEND))
    assert open_to_others(tmp_path / "there" / "a") == {}
    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o755
    assert old.read_text() == "x"


def test_no_link_is_followed(tmp_path: Path) -> None:
    """Who may write into a folder can't have another file of ours overwritten through it."""
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "link").symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        open_private(tmp_path / "link", os.O_WRONLY | os.O_TRUNC)
    run = tmp_path / "run"
    run.mkdir()
    (run / f"{RECORD}.new").symlink_to(other)
    (run / LOCK).symlink_to(other)
    with pytest.raises(RunError), RunFolder(run):
        pass
    (run / LOCK).unlink()
    with RunFolder(run) as folder, pytest.raises(RunError, match=r"run\.json: .*; set --run-dir"):
        folder.record({})
    assert other.read_text() == "precious"


def test_a_runs_folder_is_private_and_empties_itself(tmp_path: Path) -> None:
    """Record, key and sockets end with the run; of one that was killed, when the next begins."""
    path = tmp_path / "state" / "x"
    run = RunFolder(path).__enter__()
    run.record({"name": "x"})
    run.make_pool_key()
    sockets = run.make_socket_folder()
    (sockets / "socket").touch(mode=0o600)
    key = (path / POOL_KEY).read_text()
    assert len(key) >= 32
    assert open_to_others(tmp_path / "state") == {}
    assert open_to_others(sockets) == {}
    with pytest.raises(RunError, match=f"a run is up already \\(pid {os.getpid()}, "), RunFolder(path):
        pass
    assert (read_record(path), (path / POOL_KEY).read_text()) == ({"name": "x"}, key)
    assert sockets.exists()
    run.close()  # as if it was killed
    with RunFolder(path) as again:
        assert not sockets.exists()
        assert read_record(path) is None
        again.make_pool_key()
        assert (path / POOL_KEY).read_text() != key
    assert [left.name for left in path.iterdir()] == [LOCK]


def test_a_link_of_somebody_elses_making_removes_nothing(tmp_path: Path) -> None:
    """Only a folder that pdlaunch made for sockets is removed with a run."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sockets").symlink_to(precious)
    with RunFolder(tmp_path / "run"):
        pass
    assert precious.is_dir()


def test_the_audits_records_are_private(tmp_path: Path) -> None:
    """They tell which prompts' blocks are equal."""
    kv = np.zeros((1, 4, 1, 4, 8), dtype=np.uint8)
    audit = Audit(tmp_path / "audit" / "deep", "prefill", 0, CacheGroups.of(KVGeometry.of_array(kv)))
    audit.block("t", "producer", "decode", 0, 0, 1, 1, 0, 1)
    audit.close()
    assert open_to_others(tmp_path / "audit") == {}
    [file] = (tmp_path / "audit" / "deep").iterdir()
    assert json.loads(file.read_text())["transfer"] == "t"


def test_keys_that_could_not_be_written_whole_are_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full device leaves no half of a pair, which would keep the next attempt from making one."""
    monkeypatch.setattr("pdtransport.control.curve.SECRET_FILE", "missing/control.secret")
    with pytest.raises(SettingsError, match="can't be written"):
        make_keys(tmp_path / "keys")
    assert list((tmp_path / "keys").iterdir()) == []
    monkeypatch.undo()
    public, secret = make_keys(tmp_path / "keys")
    assert public.exists()
    assert secret.exists()
    assert open_to_others(tmp_path / "keys") == {}


PIPES: dict[str, Callable[[Path], object]] = {
    "a private file to be written": lambda path: open_private(path, os.O_WRONLY | os.O_TRUNC),
    "a private file to be read": lambda path: open_private(path, os.O_RDONLY),
    "a file to be read": open_regular,
}


@pytest.mark.parametrize("how", PIPES)
@pytest.mark.parametrize("reader", [False, True])
def test_a_named_pipe_in_a_files_place_holds_nobody_up(tmp_path: Path, how: str, reader: bool) -> None:
    """Opening one waits for its other end, for ever; and what is written to one goes to whoever reads."""
    os.mkfifo(tmp_path / "planted")
    theirs = os.open(tmp_path / "planted", os.O_RDONLY | os.O_NONBLOCK) if reader else -1
    try:
        with pytest.raises(OSError, match="planted"):
            PIPES[how](tmp_path / "planted")
    finally:
        if reader:
            os.close(theirs)


def test_a_named_pipe_in_place_of_a_runs_record_is_no_run(tmp_path: Path) -> None:
    """``pdlaunch status`` ends although somebody left a pipe, or JSON too deep to be read, in the run's folder."""
    os.mkfifo(tmp_path / RECORD)
    assert read_record(tmp_path) is None
    (tmp_path / RECORD).unlink()
    (tmp_path / RECORD).write_text("[" * 100_000)
    assert read_record(tmp_path) is None


def test_a_named_pipe_among_the_pools_files_keeps_no_pool_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What earlier engines told is lost then, in one line; it is kept again with the next word."""
    os.mkfifo(tmp_path / "spaces.json")
    os.mkfifo(tmp_path / ".spaces.json.new")
    spaces = SpaceFile(tmp_path / "spaces.json")
    with caplog.at_level("WARNING"):
        assert spaces.read() == []
    assert len(caplog.messages) == 1
    for _ in range(2):  # the first write finds the pipe in the draft's place, and removes it
        spaces.write([])
        spaces.close()
    assert (tmp_path / "spaces.json").is_file()
    assert spaces.read() == []
