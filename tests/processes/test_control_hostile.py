"""What arrives at a control port may be anything: garbage, floods, giants, wrong keys. The others are served on."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from pdtransport.control import limits
from pdtransport.control.channel import ConnectFailed, ControlChannel, MessageReceived, PeerDown, PeerUp
from pdtransport.control.client import StatusUnavailable, fetch_status
from pdtransport.control.curve import load_keys, make_keys
from pdtransport.control.door import Door
from pdtransport.errors import SettingsError
from pdtransport.protocol.messages import PROTOCOL_VERSION, Claim, LinkCall, Ping, Refused, Watch, decode, encode
from pdtransport.settings import ControlSettings
from tests.processes.control_rig import FAST, HOST, Bench, Node, Raw, Stranger, bench, identity
from tests.processes.test_control import ask, both_up, peer


@pytest.fixture
def rig() -> Iterator[Bench]:
    with bench() as it:
        yield it


def still_serves(rig: Bench, node: Node) -> None:
    """A newcomer is welcome and its words arrive."""
    newcomer = rig.node("newcomer")
    newcomer.channel.connect(HOST, node.port)
    rig.until(lambda: newcomer.of(PeerUp))
    assert newcomer.channel.send(peer(node), Claim(transfer="after-all"))
    rig.until(lambda: MessageReceived(peer(newcomer), Claim(transfer="after-all")) in node.events)
    rig.drop(newcomer)


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


def message(**fields: Any) -> bytes:
    packed: bytes = msgpack.packb({"v": PROTOCOL_VERSION, **fields})
    return packed


GARBAGE = {
    "empty": b"",
    "one zero": b"\0",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "noise": random.Random(7).randbytes(5000),
    "truncated": encode(Claim(transfer="t" * 100))[:-3],
    "more after the end": encode(Claim(transfer="t")) + b"\0",
    "a list": msgpack.packb([1, 2, 3]),
    "no kind": message(),
    "kind is a number": message(kind=1),
    "unknown kind": message(kind="surrender"),
    "unknown field": message(kind="claim", transfer="t", also=1),
    "missing field": message(kind="claim"),
    "wrong type": message(kind="claim", transfer=1),
    "huge integer": message(kind="ping", incarnation=(1 << 64) - 1),
    "negative": message(kind="ping", incarnation=-1),
    "float for integer": message(kind="ping", incarnation=1.0),
    "code of no kind": message(kind="abort", transfer="t", generation=1, code="because"),
    "long name": message(kind="claim", transfer="t" * 129),
    "odd name": message(kind="claim", transfer="../../etc"),
    "kind of a megabyte": message(kind="x" * 200_000),
    "deep list": nested(1000),
    "deeper list": nested(100_000),
    "deep version": b"\x82\xa4kind\xa4ping\xa1v" + nested(1010),
    "map that claims four billion entries": b"\xdf\xff\xff\xff\xff",
    "bad utf-8": b"\x82\xa4kind\xa2\xff\xfe\xa1v\x01",
    "kind twice": b"\x83\xa4kind\xa5claim\xa4kind\xa4ping\xa1v" + bytes([PROTOCOL_VERSION]),
    "too long for a stranger": message(kind="link", link="ucx", body=b"x" * (limits.MAX_STRANGER_FRAME + 1)),
    "server words": message(kind="status", status="{}"),
}


FOR_PEERS = {"truncated", "more after the end", "unknown field", "missing field", "wrong type"} | {
    "code of no kind", "long name", "odd name"
}  # fmt: skip  # they begin as a peer's words do, and are not looked at any further


@pytest.mark.parametrize("name", sorted(FOR_PEERS))
def test_words_about_transfers_from_strangers_are_not_even_decoded(rig: Bench, name: str) -> None:
    node, stranger = rig.node("p"), Stranger(rig.nodes[0].port)
    try:
        stranger.send(GARBAGE[name])
        rig.until(lambda: node.counters["dropped_unknown_peer"] == 1)
    finally:
        stranger.close()
    assert node.counters["garbage"] == 0
    assert node.events == []
    still_serves(rig, node)


@pytest.mark.parametrize("name", sorted(GARBAGE.keys() - FOR_PEERS))
def test_garbage_is_counted_answered_and_costs_nobody_else(rig: Bench, name: str) -> None:
    node, stranger = rig.node("p"), Stranger(rig.nodes[0].port)
    try:
        stranger.send(GARBAGE[name])
        rig.until(lambda: node.counters["garbage"] == 1)
        answers: list[bytes] = []
        rig.until(lambda: answers.extend(stranger.answers()) or answers)
    finally:
        stranger.close()
    refused = decode(answers[0])
    assert isinstance(refused, Refused)
    assert refused.field == "frame"
    assert node.events == []
    still_serves(rig, node)


def test_garbage_of_a_peer_that_is_up_does_not_end_it(rig: Bench) -> None:
    """One bad frame is no reason to drop transfers; the peer stays, the frame is counted."""
    node, other = rig.node("p"), rig.node("d")
    both_up(rig, other, node)
    dialer = other.channel._dialers[(HOST, node.port)]
    assert dialer.socket is not None
    for frame in GARBAGE.values():
        dialer.socket.send(frame)
    rig.until(lambda: node.counters["garbage"] >= len(GARBAGE) - 1)
    rig.run(0.3)
    assert not node.of(PeerDown)
    assert not other.of(PeerDown)
    assert other.channel.send(peer(node), Claim(transfer="t"))
    rig.until(lambda: node.of(MessageReceived))


def test_a_server_that_answers_with_garbage_fails_the_connection_only(rig: Bench) -> None:
    node = rig.node("d", connect_s=0.7)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        port = server.bind_to_random_port(f"tcp://{HOST}")
        node.channel.connect(HOST, port)
        rig.until(lambda: server.poll(1))
        sender, _ = server.recv_multipart()
        for frame in GARBAGE.values():
            server.send_multipart([sender, frame])
        server.send_multipart([sender, b"many", b"parts"])
        rig.until(lambda: node.of(ConnectFailed))
    assert node.counters["garbage"] > len(GARBAGE) // 2
    assert not node.of(ConnectFailed)[0].refused
    still_serves(rig, node)


def test_garbage_is_answered_once_and_logged_once_and_its_sender_cut_off(
    rig: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """A stranger has a budget of frames; beyond it nothing is looked at, and its connection ends."""
    node, stranger = rig.node("p"), Stranger(rig.nodes[0].port, reconnect_ivl=-1)
    answers: list[bytes] = []

    def cut() -> bool:
        for _ in range(50):
            with contextlib.suppress(zmq.Again):
                stranger.socket.send(b"garbage", zmq.NOBLOCK)
        answers.extend(stranger.answers())
        return node.counters["callers_cut"] == 1 and not len(door(node))

    try:
        rig.until(cut)
    finally:
        stranger.close()
    answered = [decode(answer) for answer in answers]
    assert all(isinstance(each, Refused) and each.field == "frame" for each in answered)
    assert "cut off: more than" in answered[-1].reason
    assert len(answered) <= 2 + node.counters["garbage"] // limits.STRANGER_FRAMES_PER_S
    assert limits.STRANGER_FRAMES <= node.counters["garbage"] <= 2 * limits.STRANGER_FRAMES
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(f"invalid frame from {HOST}:")
    still_serves(rig, node)


def door(node: Node) -> Door:
    """Who has connected to a node."""
    assert node.channel._listener is not None
    return node.channel._listener._door


def test_a_message_of_many_parts_is_thrown_away_part_by_part(rig: Bench) -> None:
    node, stranger = rig.node("p"), Stranger(rig.nodes[0].port)
    try:
        stranger.send(*[encode(Claim(transfer="t"))] * 5000)
        stranger.send(encode(Ping(incarnation=1)))
        answers: list[bytes] = []
        rig.until(lambda: answers.extend(stranger.answers()) or len(answers) == 2)
    finally:
        stranger.close()
    assert [getattr(decode(answer), "field", "") for answer in answers] == ["frame", "hello"]
    assert node.counters["garbage"] == 1
    still_serves(rig, node)


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\0" * 64,
        b"\xff" * 64,
        random.Random(3).randbytes(4096),
        b"\x01\x00\x05hello\x05hello",  # ZMTP 1.0
        bytes.fromhex("ff00000000000000017f0300") + b"NULL" + b"\0" * 48 + b"\x04\xff" + b"x" * 300,
    ],
    ids=["http", "zeros", "ones", "noise", "zmtp 1", "zmtp 3, then nonsense"],
)
def test_raw_bytes_on_the_port_harm_nobody(rig: Bench, raw: bytes) -> None:
    node = rig.node("p")
    with socket.create_connection((HOST, node.port)) as plain:
        plain.sendall(raw)
        rig.run(0.1)
        still_serves(rig, node)
    still_serves(rig, node)
    assert not [event for event in node.of(PeerUp) if event.peer.engine != "newcomer"]


def test_a_frame_over_the_limit_costs_its_sender_the_connection(rig: Bench) -> None:
    """It is refused by its announced length, before it is read."""
    node, stranger = rig.node("p", max_frame_bytes=8192), Stranger(rig.nodes[0].port)
    try:
        stranger.send(encode(Ping(incarnation=1)))
        rig.until(lambda: stranger.answers())
        heard = node.counters["frames_in"]
        stranger.send(b"x" * 9000)
        rig.run(0.2)
        still_serves(rig, node)
        assert node.counters["garbage"] == 0
        assert node.counters["frames_in"] >= heard
    finally:
        stranger.close()


def test_connections_that_say_nothing_are_closed_in_time(rig: Bench) -> None:
    """Neither a silent connection nor one that stops within its greeting keeps a descriptor for longer than connect_s;
    meanwhile others are served."""
    node = rig.node("p", connect_s=1.0)
    greeting = bytes.fromhex("ff00000000000000017f03")
    with contextlib.ExitStack() as stack:
        silent = []
        for number in range(200):
            one = stack.enter_context(socket.create_connection((HOST, node.port)))
            one.sendall(greeting[: number % (len(greeting) + 1)])
            one.setblocking(False)
            silent.append(one)
        still_serves(rig, node)

        def closed(one: socket.socket) -> bool:
            try:
                while one.recv(4096):  # its own greeting comes first
                    pass
            except BlockingIOError:
                return False
            except ConnectionError:
                return True
            return True

        def all_closed() -> bool:
            silent[:] = [one for one in silent if not closed(one)]
            return not silent

        rig.until(all_closed)
    assert not [event for event in node.of(PeerUp) if event.peer.engine != "newcomer"]
    still_serves(rig, node)


SOCKET_BYTES = 32 << 20  # more than the system keeps of one connection, on both ends


@pytest.mark.parametrize("body", [0, 20_000], ids=["small frames", "large frames"])
def test_a_peer_that_floods_costs_the_others_little_time_and_no_memory(rig: Bench, body: int) -> None:
    """Frames are read in turn from all, so that a word does not wait for what others sent before it, and what is not
    read yet waits at its sender."""
    node, flooder = rig.node("p"), rig.node("d")
    both_up(rig, flooder, node)
    flood = LinkCall(link="cma", body=bytes(body)) if body else Claim(transfer="flood")
    sent = refused = taken = 0

    def pour() -> None:
        nonlocal sent, refused
        for _ in range(2000):
            if not flooder.channel.send(peer(node), flood):
                refused += 1
                return
            sent += 1

    def within_the_flood(condition: Callable[[], Any]) -> None:
        def poured() -> Any:
            nonlocal taken
            pour()
            kept = [each for each in node.events if not isinstance(each, MessageReceived) or each.message != flood]
            taken += len(node.events) - len(kept)
            node.events[:] = kept
            return condition()

        rig.until(poured)

    for _ in range(30):  # while nobody reads
        pour()
        time.sleep(0.02)
    if body:  # small frames all fit into what the system keeps
        assert refused
        assert sent < limits.SEND_QUEUE_FRAMES + limits.RECEIVE_QUEUE_FRAMES + SOCKET_BYTES // body
    newcomer = rig.node("newcomer")
    newcomer.channel.connect(HOST, node.port)
    within_the_flood(lambda: newcomer.of(PeerUp))
    for number in range(5):
        word = Claim(transfer=f"after-all-{number}")
        ahead, before = sent - taken, taken
        assert newcomer.channel.send(peer(node), word)
        time.sleep(0.1)  # it arrives while nobody reads, behind all these
        within_the_flood(lambda word=word: MessageReceived(peer(newcomer), word) in node.events)
        assert taken - before < ahead
    assert not node.of(PeerDown)


def test_of_many_strangers_the_oldest_is_closed_and_peers_and_watchers_stay(
    rig: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections that do not say who they are, idle ones above all, take up so many descriptors at most; nobody who
    did pays for them, and one line of log tells."""
    monkeypatch.setattr("pdtransport.control.door.MAX_STRANGERS", 5)
    node, worker = rig.node("p"), rig.node("d")
    both_up(rig, worker, node)
    watcher = Stranger(node.port, reconnect_ivl=-1)
    watcher.send(encode(Watch()))
    rig.until(lambda: node.channel.watched)
    strangers = []
    try:
        for count in range(1, 21):
            strangers.append(Stranger(node.port, reconnect_ivl=-1))
            if count % 2:
                strangers[-1].send(b"junk")
                rig.until(lambda count=count: node.counters["garbage"] == (count + 1) // 2)
        rig.until(lambda: node.counters["callers_cut"] == 16)
        assert len(door(node)) == 1 + 5  # the peer's, and the watcher's among the strangers'
        assert node.channel.send(peer(worker), Claim(transfer="t"))
        rig.until(lambda: worker.of(MessageReceived))
        assert node.channel.watched
        assert not node.of(PeerDown)
        assert len(caplog.records) == 1
        still_serves(rig, node)
    finally:
        for stranger in (*strangers, watcher):
            stranger.close()


def test_bytes_of_a_message_without_an_end_count(rig: Bench) -> None:
    """libzmq keeps the first parts of a message until the last is there, and tells nobody: what the kernel has
    received for a stranger is bounded all the same."""
    node, stranger = rig.node("p"), Raw(rig.nodes[0].port)
    part = Raw.frame(bytes(64 << 10), more=True)
    try:
        rig.until(lambda: not stranger.send(part) or stranger.closed())
        rig.until(lambda: not len(door(node)))
        assert node.counters["callers_cut"] == 1
        assert node.counters["frames_in"] == 0
        still_serves(rig, node)
    finally:
        stranger.close()


def test_a_port_that_takes_connections_and_says_nothing_fails_at_the_deadline(rig: Bench) -> None:
    node = rig.node("d", connect_s=0.5)
    with socket.create_server((HOST, 0)) as mute:
        node.channel.connect(HOST, mute.getsockname()[1])
        rig.until(lambda: node.of(ConnectFailed))
    assert "check the port" in node.of(ConnectFailed)[0].reason


def test_a_port_that_speaks_something_else_is_named(rig: Bench) -> None:
    node = rig.node("d", connect_s=1.0)
    with socket.create_server((HOST, 0)) as web:
        web.setblocking(False)
        node.channel.connect(HOST, web.getsockname()[1])
        talks: list[socket.socket] = []

        def answer() -> bool:
            try:
                talk, _ = web.accept()
                talk.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
                talks.append(talk)
            except BlockingIOError:
                pass
            return bool(node.of(ConnectFailed))

        rig.until(answer)
        for talk in talks:
            talk.close()
    assert "port" in node.of(ConnectFailed)[0].reason


# -- CURVE -----------------------------------------------------------------------------------------------------------

Pair = dict[str, Any]


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[str], Pair]:
    def make(name: str) -> Pair:
        public, secret = make_keys(tmp_path / name)
        return {"curve_public_key_file": public, "curve_secret_key_file": secret}

    return make


