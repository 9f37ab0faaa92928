"""The control channel over real sockets: handshakes, refusals by name, messages, status."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import zmq

from pdtransport.control import limits, listener
from pdtransport.control.channel import (
    ConnectFailed,
    ControlChannel,
    Identity,
    MessageReceived,
    PeerDown,
    PeerId,
    PeerUp,
    StatusRequested,
)
from pdtransport.control.client import StatusUnavailable, afetch_status, fetch_status
from pdtransport.errors import SettingsError
from pdtransport.protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Batch,
    Claim,
    Hello,
    LinkCall,
    Refused,
    StatusRequest,
    decode,
    encode,
)
from pdtransport.settings import ControlSettings
from tests.processes.control_rig import FAST, HOST, WAIT_S, Bench, Node, Stranger, bench, identity


@pytest.fixture
def rig() -> Iterator[Bench]:
    with bench() as it:
        yield it


def both_up(rig: Bench, one: Node, other: Node) -> None:
    one.channel.connect(HOST, other.port)
    rig.until(lambda: one.of(PeerUp) and other.of(PeerUp))


def peer(node: Node) -> PeerId:
    return PeerId(node.me.engine, node.me.rank, node.me.incarnation)


# -- handshake -----------------------------------------------------------------------------------------------------


def test_both_sides_learn_who_the_other_is_and_messages_flow_both_ways(rig: Bench) -> None:
    prefill, decode_ = rig.node("p"), rig.node("d")
    both_up(rig, decode_, prefill)
    (seen,) = decode_.of(PeerUp)
    assert (seen.peer, seen.host, seen.endpoint) == (peer(prefill), HOST, (HOST, prefill.port))
    assert (seen.hello.links, seen.hello.world) == ({"ucx": b"p"}, 1)
    (seen,) = prefill.of(PeerUp)
    assert (seen.peer, seen.host, seen.endpoint) == (peer(decode_), HOST, None)
    assert decode_.channel.send(peer(prefill), Claim(transfer="t"))
    assert prefill.channel.send(peer(decode_), LinkCall(link="ucx", body=b"x"))
    rig.until(lambda: prefill.of(MessageReceived) and decode_.of(MessageReceived))
    assert prefill.of(MessageReceived) == [MessageReceived(peer(decode_), Claim(transfer="t"))]
    assert decode_.of(MessageReceived) == [MessageReceived(peer(prefill), LinkCall(link="ucx", body=b"x"))]


def test_connecting_twice_is_one_connection(rig: Bench) -> None:
    a, b = rig.node("a"), rig.node("b")
    a.channel.connect(HOST, b.port)
    version = a.channel.version
    both_up(rig, a, b)
    a.channel.connect(HOST, b.port)
    rig.run(0.2)
    assert len(a.of(PeerUp)) == len(b.of(PeerUp)) == 1
    assert a.channel.version == version


def test_two_that_connect_to_each_other_are_one_peer_each_and_each_learns_its_endpoint(rig: Bench) -> None:
    """PeerUp once without and once with the endpoint, or once with it: never a PeerDown between."""
    a, b = rig.node("a"), rig.node("b")
    both_up(rig, a, b)
    b.channel.connect(HOST, a.port)
    rig.until(lambda: [up.endpoint for up in b.of(PeerUp)] == [None, (HOST, a.port)])
    assert [up.endpoint for up in a.of(PeerUp)] == [(HOST, b.port)]
    assert a.channel.send(peer(b), Claim(transfer="t"))
    rig.until(lambda: b.of(MessageReceived))
    rig.run(0.3)
    assert len(b.of(MessageReceived)) == 1
    assert not a.of(PeerDown)
    assert not b.of(PeerDown)


def test_a_second_name_for_the_same_peer_is_the_same_peer(rig: Bench) -> None:
    a, b = rig.node("a"), rig.node("b")
    both_up(rig, a, b)
    a.channel.connect("localhost", b.port)
    rig.until(lambda: len(a.of(PeerUp)) == 2)
    assert {up.peer for up in a.of(PeerUp)} == {peer(b)}
    assert len(b.of(PeerUp)) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol_version", 2),
        ("model", "other"),
        ("block_size", 32),
        ("kv_heads", 8),
        ("tp_size", 3),
        ("dtype", "float16"),
        ("made_up", True),
    ],
)
def test_a_differing_field_is_refused_by_its_name(rig: Bench, field: str, value: Any) -> None:
    prefill, decode_ = rig.node("p"), rig.node("d", me=identity("d", **{field: value}))
    decode_.channel.connect(HOST, prefill.port)
    rig.until(lambda: decode_.of(ConnectFailed))
    (failed,) = decode_.of(ConnectFailed)
    assert failed.refused
    assert failed.field == field
    assert field in failed.reason
    assert "\n" not in failed.reason
    rig.run(0.2)
    assert not prefill.of(PeerUp)
    assert not decode_.of(PeerUp)
    assert prefill.counters["refused"] == 1


def test_another_tp_size_is_bridged(rig: Bench) -> None:
    prefill, decode_ = rig.node("p"), rig.node("d", me=identity("d", rank=1, world=2, tp_size=2))
    both_up(rig, decode_, prefill)


def test_a_refusal_is_asked_again_later_and_other_peers_are_served_meanwhile(rig: Bench) -> None:
    """Asking again at once repeats the answer without a word on the wire; after a while it asks anew."""
    prefill, bad, good = rig.node("p"), rig.node("bad", me=identity("bad", block_size=32)), rig.node("good")
    bad.channel.connect(HOST, prefill.port)
    rig.until(lambda: bad.of(ConnectFailed))
    heard = prefill.counters["frames_in"]
    bad.channel.connect(HOST, prefill.port)
    rig.until(lambda: len(bad.of(ConnectFailed)) == 2)
    assert prefill.counters["frames_in"] == heard
    both_up(rig, good, prefill)
    rig.run(limits.REFUSAL_HOLDS_S + 0.1)
    bad.channel.connect(HOST, prefill.port)
    rig.until(lambda: len(bad.of(ConnectFailed)) == 3)
    assert prefill.counters["refused"] == 2


def test_connecting_to_oneself_is_refused_and_harmless(rig: Bench) -> None:
    a, b = rig.node("a"), rig.node("b")
    a.channel.connect(HOST, a.port)
    rig.until(lambda: a.of(ConnectFailed))
    assert a.of(ConnectFailed)[0].field == "engine"
    assert "itself" in a.of(ConnectFailed)[0].reason
    both_up(rig, a, b)


def test_two_instances_of_one_name_are_refused(rig: Bench) -> None:
    one, other = rig.node("same"), rig.node("same")
    one.channel.connect(HOST, other.port)
    rig.until(lambda: one.of(ConnectFailed))
    assert one.of(ConnectFailed)[0].field == "engine"
    assert "engine_id" in one.of(ConnectFailed)[0].reason


def hello(**changes: Any) -> bytes:
    me = identity("handmade")
    fields = {
        "v": PROTOCOL_VERSION,
        "kind": "hello",
        "protocol": PROTOCOL_VERSION,
        "engine": me.engine,
        "rank": 0,
        "world": 1,
        "incarnation": me.incarnation,
        "fingerprint": me.fingerprint,
        "links": {},
    }
    packed: bytes = msgpack.packb({**fields, **changes})
    return packed


@pytest.mark.parametrize("changes", [{"v": 99}, {"protocol": 99}, {"v": 99, "of": "another age"}])
def test_another_protocol_version_is_refused_by_name(rig: Bench, changes: dict[str, Any]) -> None:
    node, stranger = rig.node("p"), Stranger(rig.nodes[0].port)
    try:
        stranger.send(hello(**changes))
        rig.until(lambda: node.counters["frames_in"])
        answers: list[bytes] = []
        rig.until(lambda: answers.extend(stranger.answers()) or answers)
        refused = decode(answers[0])
        assert isinstance(refused, Refused)
        assert (refused.field, refused.ours, refused.yours) == ("protocol_version", str(PROTOCOL_VERSION), "99")
    finally:
        stranger.close()
    assert not node.of(PeerUp)


def test_a_server_of_another_protocol_version_fails_the_connection_by_name(rig: Bench) -> None:
    node = rig.node("d")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        port = server.bind_to_random_port(f"tcp://{HOST}")
        node.channel.connect(HOST, port)
        rig.until(lambda: server.poll(1))
        sender, _ = server.recv_multipart()
        server.send_multipart(
            [sender, msgpack.packb({"v": PROTOCOL_VERSION + 1, "kind": "refused", "why": "who are you"})]
        )
        rig.until(lambda: node.of(ConnectFailed))
    (failed,) = node.of(ConnectFailed)
    assert (failed.field, failed.refused) == ("protocol_version", True)


def test_nobody_there_is_reported_once_a_call_and_found_later(rig: Bench) -> None:
    """An endpoint that is not up yet is an error at the deadline, and a peer as soon as it comes up."""
    node = rig.node("d", connect_s=0.4)
    gone = rig.node("p")
    port = gone.port
    rig.drop(gone)
    node.channel.connect(HOST, port)
    rig.until(lambda: node.of(ConnectFailed))
    assert not node.of(ConnectFailed)[0].refused
    assert "control.connect_s" in node.of(ConnectFailed)[0].reason
    rig.run(0.8)
    assert len(node.of(ConnectFailed)) == 1
    node.channel.connect(HOST, port)
    rig.until(lambda: len(node.of(ConnectFailed)) == 2)
    late = rig.node("p", bind=False)
    late.channel.bind(port)
    rig.until(lambda: node.of(PeerUp) and late.of(PeerUp))


@pytest.mark.parametrize(
    ("host", "port", "field"),
    [
        ("no such host", 7670, "host"),
        ("a;b", 7670, "host"),
        ("", 7670, "host"),
        (HOST, 0, "port"),
        (HOST, 70000, "port"),
    ],
)
def test_an_address_that_can_not_be_is_an_event_not_an_exception(rig: Bench, host: str, port: int, field: str) -> None:
    node = rig.node("d")
    node.channel.connect(host, port)
    rig.until(lambda: node.of(ConnectFailed))
    assert node.of(ConnectFailed)[0].field == field


def test_more_endpoints_than_the_bound_are_refused(rig: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdtransport.control.channel.MAX_CONNECTIONS", 2)
    a, others = rig.node("a"), [rig.node(name) for name in "bcd"]
    for each in others[:2]:
        both_up(rig, a, each)
        a.take(PeerUp)
    a.channel.connect(HOST, others[2].port)
    rig.until(lambda: a.of(ConnectFailed))
    assert a.of(ConnectFailed)[0].field == "peers"


def test_more_peers_than_the_bound_are_refused(rig: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdtransport.control.directory.MAX_PEERS", 1)
    prefill, first, second = rig.node("p"), rig.node("d1"), rig.node("d2")
    both_up(rig, first, prefill)
    second.channel.connect(HOST, prefill.port)
    rig.until(lambda: second.of(ConnectFailed))
    assert second.of(ConnectFailed)[0].field == "peers"


def test_ipv6(rig: Bench) -> None:
    a, b = rig.node("a", host="::1"), rig.node("b", host="::1")
    a.channel.connect("::1", b.port)
    rig.until(lambda: a.of(PeerUp) and b.of(PeerUp))
    assert b.of(PeerUp)[0].host == "::1"


# -- binding -------------------------------------------------------------------------------------------------------


def test_a_port_in_use_names_the_setting_the_port_and_the_remedy(rig: Bench) -> None:
    node, other = rig.node("a"), rig.node("b", bind=False)
    with pytest.raises(SettingsError, match=rf"control\.port: port {node.port} .*in use.*PDTRANSPORT_CONTROL_PORT"):
        other.channel.bind(node.port)


def test_rank_r_listens_on_port_plus_r() -> None:
    for base in range(21150, 21199, 2):  # some of them may be taken
        channel = ControlChannel(ControlSettings(**{**FAST, "port": base}), identity("a", rank=1, world=2))
        try:
            assert channel.bind() == f"tcp://{HOST}:{base + 1}"
            return
        except SettingsError:
            continue
        finally:
            channel.close()
    pytest.fail("no free port")


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours_names_the_setting(host: str) -> None:
    channel = ControlChannel(ControlSettings(**{**FAST, "host": host, "allow_plaintext": True}), identity("a"))
    try:
        with pytest.raises(SettingsError, match=r"control\.host"):
            channel.bind()
    finally:
        channel.close()


def test_an_identity_that_no_hello_can_carry_is_refused_at_the_start() -> None:
    with pytest.raises(SettingsError, match="export too much"):
        ControlChannel(ControlSettings(**FAST), Identity("a", 0, 1, 1, {}, {"ucx": b"x" * (1 << 20)}))
    with pytest.raises(SettingsError, match="engine"):
        ControlChannel(ControlSettings(**FAST), Identity("", 0, 1, 1))


# -- messages ------------------------------------------------------------------------------------------------------


def test_sending_to_a_peer_that_is_not_up_returns_false_and_is_counted(rig: Bench) -> None:
    a, b = rig.node("a"), rig.node("b")
    assert not a.channel.send(PeerId("nobody", 0, 1), Claim(transfer="t"))
    both_up(rig, a, b)
    assert not a.channel.send(PeerId("b", 0, b.me.incarnation + 1), Claim(transfer="t"))
    assert a.counters["send_failed"] == 2


def test_a_full_queue_returns_false_and_never_blocks(rig: Bench) -> None:
    """The other side does not read; sending goes on until every bounded queue is full, then fails at once."""
    a, b = rig.node("a"), rig.node("b")
    both_up(rig, a, b)
    call = LinkCall(link="ucx", body=b"x" * (1 << 16))
    sent = 0
    while a.channel.send(peer(b), call):
        sent += 1
        assert sent < 20000
    assert a.counters["send_failed"] == 1
    assert sent > limits.SEND_QUEUE_FRAMES // 2
    rig.until(lambda: len(b.of(MessageReceived)) == sent, 60)


def test_a_message_longer_than_a_frame_may_be_is_not_sent(rig: Bench) -> None:
    """It would cost the connection, since the other side hangs up on it."""
    a, b = rig.node("a", max_frame_bytes=4096), rig.node("b")
    both_up(rig, a, b)
    assert not a.channel.send(peer(b), LinkCall(link="ucx", body=b"x" * 5000))
    assert a.channel.send(peer(b), Ack(transfer="t", generation=1))
    rig.until(lambda: b.of(MessageReceived))


def test_a_turn_handles_no_more_frames_than_its_limit(rig: Bench) -> None:
    a, b = rig.node("a"), rig.node("b")
    both_up(rig, a, b)
    for _ in range(100):
        assert a.channel.send(peer(b), Claim(transfer="t"))
    got = 0
    while got < 100:
        assert b.channel._poller.poll(WAIT_S * 1000), f"{got} of 100 came"
        events = b.channel.receive(time.monotonic(), limit=7)
        assert len(events) <= 7
        got += sum(isinstance(event, MessageReceived) for event in events)


def test_words_about_transfers_before_the_handshake_are_dropped_and_counted(rig: Bench) -> None:
    node, stranger = rig.node("p"), Stranger(rig.nodes[0].port)
    try:
        batch = Batch(transfer="t", generation=1, seq=0, first_block=0, blocks=1, nbytes=8)
        for message in (Claim(transfer="t"), Ack(transfer="t", generation=1), batch, LinkCall(link="u", body=b"")):
            stranger.send(encode(message))
        rig.until(lambda: node.counters["dropped_unknown_peer"] == 4)
    finally:
        stranger.close()
    assert not node.events


# -- status --------------------------------------------------------------------------------------------------------


def ask(rig: Bench, node: Node, reply: Any, **kwargs: Any) -> Any:
    """fetch_status in a thread, while the node answers ``reply``."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(fetch_status(HOST, node.port, **{"timeout_s": 10.0, **kwargs}))
        except StatusUnavailable as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    asked = []
    while not found:
        rig.turn()
        for event in node.take(StatusRequested):
            asked.append(event.transfer)
            event.reply(reply if isinstance(reply, str) else json.dumps(reply))
    thread.join()
    return found[0], asked


