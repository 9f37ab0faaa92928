"""Messages survive the wire unchanged; whatever else arrives is a WireError, never another exception."""

from __future__ import annotations

from typing import Any, get_args

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pdtransport.protocol import messages as m

# a busy machine is no fault of the code
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

names = st.text("abcXYZ019._:-", min_size=1, max_size=128)
generations = st.integers(1, (1 << 63) - 1)
seqs = st.integers(0, (1 << 31) - 1)
attempts = st.integers(0, 1000)
blocks = st.integers(1, m.MAX_BLOCKS)
digests = st.binary(min_size=16, max_size=32)
reasons = st.text(max_size=m.MAX_REASON)
codes = st.sampled_from(m.Code)
granted = {"transfer": names, "generation": generations}
facts = {
    "protocol": st.integers(0, 1 << 40),
    "engine": st.text(min_size=1, max_size=256),
    "rank": st.integers(0, 65535),
    "world": st.integers(1, 65536),
    "incarnation": generations,
    "fingerprint": st.dictionaries(
        st.text(max_size=9), st.one_of(st.text(max_size=9), st.integers(-5, 1 << 40), st.booleans()), max_size=9
    ),
    "links": st.dictionaries(st.text(max_size=9), st.binary(max_size=99), max_size=9),
}
FIELDS: dict[type[m.Message], dict[str, st.SearchStrategy[Any]]] = {
    m.Claim: {"transfer": names},
    m.Grant: {
        **granted,
        "groups": st.lists(
            st.builds(
                m.GrantedGroup,
                st.integers(0, m.MAX_BLOCKS),
                st.integers(0, m.MAX_BLOCKS),
                st.integers(0, 1 << 16),
                st.integers(0, 1 << 16),
            ),
            min_size=1,
            max_size=m.MAX_GROUPS,
        ).map(tuple),
        "tokens": st.integers(1, m.MAX_BLOCKS * 64),
        "prompt_digest": digests,
        "consumers": st.integers(1, 4096),
        "window_bytes": st.integers(1, 1 << 62),
        "first_token": st.booleans(),
    },
    m.Accept: {**granted, "known": st.booleans(), "tokens_done": st.integers(0, 1 << 40)},
    m.BatchHint: {
        **granted,
        "group": st.integers(0, m.MAX_GROUPS - 1),
        "first_block": st.integers(0, m.MAX_BLOCKS),
        "blocks": blocks,
        "offer": st.binary(max_size=99),
    },
    m.Batch: {
        **granted,
        "seq": seqs,
        "attempt": attempts,
        "group": st.integers(0, m.MAX_GROUPS - 1),
        "first_block": st.integers(0, m.MAX_BLOCKS),
        "blocks": blocks,
        "nbytes": st.integers(1, 1 << 40),
        "checksums": st.binary(max_size=99),
        "offer": st.binary(max_size=99),
    },
    m.Received: {**granted, "seqs": st.lists(seqs, max_size=9).map(tuple)},
    m.Nack: {
        **granted,
        "wants": st.lists(st.tuples(seqs, attempts), min_size=1, max_size=9).map(tuple),
        "reason": reasons,
    },
    m.Commit: {
        **granted,
        "batches": st.integers(0, 1 << 31),
        "tokens": st.integers(1, 1 << 40),
        "digest": digests,
        "first_token": st.none() | st.integers(0, (1 << 31) - 1),
        "cached_tokens": st.none() | st.integers(0, 1 << 40),
    },
    m.Ack: granted,
    m.Revoke: {**granted, "code": codes, "reason": reasons},
    m.Abort: {**granted, "code": codes, "reason": reasons},
    m.Hello: facts,
    m.Welcome: facts,
    m.Refused: {
        "field": st.text(max_size=128),
        "ours": st.text(max_size=256),
        "yours": st.text(max_size=256),
        "reason": reasons,
    },
    m.Ping: {"incarnation": generations},
    m.Pong: {"incarnation": generations},
    m.LinkCall: {"link": st.text(max_size=32), "body": st.binary(max_size=99)},
    m.StatusRequest: {"transfer": st.text(max_size=128)},
    m.StatusReply: {"status": st.text(max_size=99)},
    m.Watch: {},
    m.Watching: {name: facts[name] for name in ("engine", "rank", "world", "incarnation")},
    m.Ended: {
        "transfer": names,
        "code": st.none() | codes,
        "reason": reasons,
        "blocks": st.integers(0, m.MAX_BLOCKS),
        "nbytes": st.integers(0, 1 << 40),
        "link": st.text(max_size=32),
        "exposed_us": st.integers(0, 1 << 40),
        "taken_us": st.integers(0, 1 << 40),
    },
}
messages = st.one_of([st.builds(kind, **fields) for kind, fields in FIELDS.items()])
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 64) - 1),
        st.floats(),
        st.text(max_size=9),
        st.binary(max_size=9),
        st.sampled_from([code.value for code in m.Code]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=9,
)


