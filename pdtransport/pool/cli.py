"""``pdpool``: a shared pool as a command. Its options are the fields of :class:`PoolSettings`."""

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

from pdtransport.errors import PDTransportError
from pdtransport.pool.client import PoolClient
from pdtransport.pool.service import Pool
from pdtransport.pool.settings import DiskSettings, PoolSettings, RedisSettings, RemoteSettings

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
SIZES = {"memory_bytes", "frame_bytes", "client_bytes", "writeback_bytes", "bytes"}


def size(text: str) -> int:
    """Bytes, as a number or with a unit: 64GiB."""
    parts = re.fullmatch(r"(\d{1,15})\s?([KMGT]iB)?", text)
    if parts is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: bytes, or a number with KiB, MiB, GiB or TiB")
    return int(parts[1]) * UNITS[parts[2] or ""]


def quota(text: str) -> tuple[str, int]:
    """TENANT=SIZE."""
    tenant, equals, limit = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no quota: TENANT=SIZE")
    return tenant, size(limit)


def parser() -> argparse.ArgumentParser:
    """One option for each setting; those of the tiers begin with --disk and --redis, those
    of the door for other hosts with --remote."""
    made = argparse.ArgumentParser(
        prog="pdpool", allow_abbrev=False, description="Shared CPU pool of KV chunks for the engines on this host."
    )
    _add(made, PoolSettings, "", leave_out={"quotas", "disk", "redis", "remote"})
    made.add_argument(
        "--quota", dest="quotas", metavar="TENANT=SIZE", type=quota, action="append", help=_help(PoolSettings, "quotas")
    )
    made.add_argument("--disk", dest="disk.path", metavar="DIR", type=Path, help=_help(DiskSettings, "path"))
    _add(made, DiskSettings, "disk.", leave_out={"path"})
    made.add_argument("--redis", dest="redis.url", metavar="URL", help=_help(RedisSettings, "url"))
    _add(made, RedisSettings, "redis.", leave_out={"url"})
    made.add_argument("--listen", dest="remote.listen", metavar="HOST:PORT", help=_help(RemoteSettings, "listen"))
    _add(made, RemoteSettings, "remote.", leave_out={"listen"})
    made.add_argument("--status", action="store_true", help="Print the status of the pool that runs, as JSON, and end.")
    made.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    return made


def settings_from(arguments: argparse.Namespace) -> PoolSettings:
    """Settings of a parsed command line.

    Raises:
        SettingsError: one line that names the setting and what is wrong.
    """
    raw: dict[str, Any] = {}
    for path, value in vars(arguments).items():
        if value is None or path in ("status", "log_level"):
            continue
        tier, dot, name = path.partition(".")
        room = raw.setdefault(tier, {}) if dot else raw
        room[name or path] = dict(value) if path == "quotas" else value
    return PoolSettings.parse(raw, where="pdpool")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``pdpool``; returns its exit status: 0 after a signal, 2 if it can't start."""
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
        print(f"pdpool: {error}", file=sys.stderr)
        return 2


def _serve(settings: PoolSettings) -> int:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with Pool(settings) as pool:
        memory = pool.status()["memory"]["bytes"]
        print(f"pdpool: {settings.name} serves {memory >> 20} MiB at {settings.socket_path}", flush=True)
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