def test_a_stranger_may_ask_for_the_status(rig: Bench) -> None:
    node = rig.node("p")
    assert ask(rig, node, {"engine": "p"}, transfer="t1") == ({"engine": "p"}, ["t1"])


def test_a_status_longer_than_a_frame_loses_its_oldest_transfers(rig: Bench) -> None:
    node = rig.node("p", max_frame_bytes=8192)
    transfers = [{"transfer": f"t{n}", "state": "ready"} for n in range(1000)]
    status, _ = ask(rig, node, {"engine": "p", "transfers": transfers})
    assert status["transfers"][-1]["transfer"] == "t999"
    assert len(status["transfers"]) + status["transfers_left_out"] == 1000
    assert len(status["transfers"]) >= 50


@pytest.mark.parametrize("reply", ["x" * 9000, json.dumps({"engine": "p" * 9000, "transfers": []})])
def test_a_status_that_can_not_be_shortened_is_refused_in_one_line(rig: Bench, reply: str) -> None:
    node = rig.node("p", max_frame_bytes=8192)
    error, _ = ask(rig, node, reply)
    assert "control.max_frame_bytes" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("reply", ["[1, 2]", "not json", ""])
def test_an_answer_that_is_no_status_is_an_error(rig: Bench, reply: str) -> None:
    error, _ = ask(rig, rig.node("p"), reply)
    assert "not a JSON object" in str(error)


