"""``pdrouter``: the router as a command. Its options are the fields of :class:`RouterSettings`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import signal
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from pdtransport.errors import PDTransportError
from pdtransport.router.server import Router
from pdtransport.router.settings import RouterSettings
from pdtransport.serving.commandline import CommandParser, command, complain, tell

_NOT_OPTIONS = {
    "api_key",
    "admin_api_key",
    "upstream_api_key",
}  # every user of the machine can see a command line: use key files
_MANY = {"prefill": "URL", "decode": "URL", "allowed_hosts": "NAME", "allowed_origins": "ORIGIN"}
# Sections of the help for top-level settings: name -> pattern.
_GROUPS = {
    "servers and ports": "prefill|decode|(admin_)?(host|port)|allowed_.*|dispatch|first_token",
    "keys": ".*_key(s|_file)?|tenant_secret_file|share_prefixes|allow_plaintext",
    "limits": "max_.*|stream_buffer_bytes|upstream_connections",
    "requests": ".*",
}
_EXAMPLES = """examples:
  pdrouter --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --port 8000
  pdrouter --prefill http://10.0.0.1:8100 http://10.0.0.2:8100 --decode http://10.0.0.3:8200 --host 0.0.0.0 \\
    --api-key-file keys --admin-port 8001
"""


def _options(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _options(annotation, (*path, name))
        elif name not in _NOT_OPTIONS:
            yield (*path, name), field


def _choices(field: FieldInfo) -> list[str] | None:
    is_literal = typing.get_origin(field.annotation) is typing.Literal
    return [str(value) for value in typing.get_args(field.annotation)] if is_literal else None


def _metavar(field: FieldInfo) -> str | None:
    if _choices(field):
        return None
    annotation: Any = field.annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    names = {int: "N", float: "SECONDS", str: "TEXT", bool: "true|false"}
    return names.get(annotation, "FILE")


def _group(path: tuple[str, ...]) -> str:
    """The section of the help that lists an option."""
    if len(path) > 1:
        return path[0].replace("_", " ")
    return next(name for name, options in _GROUPS.items() if re.fullmatch(options, path[0]))


def parser() -> argparse.ArgumentParser:
    """One option per setting; nested names are joined by dashes: --timeouts-connect-s."""
    made = CommandParser(
        prog="pdrouter",
        allow_abbrev=False,
        description="OpenAI-compatible router in front of vLLM prefill and decode servers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="pdrouter --prefill URL ... --decode URL ... [option ...]",
    )
    groups = {name: made.add_argument_group(name) for name in _GROUPS}
    for path, field in _options(RouterSettings):
        name = _group(path)
        group = groups[name] = groups.get(name) or made.add_argument_group(name)
        help_text = (field.description or "").replace("%", "%%")
        if path[-1] in _MANY:
            group.add_argument(
                f"--{path[-1]}".replace("_", "-"),
                dest=path[-1],
                nargs="+",
                action="extend",
                required=field.is_required(),
                metavar=_MANY[path[-1]],
                help=help_text,
            )
            continue
        default = field.get_default(call_default_factory=True)
        shown = "" if default is None or isinstance(default, SecretStr) else f" Default: {default}."
        group.add_argument(
            "--" + "-".join(path).replace("_", "-"), dest=".".join(path), choices=_choices(field),
            metavar=_metavar(field), help=help_text + shown,
        )  # fmt: skip
    made.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    return made


def settings_from(arguments: argparse.Namespace) -> RouterSettings:
    """Settings of a parsed command line.

    Raises:
        SettingsError: one line that names the setting and says what is wrong.
    """
    raw: dict[str, Any] = {}
    for path, _ in _options(RouterSettings):
        value = getattr(arguments, path[-1] if path[-1] in _MANY else ".".join(path))
        if value is None:
            continue
        inner = raw
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return RouterSettings.build(raw, where="settings")


async def _run(settings: RouterSettings) -> None:
    router = Router(settings)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _on_signal, ended, number)
    await router.start()
    tell(f"pdrouter: listening on {router.url}, admin on {router.admin_url}")
    for endpoint in router.fleet.all:
        state = "healthy" if endpoint.healthy else f"unhealthy: {endpoint.last_error}"
        tell(f"pdrouter: {endpoint.role} {endpoint.url} {state}")
    await ended.wait()
    await router.stop()


def _on_signal(ended: asyncio.Event, number: int) -> None:
    if ended.is_set():  # second signal: don't wait for requests in flight
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    ended.set()


@command("pdrouter")
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``pdrouter``; returns its exit status: 0 after a signal, 2 if it can't start."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_run(settings_from(arguments)))
    except PDTransportError as error:
        complain(f"pdrouter: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
