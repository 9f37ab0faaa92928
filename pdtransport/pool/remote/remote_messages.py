"""Messages between a client on another host and the pool's agent, in addition to those of :mod:`pool.messages`.

Chunks move by transfers of :mod:`pdtransport.transport` between the pool's frames and the client's staging frames,
which have the same length. Each side names only its own frames. Each docstring begins with the sender.
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
    """Client: first message on a connection. ``staging_bytes``: length of all its staging frames together."""

    kind: Literal["remote hello"] = "remote hello"
    name: Annotated[str, Field(max_length=128)]
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9._\-]{0,64}$")] = ""
    staging_bytes: Annotated[int, Field(ge=1, lt=1 << 48)]


class RemoteWelcome(Message):
    """Agent: accepts a client. ``port``: of the agent's transport, at the address that the client has connected to."""

    kind: Literal["remote welcome"] = "remote welcome"
    nbytes: Annotated[int, Field(ge=1)]
    frame_bytes: Annotated[int, Field(ge=4096, le=1 << 30)]
    client_bytes: Annotated[int, Field(ge=1)]
    port: Annotated[int, Field(ge=1, le=65535)]


class RemotePing(Message):
    """Client: heartbeat. Answered by :class:`RemotePong`."""

    kind: Literal["ping"] = "ping"


class RemotePong(Message):
    """Agent: heartbeat."""

    kind: Literal["pong"] = "pong"


class RemoteAnswer(Message):
    """Agent: verdicts as in :class:`messages.KeyAnswers`, without frames.

    READ chunks come in separate messages, whose ``transfer`` names the transfer that brings them, in the order of
    ``indices``.
    """

    kind: Literal["remote answer"] = "remote answer"
    request: messages.RequestId
    indices: messages.Words32
    verdicts: Annotated[bytes, Field(max_length=messages.MAX_KEYS)]
    checksums: messages.Words64
    transfer: TransferName | None = None


class RemotePublish(messages.Publish):
    """Client: as :class:`messages.Publish`, for chunks in its staging frames.

    The agent fetches them from the client's transport at ``host`` and ``port``, by ``transfer``. Answered by
    :class:`messages.Done` once they are published, with a count of 0 if they were not.
    """

    kind: Literal["remote publish"] = "remote publish"  # type: ignore[assignment]
    transfer: TransferName
    host: Annotated[str, Field(min_length=1, max_length=255)]
    port: Annotated[int, Field(ge=1, le=65535)]


FromRemote = RemoteHello | RemotePublish | RemotePing | messages.FromClient
ToRemote = RemoteWelcome | RemoteAnswer | RemotePong | messages.FromPool

_FROM_REMOTE: TypeAdapter[FromRemote] = TypeAdapter(Annotated[FromRemote, Field(discriminator="kind")])
_TO_REMOTE: TypeAdapter[ToRemote] = TypeAdapter(Annotated[ToRemote, Field(discriminator="kind")])


def from_remote(frame: bytes) -> FromRemote:
    """Decode a client's message.

    Raises:
        WireError: as :func:`messages.from_client`.
    """
    return messages.parsed(frame, _FROM_REMOTE)  # type: ignore[no-any-return]


def to_remote(frame: bytes) -> ToRemote:
    """Decode the agent's message.

    Raises:
        WireError: as :func:`messages.from_client`.
    """
    return messages.parsed(frame, _TO_REMOTE)  # type: ignore[no-any-return]


def new_transfer() -> str:
    """A new transfer name, random so that nobody can guess it."""
    return secrets.token_hex(16)


def transfer_digest(transfer: str) -> bytes:
    """The prompt digest of a transfer of chunks. A formality: each chunk in it has its own key and checksum."""
    return hashlib.blake2b(transfer.encode(), digest_size=32).digest()