def test_nobody_to_ask_is_an_error_in_time(rig: Bench) -> None:
    node = rig.node("p")
    port = node.port
    rig.drop(node)
    with pytest.raises(StatusUnavailable, match=rf"{HOST}:{port} within 0.2 s"):
        asyncio.run(afetch_status(HOST, port, timeout_s=0.2))


def test_too_many_status_requests_are_turned_away_and_peers_are_served(
    rig: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowance = listener.Allowance(5)
    node, other = rig.node("p"), rig.node("d")
    strangers = [Stranger(node.port) for _ in range(5)]
    monkeypatch.setattr(node.channel._listener, "_allowance", allowance)
    try:
        for stranger in strangers:
            for _ in range(40):
                stranger.send(encode(StatusRequest()))
        both_up(rig, other, node)
        rig.until(lambda: node.counters["status_limited"] + len(node.of(StatusRequested)) == 200)
    finally:
        for stranger in strangers:
            stranger.close()
    assert 5 <= len(node.of(StatusRequested)) < 100


def test_a_reply_after_the_asker_or_the_channel_went_is_harmless(rig: Bench) -> None:
    node, stranger = rig.node("p"), Stranger(rig.nodes[0].port)
    stranger.send(encode(StatusRequest()))
    rig.until(lambda: node.of(StatusRequested))
    stranger.close()
    (asked,) = node.of(StatusRequested)
    rig.run(0.1)
    asked.reply("{}")
    rig.drop(node)
    asked.reply("{}")


def test_the_handmade_hello_of_these_tests_is_a_hello() -> None:
    assert isinstance(decode(hello()), Hello)
