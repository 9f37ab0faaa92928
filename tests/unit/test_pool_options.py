"""What ``pdlaunch`` tells ``pdpool`` on its command line is what the topology says."""

from __future__ import annotations

from typing import Any

import pytest

from pdtransport.pool.cli import options, parser, settings_from
from pdtransport.pool.settings import PoolSettings

SETTINGS: dict[str, dict[str, Any]] = {
    "nothing set": {},
    "memory": {"memory_bytes": 1 << 30, "policy": "s3fifo", "admission": "twice", "quotas": {"a": 1 << 20, "b": 4096}},
    "tiers": {
        "disk": {"path": "/tmp/chunks", "bytes": 1 << 30, "codec": "zstd"},
        "tiers": {"names": {"bytes": 1 << 30, "codec": "zstd", "options": {"where": "there"}}},
    },
    "remote, without keys": {"remote": {"listen": "10.0.0.1:8200", "allow_plaintext": True}},
    "remote, on this host": {"remote": {"listen": "127.0.0.1:8200", "allow_plaintext": False}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_command_line_says_what_its_settings_say(name: str) -> None:
    """Every kind of value: sizes, flags, sections, quotas, tiers of other packages."""
    settings = PoolSettings.parse(SETTINGS[name])
    assert settings_from(parser().parse_args(options(settings))) == settings
