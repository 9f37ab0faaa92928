"""Remote calls into workers for :mod:`pdtransport.vllm.patches.weight_watch`: checksum weights, adopt new ones.

vLLM's ``collective_rpc`` sends these functions by name and runs them in each worker's process, between its steps. No
input comes from outside the engine.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pdtransport.engine.weight_sums import LoadedWeights, changed_names, loaded_weights
from pdtransport.vllm.checkpoint import NAMED

if TYPE_CHECKING:
    from pdtransport.vllm.pool_space import Shard

logger = logging.getLogger(__name__)

MAX_NAMED = 3  # changed tensors named in a log line


class ConnectorSide(Protocol):
    """What this module needs of the connector's worker half (:class:`pdtransport.vllm.worker.WorkerSide`)."""

    @property
    def checkpoint(self) -> str: ...

    def change_weights(self, identity: str, reason: str) -> tuple[int, Shard | None]: ...

    def end_transfers(self, reason: str) -> None: ...


sides: weakref.WeakSet[ConnectorSide] = weakref.WeakSet()  # the connector's worker halves in this process
_last: dict[int, Mapping[str, str]] = {}  # by id() of a worker: last checksums of its tensors


@dataclass(frozen=True)
class WeightReport:
    """The weights of one worker.

    Attributes:
        rank: the worker's rank.
        checksum: over all loaded weights.
        checkpoint: identity of the checkpoint it loaded; empty if there is none or it does not cover all weights.
        unseen: name of a tensor or module whose bytes can't be read; empty if all can.
    """

    rank: int
    checksum: str
    checkpoint: str
    unseen: str


def sum_weights(worker: Any) -> WeightReport:
    """Checksum of this worker's weights as they are now."""
    rank = int(getattr(worker, "rank", 0))
    checkpoint = next((side.checkpoint for side in sides), "")
    try:
        models = _models(worker)
        if _loads_more(models[0]) and not checkpoint.startswith(NAMED):
            checkpoint = ""
        found = loaded_weights(models)
    except Exception as error:  # a model that can't be read must not end its engine
        logger.exception("pdtransport: the weights' checksum can't be computed")
        found = LoadedWeights({}, [f"{type(error).__name__}: {error}"[:200]])
    before = _last.get(id(worker))
    if before is not None and (names := changed_names(before, found.sums)):
        some = ", ".join(names[:MAX_NAMED])
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        logger.warning("pdtransport: rank %d's weights changed since the last check: %s%s", rank, some, more)
    _last[id(worker)] = found.sums
    return WeightReport(rank, found.checksum, checkpoint, found.unseen[0] if found.unseen else "")


def _loads_more(model: Any) -> bool:
    """Whether vLLM loads more files for this model than those of its checkpoint.

    These may be a text model or encoder from another repository (Ultravox), a part from another folder, or files that
    match the model's own pattern.
    """
    return bool(getattr(model, "secondary_weights", ()) or getattr(model, "allow_patterns_overrides", None))


def _models(worker: Any) -> list[Any]:
    models = [worker.get_model()]
    draft = getattr(worker, "get_draft_model", None)
    more = draft() if callable(draft) else None
    return models if more is None or more is models[0] else [*models, more]


def adopt_weights(worker: Any, identity: str, reason: str) -> tuple[int, Shard | None]:
    """Tell this worker the new identity of the engine's weights.

    Returns:
        Its rank, and the key spaces of its chunks in the pool (None: it uses no pool).
    """
    rank, shard = int(getattr(worker, "rank", 0)), None
    for side in list(sides):
        rank, shard = side.change_weights(identity, reason)
    return rank, shard


def take_pages_away(worker: Any, reason: str) -> None:
    """End everything that uses KV pages, because their memory is about to be freed."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    for side in list(sides):
        side.end_transfers(reason)
