"""What :mod:`weight_watch` has the workers do, as vLLM's own remote calls: sum their weights, and act on a change.

The functions run in a worker's process, between its steps. vLLM sends them by name; nothing comes from outside.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdtransport.vllm.checkpoint import NAMED
from pdtransport.vllm.loaded import LoadedWeights, changed_names, loaded_weights

if TYPE_CHECKING:
    from pdtransport.vllm.pool_space import Shard
    from pdtransport.vllm.worker import WorkerSide

logger = logging.getLogger(__name__)

MAX_NAMED = 3  # changed tensors in a log line

sides: weakref.WeakSet[WorkerSide] = weakref.WeakSet()  # the connector's, in this process
_last: dict[int, Mapping[str, str]] = {}  # sums of a worker's tensors, by its id


@dataclass(frozen=True)
class WeightReport:
    """Of one worker. ``checkpoint``: the identity of what it loaded from; empty if that has none, or does not say all.
    ``unseen``: weights whose bytes nobody can read: one of them, or empty."""

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
        logger.exception("pdtransport: the weights can't be summed")
        found = LoadedWeights({}, [f"{type(error).__name__}: {error}"[:200]])
    before = _last.get(id(worker))
    if before is not None and (names := changed_names(before, found.sums)):
        some = ", ".join(names[:MAX_NAMED])
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        logger.warning("pdtransport: rank %d's weights changed since they were last looked at: %s%s", rank, some, more)
    _last[id(worker)] = found.sums
    return WeightReport(rank, found.checksum, checkpoint, found.unseen[0] if found.unseen else "")


def _loads_more(model: Any) -> bool:
    """Whether vLLM's loader reads other files for it than those of its checkpoint: a text model or an encoder from
    another repository (Ultravox), a part from another folder, files by a pattern of the model's own."""
    return bool(getattr(model, "secondary_weights", ()) or getattr(model, "allow_patterns_overrides", None))


def _models(worker: Any) -> list[Any]:
    models = [worker.get_model()]
    draft = getattr(worker, "get_draft_model", None)
    more = draft() if callable(draft) else None
    return models if more is None or more is models[0] else [*models, more]


def adopt_weights(worker: Any, identity: str, reason: str) -> tuple[int, Shard | None]:
    """The engine's weights are ``identity`` from now on: ``(rank, its chunks of the pool)``."""
    rank, shard = int(getattr(worker, "rank", 0)), None
    for side in list(sides):
        rank, shard = side.change_weights(identity, reason)
    return rank, shard


def take_pages_away(worker: Any, reason: str) -> None:
    """The memory of KV is about to go: nothing uses a page once this returns."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    for side in list(sides):
        side.end_transfers(reason)
