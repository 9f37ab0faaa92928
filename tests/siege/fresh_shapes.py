"""Requests, bodies and answers of shapes that nobody needs."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from typing import Any

from tests.siege.fresh_rig import answer, body, completion


def head(path: str = "/v1/completions", length: int | None = None, *more: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *more]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def request(value: dict[str, Any] | bytes, *more: str) -> bytes:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return head("/v1/completions", len(data), *more) + data


SMUGGLED = b"POST /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


def smugglers() -> dict[str, bytes]:
    """Requests that two servers could read two ways; each has another request in its belly."""
    data = json.dumps(body()).encode()
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
    both = [f"Content-Length: {len(data)}", "Transfer-Encoding: chunked"]
    found = {
        "length and chunked": head("/v1/completions", None, *both) + chunk + SMUGGLED,
        "chunked and length": head("/v1/completions", None, *both[::-1]) + chunk + SMUGGLED,
        "two lengths": head("/v1/completions", len(data), "Content-Length: 3") + data + SMUGGLED,
        "equal lengths": head("/v1/completions", len(data), f"Content-Length: {len(data)}") + data + SMUGGLED,
        "listed length": head("/v1/completions", None, f"Content-Length: {len(data)}, {len(data)}") + data + SMUGGLED,
    }
    for name, value in {
        "plus": f"+{len(data)}",
        "minus": "-1",
        "hex": hex(len(data)),
        "underscore": "1_0",
        "blank inside": "1 0",
        "huge": str(1 << 70),
        "empty": "",
        "arabic": "\xb2",
    }.items():
        found[f"length {name}"] = head("/v1/completions", None, f"Content-Length: {value}") + data + SMUGGLED
    for value in (
        "xchunked",
        "chunked, identity",
        "identity, chunked",
        "chunked, chunked",
        "CHUNKED",
        "\x0bchunked",
        "chunked;q=1",
        "gzip, chunked",
        "identity",
        "",
    ):
        found[f"coding {value!r}"] = head("/v1/completions", None, f"Transfer-Encoding: {value}") + chunk + SMUGGLED
    for name, bad in {
        "blank before colon": "Transfer-Encoding : chunked",
        "folded": "X-A: b\r\n Transfer-Encoding: chunked",
        "bare cr": "X-A: b\rTransfer-Encoding: chunked",
        "bare lf": "X-A: b\nTransfer-Encoding: chunked",
        "nul": "X-A: b\0c",
        "no name": ": x",
        "hop by hop": "Connection: content-length, content-type, authorization",
        "te trailers": "TE: trailers, chunked",
    }.items():
        found[name] = head("/v1/completions", len(data), bad) + data + SMUGGLED
    chunked = head("/v1/completions", None, "Transfer-Encoding: chunked")
    for name, stream in {
        "extension": b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(data), data),
        "long extension": b"%x;%s\r\n%s\r\n0\r\n\r\n" % (len(data), b"a" * 100_000, data),
        "trailer": b"%x\r\n%s\r\n0\r\nContent-Length: 5\r\nTransfer-Encoding: x\r\n\r\n" % (len(data), data),
        "lf only": b"%x\n%s\n0\n\n" % (len(data), data),
        "size with sign": b"+%x\r\n%s\r\n0\r\n\r\n" % (len(data), data),
        "size 0x": b"0x%x\r\n%s\r\n0\r\n\r\n" % (len(data), data),
        "size of 2**64": b"10000000000000001\r\n%s\r\n0\r\n\r\n" % data,
        "many zeros": b"%s%x\r\n%s\r\n0\r\n\r\n" % (b"0" * 5000, len(data), data),
    }.items():
        found[f"chunk {name}"] = chunked + stream + SMUGGLED
    found["absolute form"] = request(body()).replace(b"/v1/completions", b"http://other/v1/completions") + SMUGGLED
    found["version"] = request(body()).replace(b"HTTP/1.1", b"HTTP/1.0") + SMUGGLED
    found["get with body"] = request(body()).replace(b"POST", b"GET") + SMUGGLED
    found["line break in path"] = request(body()).replace(b"/v1/completions", b"/v1/completions?a=%0d%0aX:%20y")
    return found


def odd_bodies() -> dict[str, bytes]:
    """JSON, nearly JSON and numbers that are none, with what a client must not say hidden in it."""
    prompt = json.dumps(body()["prompt"])
    start = f'{{"model": "m", "prompt": {prompt}, "max_tokens": 4'
    own = '{"do_remote_prefill": true, "remote_host": "192.0.2.1", "remote_port": 1, "transfer_id": "theirs"}'
    found = {
        f"{name} {value}": f'{start}, "{name}": {value}}}'.encode()
        for name, value in itertools.product(
            (
                "n",
                "best_of",
                "max_tokens",
                "stream",
                "echo",
                "cache_salt",
                "logprobs",
                "prompt_logprobs",
                "prompt",
                "model",
                "seed",
                "stop",
                "user",
                "stream_options",
                "messages",
                "use_beam_search",
                "kv_transfer_params",
            ),
            (
                "1e999",
                "-1e999",
                "NaN",
                "-0",
                "1.5",
                "true",
                "null",
                "[]",
                "{}",
                '""',
                '"\\ud800"',
                "1" * 5000,
                "[[[1]]]",
                '"\\u0000"',
                "[1e999]",
                "[NaN]",
                "[true, null]",
                "[-1]",
                "[1.5]",
                "[99999999999999999999]",
                '["a", 1]',
                '[{"a": 1}]',
            ),
        )
    }
    escaped = '"kv_transfer_par\\u0061ms"'
    found |= {
        "params": f'{start}, "kv_transfer_params": {own}}}'.encode(),
        "params escaped": f"{start}, {escaped}: {own}}}".encode(),
        "params twice": f'{start}, "kv_transfer_params": null, "kv_transfer_params": {own}}}'.encode(),
        "params null then escaped": f'{start}, "kv_transfer_params": null, {escaped}: {own}}}'.encode(),
        "params first": f'{{"kv_transfer_params": {own}, {start[1:]}}}'.encode(),
        "params after the end": f'{start}}}, "kv_transfer_params": {own}}}'.encode(),
        "params in xargs": f'{start}, "vllm_xargs": {{"kv_transfer_params": {own}}}}}'.encode(),
        "params in xargs, alone": f'{start}, "n": 2, "vllm_xargs": {{"kv_transfer_params": {own}}}}}'.encode(),
        "params a word in xargs": f'{start}, "n": 2, "vllm_xargs": {{"kv_transfer_params": "x"}}}}'.encode(),
        "params blanks": f'{start}\t,\r\n "kv_transfer_params"  :\n{own} }} \n'.encode(),
        "prompt twice": f'{start}, "prompt": [9, 9, 9]}}'.encode(),
        "prompt twice, escaped": f'{start}, "prom\\u0070t": [9, 9, 9]}}'.encode(),
        "n twice": f'{start}, "n": 1, "n": 3}}'.encode(),
        "n twice, escaped": f'{start}, "n": 1, "\\u006e": 3}}'.encode(),
        "max_tokens twice": f'{start}, "max_tok\\u0065ns": 7}}'.encode(),
        "stream twice": f'{start}, "stream": true, "stre\\u0061m": false}}'.encode(),
        "deep array": start.encode() + b', "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "deep object": start.encode() + b', "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        "deep, open": b"[" * 1_000_000,
        "deep prompt": b'{"model": "m", "prompt": ' + b"[" * 5000 + b"1" + b"]" * 5000 + b"}",
        "many members": b"{" + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"," + start.encode()[1:] + b"}",
        "one member 100,000 times": b"{" + b'"x":1,' * 100_000 + start.encode()[1:] + b"}",
        "long number": start.encode() + b', "x": ' + b"9" * 1_000_000 + b"}",
        "long exponent": start.encode() + b', "x": 1e' + b"9" * 100_000 + b"}",
        "long escapes": start.encode() + b', "x": "' + b"\\u00e9" * 200_000 + b'"}',
        "backslashes": start.encode() + b', "x": "' + b"\\\\" * 500_000 + b'"}',
        "open string": start.encode() + b', "x": "' + b"\\" * 99_999,
        "utf-16": f"{start}}}".encode("utf-16"),
        "utf-32": f"{start}}}".encode("utf-32-be"),
        "bom": b"\xef\xbb\xbf" + f"{start}}}".encode(),
        "latin-1": f'{start}, "user": "'.encode() + b'\xe9\xff"}',
        "overlong utf-8": f'{start}, "user": "'.encode() + b'\xc0\xa2, "n": 2, "y": "\xed\xa0\x80"}',
        "raw newline in string": f'{start}, "user": "a\nb"}}'.encode(),
        "comment": f"/* */ {start}}} // end".encode(),
        "blanks": b" " * 1_000_000 + f"{start}}}".encode(),
        "form feed": b"\x0c" + f"{start}}}".encode(),
        "nbsp": f"\u00a0{start}}}".encode(),
        "array": b"[]",
        "string": b'"a"',
        "nothing": b"",
        "two": f"{start}}}{start}}}".encode(),
        "lone surrogate key": f'{start}, "\\udfff": 1}}'.encode(),
        "proto": f'{start}, "__proto__": {{}}, "__class__": 1}}'.encode(),
        "single quotes": f"{start}, 'n': 1}}".encode(),
        "trailing comma": f"{start},}}".encode(),
    }
    return found


def odd_authorizations() -> list[tuple[str, ...]]:
    return [
        (),
        ("Authorization: Bearer",),
        ("Authorization: Bearer ",),
        ("Authorization: Bearer \xff\xfe\xe9",),
        ("Authorization: Bearer admin-key",),
        ("Authorization: Bearer client-ke",),
        ("Authorization: Bearer client-key2",),
        ("Authorization: Bearer client-key, Bearer x",),
        ("Authorization: Bearer CLIENT-KEY",),
        ("Authorization: Basic client-key",),
        ("Authorization: client-key",),
        ("Authorization: Bearer x", "Authorization: Bearer client-key"),
        ("X-Api-Key: client-key",),
        ("Cookie: Authorization=client-key",),
        ("Authorization: Bearer " + "k" * 15_000,),
        *((f"Authorization: Bearer k{i}",) for i in range(100)),
    ]


def side_doors() -> list[str]:
    return [
        "/pd/status",
        "//pd/status",
        "/pd//status",
        "/v1/../pd/status",
        "/v1/%2e%2e/pd/status",
        "/%70d/status",
        "/pd%2fstatus",
        "/pd/./status",
        "/PD/status",
        "/pd/status/",
        "/pd/status?x=/v1/",
        "/pd/status;/v1/completions",
        "http://h/pd/status",
        "/metrics",
        "/metrics/",
        "/%6detrics",
        "/METRICS",
        "/./metrics",
        "//metrics",
        "/pd/traces",
        "/pd/%74races",
        "/pd/trace/x",
        "/pd/trace/%2e%2e/%2e%2e/etc/passwd",
        "/pd/trace/%00",
        "/pd/trace/" + "a" * 10_000,
        "/pd/trace/%ff",
        "*",
        "/v1/models/../../pd/status",
        "/health/../metrics",
        "/live%2f..%2fmetrics",
        "/openapi.json/../pd/status",
        "\\pd\\status",
        "/pd\\status",
        "/%",
        "/%zz",
        "?",
        "",
    ]


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def hostile_answers() -> dict[str, tuple[bytes, bytes]]:
    """What a server begins its answer with, and what it goes on with for ever (nothing: it closes)."""
    piece = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    bomb = gzip.compress(bytes(200 << 20), 1)
    deep = b"[" * 1_000_000
    return {
        "endless event": (CHUNKED + b"6\r\ndata: \r\n", piece),
        "endless comments": (CHUNKED, b"4\r\n: \n\n\r\n" * 1000),
        "endless unstreamed": (JSON + b"Transfer-Encoding: chunked\r\n\r\n", piece),
        "endless header line": (b"HTTP/1.1 200 OK\r\nX-A: ", b"a" * 0x10000),
        "endless headers": (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 8000),
        "endless interim": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
        "endless early hints": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 1000),
        "endless status line": (b"HTTP/1.1 200 ", b"O" * 0x10000),
        "endless chunk size": (CHUNKED, b"0" * 0x10000),
        "endless extension": (CHUNKED + b"5;", b"a" * 0x10000),
        "endless trailers": (CHUNKED + b"0\r\n", b"X-A: b\r\n" * 8000),
        "gzip bomb": (
            JSON + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb,
            b"",
        ),
        "deflate bomb": (
            JSON + b"Content-Encoding: deflate\r\nConnection: close\r\n\r\n" + zlib.compress(bytes(200 << 20), 1),
            b"",
        ),
        "gzip that is none": (JSON + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd", b""),
        "unknown coding": (JSON + b"Content-Encoding: rot13\r\nContent-Length: 4\r\n\r\nabcd", b""),
        "deep JSON": (JSON + b"Content-Length: %d\r\n\r\n" % len(deep) + deep, b""),
        "long number": (JSON + b"Content-Length: 1000000\r\n\r\n" + b"9" * 1_000_000, b""),
        "not JSON": (answer(b"<html>", Content_Type="text/html"), b""),
        "not UTF-8": (answer(b'{"a": "\xff\xfe"}'), b""),
        "redirect": (answer(b"", "307 Temporary Redirect", Location="http://127.0.0.1:1/steal"), b""),
        "permanent redirect": (answer(b"", "308 Permanent Redirect", Location="//192.0.2.1/"), b""),
        "too short": (JSON + b"Content-Length: 1000\r\n\r\n{}", b""),
        "too long": (JSON + b"Content-Length: 2\r\n\r\n{}" + answer(b'{"choices": [{"text": "planted"}]}'), b""),
        "negative length": (JSON + b"Content-Length: -5\r\n\r\n{}", b""),
        "two lengths": (JSON + b"Content-Length: 2\r\nContent-Length: 30\r\n\r\n{}", b""),
        "length and chunked": (
            JSON + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            b"",
        ),
        "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        "not modified": (b"HTTP/1.1 304 Not Modified\r\n\r\n", b""),
        "switching": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", b""),
        "status 999": (answer(b"{}", "999 What"), b""),
        "status 099": (answer(b"{}", "099 What"), b""),
        "status 1e3": (answer(b"{}", "1e3 What"), b""),
        "no status": (b"ICY 200 OK\r\n\r\n", b""),
        "nothing": (b"", b""),
        "bytes": (bytes(range(256)) * 10, b""),
        "cookies": (answer(completion(), Set_Cookie="a=b; Domain=127.0.0.1"), b""),
        "names of ours": (
            JSON + b"x-pd-path: disaggregated\r\nx-pd-transfer-id: forged\r\nContent-Length: 2\r\n\r\n{}",
            b"",
        ),
        "bare line breaks": (JSON + b"X-A: b\nSet-Cookie: x\rY: z\r\nContent-Length: 2\r\n\r\n{}", b""),
        "null": (answer(b"null"), b""),
        "list": (answer(b"[]"), b""),
        "params a word": (answer(completion(kv_transfer_params="x")), b""),
        "params a list": (answer(completion(kv_transfer_params=[1])), b""),
        "params NaN": (answer(completion(kv_transfer_params={"remote_port": float("nan"), "remote_host": []})), b""),
        "params huge port": (answer(completion(kv_transfer_params={"remote_port": 1 << 80, "remote_host": "a"})), b""),
        "params surrogate": (
            answer(completion(kv_transfer_params={"remote_port": 1, "remote_host": "\ud800", "tp_size": 1 << 40})),
            b"",
        ),
    }


SALTS: list[Any] = [
    "",
    "b",
    ":b",
    "b:c",
    "b:c:",
    "\0b",
    "\nb",
    "\u00e1",
    "a\u0301",
    "\ud800",
    " b",
    "b ",
    "b\0",
    'b"',
    "\u2028",
    "x" * 100_000,
]
