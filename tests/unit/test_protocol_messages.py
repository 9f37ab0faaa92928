"""Messages on the wire: what is said arrives unchanged, and nothing else than a message is ever accepted."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtransport.protocol.messages import (
    MAX_REASON,
    PROTOCOL_VERSION,
    Abort,
    Accept,
    Ack,
    Batch,
    BatchHint,
    Claim,
    Code,
    Commit,
    Grant,
    GrantedGroup,
    Hello,
    Message,
    Nack,
    Received,
    Revoke,
    WireError,
    decode,
    encode,
)

T, G = "t-1.a_b:c", 3
DIGEST = bytes(range(16))
EXAMPLES: list[Message] = [
    Claim(transfer=T),
    Grant(
        transfer=T,
        generation=G,
        groups=(GrantedGroup(2, 5, 0, 4), GrantedGroup(1, 3, 0, 1)),
        tokens=97,
        prompt_digest=DIGEST,
        consumers=2,
        window_bytes=1 << 20,
    ),
    Accept(transfer=T, generation=G, known=True, tokens_done=12),
    BatchHint(transfer=T, generation=G, group=1, first_block=2, blocks=1, offer=b"\xff"),
    Batch(transfer=T, generation=G, seq=0, first_block=2, blocks=1, nbytes=64, checksums=bytes(8), offer=b"\xff"),
    Received(transfer=T, generation=G, seqs=(0, 1, 5)),
    Nack(transfer=T, generation=G, wants=((0, 1), (3, 0)), reason="damaged"),
    Commit(transfer=T, generation=G, batches=5, tokens=97, digest=DIGEST),
    Ack(transfer=T, generation=G),
    Revoke(transfer=T, generation=G, code=Code.TIMEOUT, reason="late"),
    Abort(transfer=T, generation=G, code=Code.PREEMPTED),
    Hello(
        protocol=1,
        engine="e",
        rank=0,
        world=1,
        incarnation=9,
        fingerprint={"a": "x", "b": 1, "c": True},
        links={"l": b"x"},
    ),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_what_is_said_arrives_unchanged(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.kind)
def test_unknown_and_missing_fields_are_refused(message: Message) -> None:
    """A field too many or too few is an error that names it."""
    fields = msgpack.unpackb(encode(message))
    with pytest.raises(WireError, match="extra"):
        decode(msgpack.packb({**fields, "extra": 1}))
    fields.pop("transfer", None) or fields.pop("engine", None)
    with pytest.raises(WireError, match=r"transfer|engine"):
        decode(msgpack.packb(fields))


@given(st.sampled_from(EXAMPLES), st.data())
def test_damaged_frames_raise_nothing_but_wire_error(message: Message, data: st.DataObject) -> None:
    """Flipped and cut bytes give a message or a WireError: no other exception reaches the control channel."""
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    del frame[data.draw(st.integers(0, len(frame))) :]
    complaint = ""
    try:
        decode(bytes(frame))
    except WireError as error:
        complaint = str(error)
    assert len(complaint) <= MAX_REASON


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
TREES = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8) | st.binary(max_size=3), x, max_size=3),
)


@given(
    st.sampled_from([m.kind for m in EXAMPLES]),
    st.dictionaries(st.sampled_from(["transfer", "generation", "code", "seqs", "wants", "digest", "reason"]), TREES),
)
def test_any_tree_of_values_is_a_message_or_a_wire_error(kind: str, fields: dict[str, Any]) -> None:
    frame = msgpack.packb({"v": PROTOCOL_VERSION, "kind": kind, **fields})
    try:
        assert decode(frame).kind == kind
    except WireError:
        pass


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("transfer", ""),
        ("transfer", "a b"),
        ("transfer", "x" * 129),
        ("transfer", 7),
        ("generation", 0),
        ("generation", 1 << 63),
        ("generation", True),
        ("generation", 1.0),
    ],
)
def test_bounds_of_ids(field: str, value: object) -> None:
    """Ids that are empty, too long, of another type or out of range are refused by name."""
    with pytest.raises(WireError, match=field):
        decode(msgpack.packb({"v": PROTOCOL_VERSION, "kind": "ack", "transfer": T, "generation": G, field: value}))


def test_another_protocol_version_is_refused() -> None:
    frame = msgpack.packb({**msgpack.unpackb(encode(EXAMPLES[0])), "v": PROTOCOL_VERSION + 1})
    with pytest.raises(WireError, match=f"version {PROTOCOL_VERSION + 1}, this side speaks {PROTOCOL_VERSION}"):
        decode(frame)


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x90", b"\x80", b"hello", b"\x91" * 5000, msgpack.packb({1: 2})])
def test_garbage_is_refused(frame: bytes) -> None:
    with pytest.raises(WireError):
        decode(frame)
