"""Settings: one line of text for each mistake, closed by default."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pdtransport.errors import SettingsError
from pdtransport.settings import PoolUse, Settings
from pdtransport.vllm.geometry import control_port


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"contrl": {}}, r"contrl: unknown key"),
        ({"control": {"prot": 1}}, r"control\.prot: unknown key"),
        ({"control": {"port": 70000}}, r"control\.port: .*65535"),
        ({"control": "tcp://x"}, r"control: "),
        ({"control": {"host": "10.0.0.1"}}, r"needs CURVE keys.*pdlaunch keys.*curve_secret_key_file.*allow_plaintext"),
        ({"control": {"host": "127.0.0.1.example.org"}}, r"needs CURVE keys"),
        ({"control": {"host": "0.0.0.0"}}, r"needs CURVE keys"),
        ({"control": {"host": "::"}}, r"needs CURVE keys"),
        ({"control": {"curve_public_key_file": "a"}}, r"must be set together"),
        ({"links": {"order": []}}, r"links\.order"),
        ({"links": {"order": ["my link"]}}, r"links\.order\.0: .*a-z0-9_-"),
        ({"links": {"require": "x" * 33}}, r"links\.require: .*1,32"),
        ({"deadlines": {"ack_s": 0}}, r"deadlines\.ack_s"),
        ({"model_id": " "}, r"model_id"),
        ({"contrl": {}, "x": 1}, r"and 1 more"),
    ],
)
def test_a_mistake_is_named_in_one_line(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        Settings.parse(raw)
    assert "\n" not in str(caught.value)


def test_nothing_leaves_the_host_unless_configured() -> None:
    """Promise 7."""
    assert Settings.parse({}).control.host == "127.0.0.1"
    for here in ("localhost", "127.0.0.9", "::1", "::ffff:127.0.0.1"):
        assert Settings.parse({"control": {"host": here}}).control.host == here
    assert Settings.parse({"control": {"host": "10.0.0.1", "allow_plaintext": True}}).control.host == "10.0.0.1"


def test_checksums_are_on_unless_switched_off() -> None:
    """Promise 1."""
    assert Settings().integrity.checksum == "full"
    off = Settings.parse({"integrity": {"checksum": "off"}, "links": {"order": ["ucx"]}})
    assert off.integrity.checksum == "off"


def test_the_environment_fills_in_the_control_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDTRANSPORT_CONTROL_PORT", "1234")
    assert Settings.parse({}).control.port == 1234
    assert Settings.parse({"control": {"port": 5}}).control.port == 5
    monkeypatch.setenv("PDTRANSPORT_CONTROL_PORT", "many")
    with pytest.raises(SettingsError, match=re.escape("control.port")):
        Settings.parse({})


def test_servers_of_different_roles_need_no_port_settings() -> None:
    """A prefill, a decode and a `kv_both` server of one host listen apart, each with 100 workers if need be."""
    control = Settings.parse({}).control
    bases = sorted(control.base_port(role) for role in ("kv_producer", "kv_consumer", "kv_both"))
    assert all(after - before >= 100 for before, after in pairwise(bases))
    assert control.base_port("both") == control.base_port() == control.base_port("kv_both")  # the Python API's
    assert Settings.parse({"control": {"port": 5}}).control.base_port("kv_consumer") == 5
    assert Settings.parse({"control": {"port": 0}}).control.base_port("kv_consumer") == 0


def test_a_vllm_server_listens_where_its_role_says() -> None:
    """Two servers of a host, started with nothing but their roles, do not want the same port."""
    parallel = SimpleNamespace(
        data_parallel_rank=0, data_parallel_index=0, data_parallel_size=1, tensor_parallel_size=2
    )

    def port_of(role: str) -> int:
        config: Any = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_role=role), parallel_config=parallel)
        return control_port(Settings.parse({}), config)

    assert [port_of(role) for role in ("kv_producer", "kv_consumer", "kv_both")] == [7670, 7770, 7570]


def test_a_salt_in_a_file_is_the_same_salt_and_never_shown(tmp_path: Path) -> None:
    """A command line, which vLLM logs as well, names the file; its text is told by no error."""
    file = tmp_path / "salt"
    file.write_text("hush hush\n")
    use = PoolUse(salt_file=file)
    assert use.with_salt() == PoolUse(salt="hush hush").with_salt() == PoolUse(salt="hush hush")
    assert "hush" not in repr(use) + repr(use.with_salt())
    for wrong in (b"", b" \n", b"x" * 5000, b"hush\xff"):
        file.write_bytes(wrong)
        with pytest.raises(SettingsError, match=r"pool\.salt_file") as caught:
            use.with_salt()
        assert "hush" not in str(caught.value)
    with pytest.raises(SettingsError, match=r"pool\.salt_file"):
        PoolUse(salt_file=tmp_path / "none").with_salt()
    with pytest.raises(SettingsError, match="salt and salt_file are both set"):
        PoolUse(salt="a", salt_file=file)
