"""``pdlaunch pool``: shows and manages the contents of a pool on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pdtransport.errors import PDTransportError
from pdtransport.kv.keys import KEY_BYTES
from pdtransport.pool.admin.pool_admin import BELOW, AdminOutcome, Chosen, PoolAdmin
from pdtransport.pool.admin.prompts import PoolPrompt, PromptFound, chunks_of, find, spaces_for
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.messages import MAX_PIN_S
from pdtransport.pool.settings import PoolSettings
from pdtransport.settings import MAX_SALT

MAX_PROMPT_FILE = 64 << 20  # bytes

VERBS = {
    "status": "sizes, contents and hit rates by tier and tenant",
    "lookup": "how many chunks of a prompt the pool holds, and in which tiers",
    "spaces": "which engines' keys the pool knows, so that prompts can be looked up",
    "pin": "pin chunks in memory",
    "unpin": "unpin chunks",
    "prefetch": "read chunks into memory",
    "move": "move chunks to another tier, out of memory",
    "clear": "remove chunks from all tiers",
    "compress": "rewrite chunks in tiers that have been given a codec since",
}


class PoolCommandError(PDTransportError):
    """An argument can't be used; the text is one line."""


def add_parser(verbs: Any) -> None:
    """Add ``pool`` and its verbs."""
    pool = verbs.add_parser("pool", help="show and manage the contents of a pool of KV chunks", description=__doc__)
    inner = pool.add_subparsers(dest="pool_verb", required=True, metavar="VERB")
    made: dict[str, argparse.ArgumentParser] = {}
    for name, text in VERBS.items():
        verb = made[name] = inner.add_parser(name, help=text, description=text)
        verb.add_argument("--pool", default="default", metavar="NAME", help="of the pool (default)")
        verb.add_argument("--dir", type=Path, metavar="DIR", help="its directory (default: that of pdpool)")
        verb.add_argument("--json", action="store_true", help="answer with one JSON object")
        if name not in ("status", "spaces"):
            _add_choice(verb, only_prompt=name == "lookup")
    made["pin"].add_argument("--soft", action="store_true", help="evict them only when no unpinned chunk can be")
    made["pin"].add_argument(
        "--for", dest="for_s", type=float, metavar="SECONDS", help="the pin expires after this many seconds"
    )
    made["move"].add_argument(
        "--to", required=True, metavar="TIER", help="memory, disk, ..., or below: any lower tier that has the chunk"
    )


def _add_choice(verb: argparse.ArgumentParser, *, only_prompt: bool) -> None:
    choice = verb.add_mutually_exclusive_group(required=True)
    choice.add_argument("--prompt", metavar="TEXT", help="chunks of this prompt, as /v1/completions takes it")
    choice.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same from a file")
    choice.add_argument("--tokens", type=int, nargs="+", metavar="ID", help="chunks of these token ids")
    choice.add_argument("--tokens-file", type=Path, metavar="FILE", help="the same from a file: a JSON list")
    if not only_prompt:
        choice.add_argument("--key", nargs="+", metavar="HEX", help="chunks with these keys")
        choice.add_argument("--all", action="store_true", help="all chunks")
        choice.add_argument("--tenant", metavar="NAME", help="all chunks of this tenant, which must have a quota")
    verb.add_argument(
        "--model", metavar="NAME", help="model whose keys to use, if engines of several models use the pool"
    )
    verb.add_argument("--tokenizer", metavar="PATH", help="folder or hub id (default: as reported by the engine)")
    verb.add_argument("--salt-file", type=Path, metavar="FILE", help="the engines' pool.salt_file")
    verb.add_argument("--cache-salt-file", type=Path, metavar="FILE", help="file with the requests' cache_salt")


