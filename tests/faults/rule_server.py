"""How the rig sets the rules of an injector inside a server that it started: over a private Unix socket."""

from __future__ import annotations

import threading
from multiprocessing.connection import Client, Listener
from pathlib import Path

from pdtransport import Transport
from tests.faults.rules import Injector, Rule

SOCKET_VARIABLE = "PDT_FAULTS_SOCKET"
ANSWER_S = 10.0


def serve_rules(path: Path, transport: Transport, injector: Injector) -> None:
    """Take rules from whoever connects to ``path``, one list a connection, and answer what was done so far. In a thread
    of its own, for as long as the process lives."""
    path.unlink(missing_ok=True)  # of a process that was killed
    listener = Listener(str(path), "AF_UNIX")

    def serve() -> None:
        while True:
            with listener.accept() as connection:
                try:
                    rules = connection.recv()
                    transport._ask(lambda _engine, rules=rules: injector.set(rules), ANSWER_S)  # type: ignore[misc]
                    connection.send(dict(injector.done))
                except (EOFError, OSError, TimeoutError):
                    continue  # the rig went away, or notices that we do not answer

    threading.Thread(target=serve, name="faults", daemon=True).start()


def set_rules(path: Path, rules: list[Rule]) -> dict[str, int]:
    """Replace the rules of a server's worker; what its injector has done since it started, by action.

    Raises:
        OSError, EOFError: the worker is gone or does not answer.
    """
    with Client(str(path), "AF_UNIX") as connection:
        connection.send(rules)
        if not connection.poll(ANSWER_S):
            raise TimeoutError(f"nobody answers at {path}")
        done: dict[str, int] = connection.recv()
        return done
