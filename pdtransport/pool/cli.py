"""The command ``pdpool``, which runs a pool. Its options are the fields of :class:`PoolSettings`."""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from pdtransport.errors import PDTransportError, SettingsError
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import (
    DESCRIPTORS,
    DiskSettings,
    HttpSettings,
    PoolSettings,
    RedisSettings,
    RemoteSettings,
    S3Settings,
    parse_size,
)
from pdtransport.serving.commandline import CommandParser, command, complain, tell
from pdtransport.system.descriptors import raise_limit

# Settings whose options have other names.
OWN = {
    "disk.path": "disk",
    "redis.url": "redis",
    "s3.bucket": "s3",
    "http.listen": "http",
    "remote.listen": "listen",
    "remote.curve_allowed_keys": "remote-curve-allowed-key",
}
SIZES = {"memory_bytes", "max_body_bytes", "frame_bytes", "client_bytes", "writeback_bytes", "bytes"}


def size(text: str) -> int:
    """Parse a size in bytes, given as a number or with a unit: 64GiB.

    Raises:
        ArgumentTypeError: the text is not a size.
    """
    found = parse_size(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give bytes, or a number with KiB, MiB, GiB or TiB")
    return found


def quota(text: str) -> tuple[str, int]:
    """Parse NAME=SIZE, the limit of a tenant or a tier.

    Raises:
        ArgumentTypeError: the text is not of that form.
    """
    tenant, equals, limit = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=SIZE")
    return tenant, size(limit)


def tier_option(text: str) -> tuple[str, str, str]:
    """Parse NAME.OPTION=VALUE.

    Raises:
        ArgumentTypeError: the text is not of that form.
    """
    parts = re.fullmatch(r"([^.=]+)\.([^=]+)=(.*)", text)
    if parts is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME.OPTION=VALUE")
    return parts[1], parts[2], parts[3]


def parser() -> argparse.ArgumentParser:
    """The parser of ``pdpool``: one option for each setting.

    Options of the tiers begin with --disk, --redis and --s3, those of the HTTP API with --http, and those for clients
    on other hosts with --remote, except --listen.
    """
    made = CommandParser(
        prog="pdpool", allow_abbrev=False, description="Shared CPU pool of KV chunks for the engines on this host."
    )
    _add(made, PoolSettings, "", leave_out={"quotas", "disk", "redis", "s3", "tiers", "http", "remote"})
    made.add_argument(
        "--quota", dest="quotas", metavar="TENANT=SIZE", type=quota, action="append", help=_help(PoolSettings, "quotas")
    )
    made.add_argument("--disk", dest="disk.path", metavar="DIR", type=Path, help=_help(DiskSettings, "path"))
    _add(made, DiskSettings, "disk.", leave_out={"path"})
    made.add_argument("--redis", dest="redis.url", metavar="URL", help=_help(RedisSettings, "url"))
    _add(made, RedisSettings, "redis.", leave_out={"url"})
    made.add_argument("--http", dest="http.listen", metavar="HOST:PORT", help=_help(HttpSettings, "listen"))
    _add(made, HttpSettings, "http.", leave_out={"listen"})
    made.add_argument("--listen", dest="remote.listen", metavar="HOST:PORT", help=_help(RemoteSettings, "listen"))
    _add(made, RemoteSettings, "remote.", leave_out={"listen"})
    made.add_argument("--s3", dest="s3.bucket", metavar="BUCKET", help=_help(S3Settings, "bucket"))
    _add(made, S3Settings, "s3.", leave_out={"bucket"})
    made.add_argument(
        "--tier",
        dest="tiers",
        metavar="NAME=SIZE",
        type=quota,
        action="append",
        help="Add another package's tier below all others; NAME is its entry point.",
    )
    made.add_argument(
        "--tier-option",
        dest="tier_options",
        metavar="NAME.OPTION=VALUE",
        type=tier_option,
        action="append",
        help="Set an option of such a tier; NAME.codec: as --disk-codec.",
    )
    made.add_argument("--status", action="store_true", help="Print the status of the running pool as JSON, and exit.")
    made.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    return made


def options(settings: PoolSettings) -> list[str]:
    """The command line for these settings. Settings that were not set explicitly are left out."""
    raw = settings.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    found: list[str] = []
    for name, value in raw.items():
        if name == "quotas":
            value, name = {"": [f"{tenant}={limit}" for tenant, limit in value.items()]}, "quota"
        elif name == "tiers":
            found += _tier_options(value)
            continue
        for key, each in (value if isinstance(value, dict) else {"": value}).items():
            option = OWN.get(f"{name}.{key}", f"{name}-{key}" if key else name).replace("_", "-")
            if isinstance(each, bool):
                found += [f"--{option}"] if each else []
                continue
            for one in each if isinstance(each, list) else [each]:
                found += [f"--{option}", str(one)]
    return found


def _tier_options(tiers: dict[str, Any]) -> list[str]:
    found = [each for name, tier in tiers.items() for each in ("--tier", f"{name}={tier['bytes']}")]
    for name, tier in tiers.items():
        told = {**tier.get("options", {}), **({"codec": tier["codec"]} if "codec" in tier else {})}
        found += [each for option, value in told.items() for each in ("--tier-option", f"{name}.{option}={value}")]
    return found


def settings_from(arguments: argparse.Namespace) -> PoolSettings:
    """The settings of a parsed command line.

    Raises:
        SettingsError: one line that names the setting and what is wrong.
    """
    raw: dict[str, Any] = {}
    for path, value in vars(arguments).items():
        if value is None or path in ("status", "log_level", "tiers", "tier_options"):
            continue
        tier, dot, name = path.partition(".")
        settings = raw.setdefault(tier, {}) if dot else raw
        settings[name or path] = dict(value) if path == "quotas" else value
    for name, nbytes in arguments.tiers or ():
        raw.setdefault("tiers", {})[name] = {"bytes": nbytes, "options": {}}
    for name, option, text in arguments.tier_options or ():
        tier = raw.get("tiers", {}).get(name)
        if tier is None:
            raise SettingsError(f"--tier-option {name}.{option}: add --tier {name}=SIZE")
        (tier if option == "codec" else tier["options"])[option] = text
    return PoolSettings.parse(raw, where="")


@command("pdpool")
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``pdpool``; returns its exit status: 0 after a signal or --status, 2 after an error."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = settings_from(arguments)
        if arguments.status:
            with PoolClient(settings.name, settings.dir, who="pdpool --status") as client:
                print(json.dumps(client.status().result(), indent=1))
            return 0
        return _serve(settings)
    except PDTransportError as error:
        complain(f"pdpool: {error}")
        return 2


def _serve(settings: PoolSettings) -> int:
    raise_limit(DESCRIPTORS)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with Pool(settings) as pool:
        memory = pool.status()["memory"]["bytes"]
        tell(f"pdpool: {settings.name} serves {memory >> 20} MiB at {settings.socket_path}")
        if pool.url:
            tell(f"pdpool: HTTP API at {pool.url}, described in {pool.url}/openapi.json")
        while not ended.wait(1.0):
            pass
    return 0


def _add(made: argparse.ArgumentParser, model: type[BaseModel], prefix: str, leave_out: set[str]) -> None:
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        default: Any = None if field.is_required() else field.default
        shown = "" if default is None else f" Default: {default}."
        if isinstance(default, bool):
            made.add_argument(
                f"--{prefix}{name}".replace("_", "-").replace(".", "-"),
                dest=f"{prefix}{name}",
                action="store_const",
                const=True,
                help=_help(model, name),
            )
            continue
        if isinstance(default, tuple):
            made.add_argument(
                f"--{prefix}{name}".replace("_", "-").replace(".", "-"),
                dest=f"{prefix}{name}",
                metavar=name.upper(),
                action="append",
                help=f"{_help(model, name)} May be given several times.",
            )
            continue
        texts = [each for each in get_args(field.annotation) if isinstance(each, str)]
        made.add_argument(
            f"--{prefix}{name}".replace("_", "-").replace(".", "-"),
            dest=f"{prefix}{name}",
            metavar=None if texts else ("SIZE" if name in SIZES else name.rpartition("_")[2].upper()),
            choices=texts or None,
            type=size if name in SIZES else (type(default) if isinstance(default, int | float) else str),
            help=_help(model, name) + shown,
        )


def _help(model: type[BaseModel], name: str) -> str:
    return (model.model_fields[name].description or "").replace("%", "%%")


if __name__ == "__main__":
    sys.exit(main())