def run(arguments: argparse.Namespace) -> str:
    """Run the command; returns the text to print.

    Raises:
        PoolUnavailable: there is no such pool.
        PDTransportError: the request can't be fulfilled; one line says why.
    """
    place = {"name": arguments.pool} | ({} if arguments.dir is None else {"dir": arguments.dir})
    PoolSettings.parse(place, where="")
    with PoolClient(arguments.pool, arguments.dir, who="pdlaunch pool", threads=1) as client:
        admin = PoolAdmin(client)
        verb = arguments.pool_verb
        if verb == "status":
            status = admin.status()
            return json.dumps(status, indent=2) if arguments.json else as_text(status)
        if verb == "spaces":
            spaces = [space.public() for space in admin.spaces()]
            return json.dumps(spaces, indent=2) if arguments.json else _spaces_text(spaces)
        if verb == "lookup":
            found = find(admin, _prompt(arguments, admin))
            told = [each.public() for each in found]
            return json.dumps(told, indent=2) if arguments.json else "\n".join(map(_found_text, found))
        outcome, text = _act(verb, arguments, admin)
        return json.dumps({"done": outcome.done, "of": outcome.of}) if arguments.json else text


def _act(verb: str, arguments: argparse.Namespace, admin: PoolAdmin) -> tuple[AdminOutcome, str]:
    chosen = _chosen(arguments, admin)
    if verb == "pin":
        if arguments.for_s is not None and not 0 < arguments.for_s <= MAX_PIN_S:
            raise PoolCommandError(f"--for {arguments.for_s:g}: more than 0 and at most {MAX_PIN_S:g} seconds")
        outcome = admin.pin(chosen, "soft" if arguments.soft else "hard", arguments.for_s)
        return outcome, f"{outcome.done} of {outcome.of} chunks are pinned"
    if verb == "unpin":
        outcome = admin.pin(chosen, "none")
        return outcome, f"{outcome.done} chunks in memory are not pinned"
    if verb == "move":
        outcome = admin.move(chosen, arguments.to)
        where = (
            "in memory"
            if arguments.to == "memory"
            else "in lower tiers, out of memory"
            if arguments.to == BELOW
            else f"in tier {arguments.to}, out of memory"
        )
        return outcome, f"{outcome.done} of {outcome.of} chunks are {where}"
    verbs: dict[str, tuple[Callable[[Chosen], AdminOutcome], str]] = {
        "prefetch": (admin.prefetch, "are in memory"),
        "clear": (admin.drop, "are forgotten"),
        "compress": (admin.compress, "are packed in the tiers below memory"),
    }
    act, text = verbs[verb]
    outcome = act(chosen)
    return outcome, f"{outcome.done} of {outcome.of} chunks {text}"


# -- which chunks ----------------------------------------------------------------------------------------------------


def _chosen(arguments: argparse.Namespace, admin: PoolAdmin) -> Chosen:
    if arguments.all:
        return Chosen()
    if arguments.tenant is not None:
        return Chosen(tenant=arguments.tenant)
    if arguments.key is None:
        return chunks_of(admin, _prompt(arguments, admin))
    return Chosen(tuple(map(_key, arguments.key)))


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise PoolCommandError(f"--key {text[:80]!r}: a key has {2 * KEY_BYTES} hexadecimal digits")
    return key


def _prompt(arguments: argparse.Namespace, admin: PoolAdmin) -> PoolPrompt:
    salt, cache_salt = (_salt(arguments, name) for name in ("salt_file", "cache_salt_file"))
    prompt = PoolPrompt((), arguments.model, salt, cache_salt)
    return PoolPrompt(_tokens(arguments, admin, prompt), arguments.model, salt, cache_salt)


def _salt(arguments: argparse.Namespace, name: str) -> str:
    path: Path | None = getattr(arguments, name)
    if path is None:
        return ""
    option = "--" + name.replace("_", "-")
    salt = _read(path, option, 4 * MAX_SALT).strip()
    if not salt:
        raise PoolCommandError(f"{option}: {path} is empty")
    return salt


def _tokens(arguments: argparse.Namespace, admin: PoolAdmin, prompt: PoolPrompt) -> Sequence[int]:
    if arguments.tokens is not None:
        return list(arguments.tokens)
    if arguments.tokens_file is not None:
        try:
            found = json.loads(_read(arguments.tokens_file, "--tokens-file", MAX_PROMPT_FILE))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(type(token) is int for token in found):
            raise PoolCommandError(f"--tokens-file: {arguments.tokens_file} is not a JSON list of token ids")
        return found
    text = arguments.prompt
    if text is None:
        text = _read(arguments.prompt_file, "--prompt-file", MAX_PROMPT_FILE)
    where = arguments.tokenizer or spaces_for(admin, prompt)[0].tokenizer
    return tokenize(text, where)


