"""Settings and command line: what is taken, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from pdtransport.errors import SettingsError
from pdtransport.router import EndpointSettings, Router, RouterSettings
from pdtransport.router.cli import main, parser, settings_from

P, D = "http://127.0.0.1:8100", "http://127.0.0.1:8200"


def build(**raw: Any) -> RouterSettings:
    return RouterSettings.build({"prefill": [P], "decode": [D], **raw})


def test_endpoint_text_names_url_control_address_and_ranks() -> None:
    one = EndpointSettings.parse("http://h:1/@[::1]:7670/4")
    assert (one.url, one.name, one.control_host, one.control_port, one.tp_size) == ("http://h:1", "h:1", "::1", 7670, 4)
    assert EndpointSettings.parse("https://h/base").control_host is None


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"prefill": []}, "router: prefill: "),
        ({"decode": ["127.0.0.1:8200"]}, "is not a server URL: give http://HOST:PORT"),
        ({"decode": ["ftp://h"]}, "is not a server URL"),
        ({"prefill": [f"{P}@h"]}, "is not a control address"),
        ({"prefill": [f"{P}@h:99999"]}, "router: prefill.0"),
        ({"prefill": [f"{P}@h:1/x"]}, "is not a control address"),
        ({"prefill": [{"url": "http://user:pass@h:1"}]}, "must not have a user"),
        ({"prefill": [{"url": P, "control_host": "h"}]}, "must be set together"),
        ({"prefill": [P, P]}, "two prefill servers are called '127.0.0.1:8100'"),
        ({"dispatch": "both"}, "router: dispatch: "),
        ({"max_inflight": 0}, "router: max_inflight: "),
        ({"timeouts": {"first_bite_s": 1}}, "router: timeouts.first_bite_s: unknown key"),
        ({"retries": 1}, "router: retries: unknown key"),
        ({"allowed_hosts": ["http://h"]}, "router: allowed_hosts.0: "),
        ({"allowed_origins": ["h.example"]}, "router: allowed_origins.0: "),
        ({"allowed_origins": ["https://h/path"]}, "router: allowed_origins.0: "),
        ({"curve_secret_key_file": "k"}, "must be set together"),
    ],
)
def test_wrong_settings_are_named_in_one_line(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as refused:
        build(**raw)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "user:pass" not in str(refused.value)


def test_every_setting_is_described() -> None:
    def walk(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)
            else:
                assert field.description, f"{model.__name__}.{name}"

    walk(RouterSettings)
    walk(EndpointSettings)


def test_keys_do_not_show_when_settings_are_printed() -> None:
    assert "hush" not in repr(build(api_key="hush", upstream_api_key="hush"))


def test_key_file_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for path, says in ((tmp_path / "none", "No such file"), (empty, "has no key")):
        with pytest.raises(SettingsError, match=says):
            Router(build(api_key_file=str(path)))
        with pytest.raises(SettingsError, match="upstream_api_key_file"):
            Router(build(upstream_api_key_file=str(path)))


def test_command_line_reaches_every_setting() -> None:
    arguments = [
        "--prefill", f"{P}@h:7/2", "http://x:1", "--prefill", "http://y:1", "--decode", D, "--dispatch", "serial",
        "--min-disagg-tokens", "64", "--timeouts-connect-s", "2.5", "--placement-affinity-chunks", "3",
    ]  # fmt: skip
    settings = settings_from(parser().parse_args(arguments))
    assert [one.name for one in settings.prefill] == ["127.0.0.1:8100", "x:1", "y:1"]
    assert (settings.prefill[0].control_port, settings.dispatch, settings.min_disagg_tokens) == (7, "serial", 64)
    assert (settings.timeouts.connect_s, settings.placement.affinity_chunks) == (2.5, 3)
    assert settings.health == build().health


def test_keys_are_no_command_line_options(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--api-key", "--upstream-api-key"):
        with pytest.raises(SystemExit):
            parser().parse_args(["--prefill", P, "--decode", D, option, "secret"])
    assert "secret" not in capsys.readouterr().out


def test_command_says_in_one_line_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prefill", "nonsense", "--decode", D]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pdrouter: settings: prefill.0: 'nonsense' is not a server URL")
    assert error.count("\n") == 1