def public_of(pair: Pair) -> str:
    return str(Path(pair["curve_public_key_file"]).read_text().strip())


def test_one_shared_pair_is_all_that_peers_need(rig: Bench, pair: Callable[[str], Pair]) -> None:
    keys = pair("shared")
    a, b = rig.node("a", **keys), rig.node("b", **keys)
    both_up(rig, a, b)
    status, _ = ask(rig, b, {"engine": "b"}, settings=ControlSettings(**FAST, **keys))
    assert status == {"engine": "b"}


def test_each_its_own_pair_and_named_keys(rig: Bench, pair: Callable[[str], Pair]) -> None:
    mine, yours = pair("mine"), pair("yours")
    a = rig.node("a", **mine, curve_server_key=public_of(yours))
    b = rig.node("b", **yours, curve_allowed_keys=(public_of(mine),))
    both_up(rig, a, b)


@pytest.mark.parametrize("case", ["wrong server key", "key not allowed", "no keys here", "no keys there"])
def test_keys_that_do_not_fit_fail_by_the_name_of_curve_and_both_serve_on(
    rig: Bench, pair: Callable[[str], Pair], case: str
) -> None:
    good, other = pair("good"), pair("other")
    server = rig.node("p", connect_s=3.0, **({} if case == "no keys there" else good))
    client_keys: Pair = {
        "wrong server key": {**good, "curve_server_key": public_of(other)},
        "key not allowed": {**other, "curve_server_key": public_of(good)},
        "no keys here": {},
        "no keys there": good,
    }[case]
    client = rig.node("d", connect_s=3.0, **client_keys)
    client.channel.connect(HOST, server.port)
    rig.until(lambda: client.of(ConnectFailed))
    (failed,) = client.of(ConnectFailed)
    assert "CURVE" in failed.reason
    assert "\n" not in failed.reason
    rig.until(lambda: server.counters["refused"] + server.counters["handshakes_failed"] >= 1)
    assert not server.of(PeerUp)
    client.channel.connect(HOST, server.port)  # asking again is answered again
    rig.until(lambda: len(client.of(ConnectFailed)) == 2)
    friend = rig.node("friend", **({} if case == "no keys there" else good))
    both_up(rig, friend, server)
    fellow = rig.node("fellow", **({**other} if case == "key not allowed" else client_keys))
    both_up_as_server(rig, client, fellow, pair, case)


