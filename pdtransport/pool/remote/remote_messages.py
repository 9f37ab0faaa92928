"""What a client on another host and a pool's agent say to each other, beside the messages of :mod:`pool.messages`.

Chunks are moved by transfers of :mod:`pdtransport.transport` between the pool's frames and staging frames of the
client's, of one length; either side names frames of its own only.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pdtransport.pool import messages
from pdtransport.protocol.messages import Message

TransferName = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class RemoteHello(Message):
    """Client, first on a connection. ``staging_bytes``: of all its staging frames."""

    kind: Literal["remote hello"] = "remote hello"
    name: Annotated[str, Field(max_length=128)]
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9._\-]{0,64}$")] = ""
    staging_bytes: Annotated[int, Field(ge=1, lt=1 << 48)]


class RemoteWelcome(Message):
    """Agent: what the pool is like, and where its transport listens on the host that the client has reached."""

    kind: Literal["remote welcome"] = "remote welcome"
    nbytes: Annotated[int, Field(ge=1)]
    frame_bytes: Annotated[int, Field(ge=4096, le=1 << 30)]
    client_bytes: Annotated[int, Field(ge=1)]
    port: Annotated[int, Field(ge=1, le=65535)]


class RemotePing(Message):
    """Client: I live. Answered by :class:`RemotePong`."""

    kind: Literal["ping"] = "ping"


class RemotePong(Message):
    """Agent: so do I."""

    kind: Literal["pong"] = "pong"


class RemoteAnswer(Message):
    """Agent: as :class:`messages.Answer`, without frames. READ chunks are handed over by ``transfer``, in this order;
    they have a message of their own."""

    kind: Literal["remote answer"] = "remote answer"
    request: messages.RequestId
    indices: messages.Words32
    verdicts: Annotated[bytes, Field(max_length=messages.MAX_KEYS)]
    checksums: messages.Words64
    transfer: TransferName | None = None


class RemotePublish(messages.Publish):
    """Client: as :class:`messages.Publish`; the chunks are to be fetched, by ``transfer``, from my transport. Answered
    by :class:`messages.Done`, once they are published, or with a count of 0 if they were not."""

    kind: Literal["remote publish"] = "remote publish"  # type: ignore[assignment]
    transfer: TransferName
    host: Annotated[str, Field(min_length=1, max_length=255)]
    port: Annotated[int, Field(ge=1, le=65535)]


FromRemote = RemoteHello | RemotePublish | RemotePing | messages.FromClient
ToRemote = RemoteWelcome | RemoteAnswer | RemotePong | messages.FromPool

_FROM_REMOTE: TypeAdapter[FromRemote] = TypeAdapter(Annotated[FromRemote, Field(discriminator="kind")])
_TO_REMOTE: TypeAdapter[ToRemote] = TypeAdapter(Annotated[ToRemote, Field(discriminator="kind")])


def from_remote(frame: bytes) -> FromRemote:
    """What a client said.

    Raises:
        WireError: as :func:`messages.from_client`.
    """
    return messages.parsed(frame, _FROM_REMOTE)  # type: ignore[no-any-return]


def to_remote(frame: bytes) -> ToRemote:
    """What the agent said.

    Raises:
        WireError: as :func:`messages.from_client`.
    """
    return messages.parsed(frame, _TO_REMOTE)  # type: ignore[no-any-return]


def new_transfer() -> str:
    """A name that nobody guesses."""
    return secrets.token_hex(16)


def transfer_key(transfer: str) -> bytes:
    """What stands for the content key in these transfers: chunks have theirs, and their checksums."""
    return hashlib.blake2b(transfer.encode(), digest_size=32).digest()
