"""Parses and validates a request's ``kv_transfer_params``, which use the key names of vLLM's NIXL connector."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pdtransport.protocol.messages import MAX_TRANSFER_ID, Token, TransferId
from pdtransport.settings import one_line

# Some routers copy only the keys of vLLM's NIXL connector and drop transfer_id. So prefill's response also carries the
# transfer in remote_request_id, with this prefix so that another connector's request id is never taken for a transfer.
_MARK = "pdtransport:"

MAX_RANKS = 1024
MAX_PORT = 65535


def marked(transfer_id: str) -> str:
    """The ``remote_request_id`` of prefill's response for this transfer."""
    return _MARK + transfer_id


class _Params(BaseModel):
    # Routers may add other keys; the known ones must have the right types.
    model_config = ConfigDict(extra="ignore", strict=True)

    transfer_id: TransferId | None = None
    first_token: bool = False  # prefill may return its first token, and decode continues from it


class ProduceParams(_Params):
    do_remote_decode: Literal[True]


class ConsumeParams(_Params):
    do_remote_prefill: Literal[True]
    transfer_id: TransferId
    remote_host: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9_.:\-\[\]]+$")]
    remote_port: Annotated[int, Field(ge=1, le=MAX_PORT)]
    tp_size: Annotated[int, Field(ge=1, le=MAX_RANKS)] = 1

    @model_validator(mode="before")
    @classmethod
    def _named(cls, params: Any) -> Any:
        named = params.get("remote_request_id") if isinstance(params, dict) else None
        if isinstance(named, str) and named.startswith(_MARK) and params.get("transfer_id") is None:
            return {**params, "transfer_id": named[len(_MARK) : len(_MARK) + MAX_TRANSFER_ID + 1]}
        return params

    @model_validator(mode="after")
    def _has_ports(self) -> ConsumeParams:
        last = self.remote_port + self.tp_size - 1
        if last > MAX_PORT:
            raise ValueError(f"tp_size: rank {self.tp_size - 1} would listen on port {last}")
        return self


class ContinueParams(BaseModel):
    """Decode computes the prompt itself and continues from ``continue_from``, a token the client already has."""

    model_config = ConfigDict(extra="ignore", strict=True)

    continue_from: Token


@dataclass(frozen=True)
class Wanted:
    """What a request asks of the connector: at most one of the three fields, or ``problem`` if they are invalid."""

    produce: ProduceParams | None = None
    consume: ConsumeParams | None = None
    continue_from: int | None = None
    problem: str = ""
    lost: bool = False  # beside a problem: the client already has the first token, so the request can't start over


def parse(params: Any, *, producer: bool, consumer: bool) -> Wanted:
    """Parse ``kv_transfer_params`` as a client sent them.

    Never raises: a problem is returned as one line of text.
    """
    if not params:
        return Wanted()
    if not isinstance(params, dict):
        return Wanted(problem="kv_transfer_params is not an object")
    prefill, decode = params.get("do_remote_decode"), params.get("do_remote_prefill")
    goes_on = not (prefill or decode) and params.get("continue_from") is not None
    try:
        if decode:
            if not consumer:
                return Wanted(problem="do_remote_prefill was sent to an instance whose kv_role is kv_producer")
            return Wanted(consume=ConsumeParams.model_validate(params))
        if prefill:
            if not producer:
                return Wanted(problem="do_remote_decode was sent to an instance whose kv_role is kv_consumer")
            produce = ProduceParams.model_validate(params)
            minted = produce.transfer_id or secrets.token_hex(16)
            return Wanted(produce=produce.model_copy(update={"transfer_id": minted}))
        if goes_on:
            if not consumer:
                return Wanted(problem="continue_from was sent to an instance whose kv_role is kv_producer", lost=True)
            return Wanted(continue_from=ContinueParams.model_validate(params).continue_from)
    except ValidationError as error:
        return Wanted(problem=f"kv_transfer_params.{one_line(error)}", lost=goes_on)
    return Wanted()


def asked_transfer(params: Any) -> str:
    """The transfer id that a decode request asks for, even if its other parameters are invalid; empty if none."""
    if not isinstance(params, dict) or not params.get("do_remote_prefill"):
        return ""
    try:
        return _Params.model_validate({"transfer_id": params.get("transfer_id")}).transfer_id or ""
    except ValidationError:
        return ""