def both_up_as_server(rig: Bench, client: Node, fellow: Node, pair: Callable[[str], Pair], case: str) -> None:
    """The refused one still takes connections of its own."""
    if case == "wrong server key":
        return  # its fellow would look for the wrong server as well
    fellow.channel.connect(HOST, client.port)
    rig.until(lambda: fellow.of(PeerUp) and client.of(PeerUp))


@pytest.mark.parametrize("host", ["10.1.2.3", "127.0.0.1.example.org", "fe80::1"])
def test_nobody_on_another_machine_is_called_in_plaintext(rig: Bench, pair: Callable[[str], Pair], host: str) -> None:
    """Closed by default, in both directions: a peer's address comes from a request, and may be anything."""
    node = rig.node("d")
    node.channel.connect(host, 7670)
    rig.until(lambda: node.of(ConnectFailed))
    (failed,) = node.of(ConnectFailed)
    assert failed.refused
    for word in ("CURVE", "pdlaunch keys", "control.curve_secret_key_file", "control.allow_plaintext"):
        assert word in failed.reason
    assert not node.channel._dialers  # no socket was opened for it
    with pytest.raises(StatusUnavailable, match="CURVE"):
        fetch_status(host, 7670, timeout_s=0.2)
    for opened in (rig.node("k", **pair("keys")), rig.node("o", allow_plaintext=True)):
        opened.channel.connect(host, 7670)
        assert opened.channel._dialers


