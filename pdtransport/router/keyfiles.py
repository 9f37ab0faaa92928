"""Reads the router's keys from files and the environment, which other users of the machine can't see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pydantic import SecretStr

from pdtransport.errors import SettingsError
from pdtransport.serving.keyfiles import read_lines

MAX_API_KEYS = 64  # every request is compared with each key
MAX_TENANT = 64  # characters of a name


class ClientKey(NamedTuple):
    """A key and its tenant ("": none)."""

    key: str
    tenant: str = ""


def variable_of(setting: str) -> str:
    """The environment variable that may hold a key: for ``api_key`` it is ``PDROUTER_API_KEY``."""
    return f"PDROUTER_{setting.upper()}"


def all_keys(one: SecretStr | None, file: Path | None, setting: str) -> tuple[str, ...]:
    """Lines with one key each, from the setting itself, its environment variable and its file.

    Raises:
        SettingsError: the file can't be read or holds no key, or there are too many keys.
    """
    lines = [one.get_secret_value()] if one else []
    if variable := os.environ.get(variable_of(setting), "").strip():
        lines.append(variable)
    if file is not None:
        lines += read_lines(file, f"{setting}_file")
    if len(lines) > MAX_API_KEYS:
        raise SettingsError(f"{setting}_file: {len(lines)} keys, at most {MAX_API_KEYS} are allowed")
    return tuple(lines)


def client_keys(one: SecretStr | None, file: Path | None, setting: str) -> tuple[ClientKey, ...]:
    """As :func:`all_keys`, but a line may name the key's tenant: ``KEY`` or ``KEY TENANT``.

    Raises:
        SettingsError: as :func:`all_keys`; or a line has neither form, or a key has two tenants.
    """
    found: dict[str, ClientKey] = {}
    for number, line in enumerate(all_keys(one, file, setting), 1):
        key, *rest = line.split()
        if len(rest) > 1 or any(not name.isprintable() or len(name) > MAX_TENANT for name in rest):
            raise SettingsError(
                f"{setting}_file: key {number} is neither KEY nor KEY TENANT (a name without spaces, of at most "
                f"{MAX_TENANT} characters)"
            )
        made = ClientKey(key, *rest)
        if found.setdefault(key, made) != made:
            raise SettingsError(
                f"{setting}_file: key {number} is already assigned to another tenant: give each tenant its own key"
            )
    return tuple(found.values())
