"""One control channel in a process of its own: prints its events, a JSON line each."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import zmq

from pdtransport.control.channel import (
    ConnectFailed,
    ControlChannel,
    Event,
    Identity,
    MessageReceived,
    PeerDown,
    PeerUp,
    StatusRequested,
)
from pdtransport.settings import ControlSettings


def main() -> None:
    config: dict[str, Any] = json.loads(sys.argv[1])
    me = Identity(config["engine"], 0, 1, config["incarnation"], config["facts"], {})
    channel = ControlChannel(ControlSettings(**config["settings"]), me)
    say(kind="bound", port=int(channel.bind(config.get("port", 0)).rsplit(":", 1)[1]))
    for host, port in config.get("connect", []):
        channel.connect(host, port)
    deadline = time.monotonic() + 120  # never outlives a test by much
    while time.monotonic() < deadline:
        poller = zmq.Poller()
        for socket in channel.sockets():
            poller.register(socket, zmq.POLLIN)
        due = channel.next_deadline()
        wait = 1.0 if due is None else min(1.0, max(0.001, due - time.monotonic()))
        poller.poll(round(wait * 1000))
        now = time.monotonic()
        for event in [*channel.receive(now), *channel.tick(now)]:
            report(channel, event)


def report(channel: ControlChannel, event: Event) -> None:
    if isinstance(event, PeerUp):
        say(
            kind="up",
            engine=event.peer.engine,
            incarnation=event.peer.incarnation,
            connected=event.endpoint is not None,
        )
    elif isinstance(event, PeerDown):
        say(kind="down", engine=event.peer.engine, incarnation=event.peer.incarnation, reason=event.reason)
    elif isinstance(event, ConnectFailed):
        say(kind="failed", reason=event.reason, field=event.field, refused=event.refused)
    elif isinstance(event, MessageReceived):
        say(kind="received", message=event.message.kind)
        channel.send(event.peer, event.message)  # echo
    elif isinstance(event, StatusRequested):
        event.reply(json.dumps({"engine": "child", "transfer": event.transfer, "counters": dict(channel.counters)}))


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