def test_a_name_that_resolves_to_another_address_is_not_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` is what the resolver says: what counts is the address that is bound."""
    elsewhere = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("0.0.0.0", 0))]
    monkeypatch.setattr("pdtransport.control.listener.stdlib_socket.getaddrinfo", lambda *_, **__: elsewhere)
    channel = ControlChannel(ControlSettings(**{**FAST, "host": "localhost"}), identity("a"))
    try:
        with pytest.raises(SettingsError, match=r"control\.host.*pdlaunch keys"):
            channel.bind()
    finally:
        channel.close()


def test_a_stranger_without_a_key_gets_no_status(rig: Bench, pair: Callable[[str], Pair]) -> None:
    node = rig.node("p", **pair("good"))
    error, asked = ask(rig, node, {"engine": "p"}, timeout_s=1.0)
    assert isinstance(error, StatusUnavailable)
    assert "CURVE" in str(error)
    assert not asked


def test_new_keys_are_for_their_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    public, secret = make_keys(tmp_path / "keys")
    before = secret.read_bytes()
    assert len(before.strip()) == len(public.read_bytes().strip()) == 40
    for path in (public, secret):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(SettingsError, match="never overwritten"):
        make_keys(tmp_path / "keys")
    assert secret.read_bytes() == before


def test_key_files_that_can_not_be_used_are_one_line_that_names_the_setting(
    tmp_path: Path, pair: Callable[[str], Pair]
) -> None:
    good, other = pair("good"), pair("other")
    empty, text, folder = tmp_path / "empty", tmp_path / "text", tmp_path
    empty.write_bytes(b"")
    text.write_text('"' * 40)
    secret_text = Path(good["curve_secret_key_file"]).read_text().strip()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"curve_secret_key_file": tmp_path / "missing"}, "curve_secret_key_file.*No such file.*pdlaunch keys"),
        ({"curve_public_key_file": tmp_path / "missing"}, "curve_public_key_file.*No such file"),
        ({"curve_secret_key_file": empty}, "curve_secret_key_file.*CURVE key"),
        ({"curve_secret_key_file": text}, "curve_secret_key_file.*CURVE key"),
        ({"curve_secret_key_file": folder}, "curve_secret_key_file.*can't be read"),
        ({"curve_secret_key_file": other["curve_secret_key_file"]}, "not from one pair"),
        ({"curve_server_key": "short"}, "curve_server_key.*CURVE key"),
        ({"curve_allowed_keys": ("\xe9" * 20,)}, "curve_allowed_keys.*CURVE key"),
    ]
    for change, pattern in cases:
        with pytest.raises(SettingsError, match=pattern) as caught:
            ControlChannel(ControlSettings(**{**FAST, **good, **change}), identity("a"))
        assert "\n" not in str(caught.value)
        assert secret_text not in str(caught.value)
        with pytest.raises(SettingsError):
            fetch_status(HOST, 1, settings=ControlSettings(**{**FAST, **good, **change}), timeout_s=0.1)


def test_secrets_are_not_shown(pair: Callable[[str], Pair], caplog: pytest.LogCaptureFixture) -> None:
    keys = pair("good")
    os.chmod(keys["curve_secret_key_file"], 0o644)
    settings = ControlSettings(**{**FAST, **keys})
    loaded = load_keys(settings)
    secret = Path(keys["curve_secret_key_file"]).read_text().strip()
    assert secret not in repr(loaded)
    assert secret not in repr(settings)
    assert "chmod 600" in caplog.text
    assert secret not in caplog.text