def packed(fields: Any) -> bytes:
    raw: bytes = msgpack.packb(fields)
    return raw


def decodes_or_fails_cleanly(frame: bytes) -> m.Message | None:
    try:
        return m.decode(frame)
    except m.WireError:
        return None


def test_every_kind_of_message_is_tested_here() -> None:
    kinds = set(get_args(m.TransferMessage)) | set(get_args(m.ControlMessage))
    assert set(FIELDS) == kinds
    for kind, fields in FIELDS.items():
        assert {"kind", *fields} == set(kind.model_fields)


@PATIENT
@given(messages)
def test_a_message_survives_the_wire(message: m.Message) -> None:
    decoded = m.decode(m.encode(message))
    assert decoded == message
    assert type(decoded) is type(message)
    assert m.encode(decoded) == m.encode(message)


@PATIENT
@given(messages, st.data())
def test_a_truncated_message_is_a_wire_error(message: m.Message, data: st.DataObject) -> None:
    frame = m.encode(message)
    with pytest.raises(m.WireError):
        m.decode(frame[: data.draw(st.integers(0, len(frame) - 1))])


@PATIENT
@given(messages, st.binary(min_size=1, max_size=9))
def test_bytes_after_the_message_are_a_wire_error(message: m.Message, tail: bytes) -> None:
    with pytest.raises(m.WireError):
        m.decode(m.encode(message) + tail)


@PATIENT
@given(messages, st.data())
def test_a_flipped_bit_is_another_message_or_a_wire_error(message: m.Message, data: st.DataObject) -> None:
    frame = bytearray(m.encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    decodes_or_fails_cleanly(bytes(frame))


@PATIENT
@given(st.binary(max_size=300))
@example(b"")
@example(b"\xc1")
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\x91" * 5000)
@example(b"\x81\xa4kind" * 500)
@example(b"\x81\x90\x90")
@example(b"\x82\xa4kind\xa2\xff\xfe\xa1v\x02")
def test_any_bytes_are_a_message_or_a_wire_error(frame: bytes) -> None:
    decodes_or_fails_cleanly(frame)


@PATIENT
@given(values)
def test_any_msgpack_is_a_message_or_a_wire_error(value: Any) -> None:
    decodes_or_fails_cleanly(packed(value))


@PATIENT
@given(messages, st.data())
def test_any_value_in_any_field_is_a_message_or_a_wire_error(message: m.Message, data: st.DataObject) -> None:
    fields = msgpack.unpackb(m.encode(message))
    name = data.draw(st.sampled_from([*fields, "more"]))
    fields[name] = data.draw(values)
    decoded = decodes_or_fails_cleanly(packed(fields))
    if name == "more":
        assert decoded is None


@pytest.mark.parametrize("depth", [10, 1000, 1020, 100_000])
def test_deep_nesting_is_a_wire_error_in_every_field(depth: int) -> None:
    deep = b"\x91" * depth + b"\xc0"
    for frame in (
        deep,
        b"\x82\xa4kind" + deep + b"\xa1v\x02",
        b"\x83\xa4kind\xa4ping\xa1v\x02\xabincarnation" + deep,
        b"\x83\xa4kind\xa5abort\xa1v\x02\xa4code" + deep,
    ):
        with pytest.raises(m.WireError):
            m.decode(frame)


@pytest.mark.parametrize("depth", [10, 1000, 1020])
def test_deep_nesting_in_the_version_is_a_wire_error(depth: int) -> None:
    with pytest.raises(m.WireError):
        m.decode(b"\x82\xa4kind\xa4ping\xa1v" + b"\x91" * depth + b"\xc0")


@pytest.mark.parametrize("version", [0, 1, m.PROTOCOL_VERSION + 1, -1, 1 << 60, "1", None, 1.5, [1], {"v": 1}])
def test_another_version_is_a_wire_error_that_names_versions(version: Any) -> None:
    with pytest.raises(m.WireError, match="protocol version"):
        m.decode(packed({"v": version, "kind": "ping", "incarnation": 1}))


def test_a_message_without_a_version_is_a_wire_error() -> None:
    with pytest.raises(m.WireError, match="protocol version"):
        m.decode(packed({"kind": "ping", "incarnation": 1}))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("claim", {"transfer": ""}),
        ("claim", {"transfer": "x" * 129}),
        ("claim", {"transfer": "a b"}),
        ("claim", {"transfer": "a\n"}),
        ("claim", {"transfer": "../x"}),
        ("claim", {"transfer": b"bytes"}),
        ("ack", {"transfer": "t", "generation": 0}),
        ("ack", {"transfer": "t", "generation": 1 << 63}),
        ("ack", {"transfer": "t", "generation": True}),
        ("ack", {"transfer": "t", "generation": "1"}),
        ("ack", {"transfer": "t", "generation": 1.0}),
        ("received", {"transfer": "t", "generation": 1, "seqs": [-1]}),
        ("received", {"transfer": "t", "generation": 1, "seqs": [0] * (m.MAX_SEQS + 1)}),
        ("nack", {"transfer": "t", "generation": 1, "wants": []}),
        ("nack", {"transfer": "t", "generation": 1, "wants": [[1]]}),
        ("nack", {"transfer": "t", "generation": 1, "wants": [[1, 1001]]}),
        ("abort", {"transfer": "t", "generation": 1, "code": "because"}),
        ("abort", {"transfer": "t", "generation": 1, "code": []}),
        ("abort", {"transfer": "t", "generation": 1, "code": "link", "reason": "x" * (m.MAX_REASON + 1)}),
        ("commit", {"transfer": "t", "generation": 1, "batches": 0, "tokens": 1, "digest": b"short"}),
        ("commit", {"transfer": "t", "generation": 1, "batches": 0, "tokens": 1, "digest": "x" * 16}),
        ("link", {"link": "ucx", "body": b"x" * ((1 << 20) + 1)}),
        ("message", {}),
        ("Claim", {"transfer": "t"}),
    ],
)
def test_a_field_out_of_bounds_is_a_wire_error(kind: str, fields: dict[str, Any]) -> None:
    with pytest.raises(m.WireError):
        m.decode(packed({"v": m.PROTOCOL_VERSION, "kind": kind, **fields}))


