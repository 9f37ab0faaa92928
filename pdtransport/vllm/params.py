"""The ``kv_transfer_params`` of a request: what routers say, with vLLM's NIXL key names, checked before use."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pdtransport.protocol.messages import TransferId
from pdtransport.settings import one_line


class _Params(BaseModel):
    # Routers may add keys of their own; ours must have the right types.
    model_config = ConfigDict(extra="ignore", strict=True)

    transfer_id: TransferId | None = None


class ProduceParams(_Params):
    do_remote_decode: Literal[True]


class ConsumeParams(_Params):
    do_remote_prefill: Literal[True]
    transfer_id: TransferId
    remote_host: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9_.:\-\[\]]+$")]
    remote_port: Annotated[int, Field(ge=1, le=65535)]
    tp_size: Annotated[int, Field(ge=1, le=4096)] = 1


@dataclass(frozen=True)
class Wanted:
    """What a request asks of the connector: at most one of the two, or why its wish can't be granted."""

    produce: str | None = None  # transfer id
    consume: ConsumeParams | None = None
    problem: str = ""


def parse(params: Any, *, producer: bool, consumer: bool) -> Wanted:
    """Read ``kv_transfer_params`` as a client sent it. Never raises: a problem is returned as one line."""
    if not params:
        return Wanted()
    if not isinstance(params, dict):
        return Wanted(problem="kv_transfer_params is not an object")
    prefill, decode = params.get("do_remote_decode"), params.get("do_remote_prefill")
    try:
        if decode:
            if not consumer:
                return Wanted(problem="do_remote_prefill was sent to an instance whose kv_role is kv_producer")
            return Wanted(consume=ConsumeParams.model_validate(params))
        if prefill:
            if not producer:
                return Wanted(problem="do_remote_decode was sent to an instance whose kv_role is kv_consumer")
            return Wanted(produce=ProduceParams.model_validate(params).transfer_id or secrets.token_hex(16))
    except ValidationError as error:
        return Wanted(problem=f"kv_transfer_params.{one_line(error)}")
    return Wanted()