def tokenize(text: str, where: str) -> list[int]:
    """Token ids of a prompt as vLLM's /v1/completions produces them, with the tokenizer in ``where``.

    Raises:
        PoolCommandError: there is no tokenizer, or no transformers package.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise PoolCommandError("a prompt's text needs the transformers package: install it, or use --tokens") from None
    try:
        made: Any = AutoTokenizer.from_pretrained(where)
        return list(map(int, made.encode(text)))
    except Exception as error:  # noqa: BLE001 - transformers raises whatever its files make it raise
        why = " ".join(str(error).split())[:200]
        raise PoolCommandError(f"no tokenizer in {where!r} ({why}): set --tokenizer, or use --tokens") from None


def _read(path: Path, option: str, limit: int) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise PoolCommandError(f"{option}: {path} is larger than {limit} bytes")
        return raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise PoolCommandError(f"{option}: can't read {path}: {reason}") from None


# -- for people ------------------------------------------------------------------------------------------------------


def as_text(status: dict[str, Any]) -> str:
    """The status as tables."""
    hits, memory = status["hits"], status["memory"]
    shares = hits["loaded_from"]
    held = {name: [row for row in status["held"] if row["tier"] == name] for name in ("memory", *status["tiers"])}
    rows: list[tuple[str, ...]] = [("TIER", "USED", "OF", "CHUNKS", "LOADS FROM", "")]
    sizes = {"memory": (memory["used_bytes"], memory["bytes"], "")}
    for name, tier in status["tiers"].items():
        notes = [note for note, is_so in (("packed", tier["packs"]), ("DOWN", not tier["up"])) if is_so]
        sizes[name] = (tier["used_bytes"], tier["limit_bytes"], " ".join(notes))
    for name, (used, limit, note) in sizes.items():
        count = sum(row["chunks"] for row in held[name])
        rows.append((name, _size(used), _size(limit), f"{count:,}", _percent(shares[name]["share"]), note))
    chunks = f"{status['chunks']:,} of {status['max_chunks']:,} chunks"
    lines = [f"pool {status['name']}: {len(status['clients'])} clients, {chunks}", *_table(rows)]
    tenants = sorted({row["tenant"] for row in status["held"]})
    if tenants not in ([], [""]):
        rows = [("TENANT", "TIER", "BYTES", "CHUNKS")]
        for row in sorted(status["held"], key=lambda row: str(row["tenant"])):
            rows.append((row["tenant"] or "(others)", row["tier"], _size(row["bytes"]), f"{row['chunks']:,}"))
        lines += ["", *_table(rows)]
    lines += [
        "",
        f"lookups: {hits['lookups']:,}; of {hits['keys']:,} keys {_percent(hits['found'])} were there, "
        f"{_percent(hits['found_in_memory'])} in memory",
        f"loads: {hits['loads']:,} chunks; {_percent(shares['missed']['share'])} were not there, "
        f"{_percent(shares['waited']['share'])} on their way",
    ]
    if memory["hard_pinned_bytes"]:
        lines.append(f"pinned: {_size(memory['hard_pinned_bytes'])}")
    return "\n".join(lines)


def _found_text(found: PromptFound) -> str:
    told = found.public()
    by_tier = ", ".join(f"{tier} {count}" for tier, count in told["by_tier"].items())
    return (
        f"{told['model']} ({told['dtype']}): {told['there']} of {told['chunks']} chunks of {told['chunk_tokens']} "
        f"tokens are there, {told['tokens_there']} of {told['prompt_tokens']} tokens"
        + (f": {by_tier}" if by_tier else "")
    )


def _spaces_text(spaces: list[dict[str, Any]]) -> str:
    if not spaces:
        return "no engine has reported its key space to this pool"
    rows: list[tuple[str, ...]] = [("MODEL", "DTYPE", "CHUNK", "PARTS", "SALT", "SERVED AS")]
    for space in spaces:
        salt, served = "yes" if space["salted"] else "no", ", ".join(space["served"])
        tokens = f"{space['chunk_tokens']} tokens"
        rows.append((space["model"], space["dtype"], tokens, str(len(space["shards"])), salt, served))
    return "\n".join(_table(rows))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"