def test_messages_can_not_be_changed_or_made_wrong() -> None:
    message = m.Ack(transfer="t", generation=1)
    with pytest.raises(ValidationError):
        message.generation = 2  # type: ignore[misc]
    with pytest.raises(ValidationError):
        m.Ack(transfer="t", generation=0)
    with pytest.raises(ValidationError):
        m.Ack(transfer="t", generation=1, more=1)  # type: ignore[call-arg]


def test_wire_bytes_are_plain_msgpack_with_the_version() -> None:
    """What other implementations have to produce."""
    raw = msgpack.unpackb(m.encode(m.Nack(transfer="t", generation=7, wants=((1, 0), (2, 1)), reason="r")))
    assert raw == {
        "v": m.PROTOCOL_VERSION,
        "kind": "nack",
        "transfer": "t",
        "generation": 7,
        "wants": [[1, 0], [2, 1]],
        "reason": "r",
    }


@pytest.mark.parametrize("message", [m.Ping(incarnation=1), m.Watch(), m.Claim(transfer="t"), m.StatusRequest()])
def test_version_and_kind_are_known_by_the_first_bytes(message: m.Message) -> None:
    """All that is looked at of a stranger's frame, unless it may be one that strangers send."""
    frame = m.encode(message)
    assert m.peek(frame[: m.PEEK_BYTES]) == (m.PROTOCOL_VERSION, message.kind)
    assert m.peek((frame + bytes(1 << 20))[: m.PEEK_BYTES]) == (m.PROTOCOL_VERSION, message.kind)


@PATIENT
@given(st.binary(max_size=m.PEEK_BYTES))
@example(packed({"kind": "ping", "v": m.PROTOCOL_VERSION}))
@example(b"\x82\xa1v" + b"\x91" * 120)
def test_a_beginning_that_is_no_messages_is_a_wire_error(beginning: bytes) -> None:
    try:
        _, kind = m.peek(beginning)
    except m.WireError:
        return
    assert isinstance(kind, str)


def test_a_strangers_message_is_built_no_further_than_a_hello_goes() -> None:
    """A quarter of a megabyte names a quarter of a million objects: neither lists nor maps in maps are made of it."""
    hello = m.Hello(
        protocol=m.PROTOCOL_VERSION,
        engine="e",
        rank=0,
        world=1,
        incarnation=1,
        fingerprint={f"fact {n}": n for n in range(m.MAX_FACTS)},
        links={f"link {n}": bytes(1000) for n in range(16)},
    )
    assert m.decode(m.encode(hello), flat=True) == hello
    for bomb in ({"links": [0] * 1000}, {"links": {"a": {"b": {}}}}, {"links": dict.fromkeys(map(str, range(65)), 0)}):
        with pytest.raises(m.WireError, match="not a msgpack frame"):
            m.decode(packed({"v": m.PROTOCOL_VERSION, "kind": "hello", **bomb, "fingerprint": {}}), flat=True)
