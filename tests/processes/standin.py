"""A server process that stands in for vLLM where only its life and death matter: it answers /health, and misbehaves
as its options say. Every process that it makes writes its id into ``--pids``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKENS = [7, 11, 13]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self, body: bytes = b"", **headers: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = {
            "choices": [
                {"index": 0, "text": "abc", "token_ids": TOKENS[: asked["max_tokens"]], "finish_reason": "length"}
            ],
            "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
            "kv_transfer_params": None,
        }
        self._answer(json.dumps(answer).encode(), Content_Type="application/json")

    def log_message(self, *args: object) -> None:
        pass


def note(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--pids", type=Path, required=True)
    options.add_argument("--say", default="", help="write this and die at once")
    options.add_argument("--deaf", action="store_true", help="ignore SIGTERM")
    options.add_argument("--silent", action="store_true", help="never listen")
    options.add_argument("--socket", action="store_true", help="leave a socket where vLLM does")
    options.add_argument("--child", action="store_true", help="leave a process in a session of its own")
    chosen = options.parse_args()
    note(chosen.pids)
    signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(4))
    if chosen.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if chosen.child:
        code = "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        code += "open(f'{sys.argv[1]}/{os.getpid()}', 'w').close()\ntime.sleep(600)"
        subprocess.Popen([sys.executable, "-c", code, str(chosen.pids)], start_new_session=True)
    if chosen.socket:
        socket.socket(socket.AF_UNIX).bind(os.path.join(os.environ["VLLM_RPC_BASE_PATH"], str(os.getpid())))
    for number in range(30):
        print(f"line {number} of the log", flush=True)
    if chosen.say:
        print(chosen.say, flush=True)
        sys.exit(3)
    if chosen.silent:
        time.sleep(600)
    ThreadingHTTPServer(("127.0.0.1", chosen.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
