"""Detects changes of a running engine's weights, after any call that may change them and before the next step.

All calls to vLLM's workers go through the executor's ``collective_rpc``, which is hooked in the engine's process. After
a call that is not known to be harmless (reload_weights, wake_up, update_weights, callables, methods of worker
extensions, unknown names) the weights are checksummed on all workers. If the checksum changed, the workers end all
transfers and announce a new identity, and the scheduler drops KV of the old weights. An ordinary step only costs a
lookup of the method's name.

Not detected: changes made without the executor, by another thread or process.

Without this hook KV of old weights could be mistaken for KV of new ones. So if its check fails, the start is refused;
the switch ``watch_weights: false`` says that the weights never change.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import secrets
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pdtransport.errors import SettingsError
from pdtransport.vllm.patches.base import Patch, Unexpected, expect
from pdtransport.vllm.patches.stale_blocks import check_recompute
from pdtransport.vllm.weight_rpc import WeightReport, adopt_weights, sum_weights, take_pages_away

if TYPE_CHECKING:
    from pdtransport.vllm.pool_space import Shard

logger = logging.getLogger(__name__)

STEPS = frozenset({"execute_model", "sample_tokens", "execute_dummy_batch", "take_draft_token_ids"})
HARMLESS = STEPS | frozenset(
    {
        "add_lora",
        "annotate_profile",
        "check_health",
        "compile_or_warm_up_model",
        "compute_weight_checksums",
        "determine_available_memory",
        "get_cache_block_size_bytes",
        "get_compilation_match_table",
        "get_encoder_timing_stats",
        "get_kv_cache_spec",
        "get_kv_connector_handshake_metadata",
        "get_model_inspection",
        "get_supported_kv_cache_layouts",
        "get_supported_tasks",
        "init_weight_transfer_engine",
        "initialize_from_config",
        "list_loras",
        "pin_lora",
        "profile",
        "release_late_interaction_query_cache",
        "remove_lora",
        "reset_encoder_cache",
        "reset_mm_cache",
        "save_sharded_state",
        "save_tensorized_model",
        "set_kv_cache_layout",
        "shutdown",
        "shutdown_weight_transfer_engine",
        "supports_draft_weight_updates",
        "synchronize_device",
        "take_draft_token_ids",
        "update_max_model_len",
    }
)
FIRST_LOOK = "get_kv_connector_handshake_metadata"  # all workers have loaded, no step was run yet
TAKES_MEMORY = frozenset({"sleep", "discard"})
WAKES = "wake_up"

_HOOKED = "_pdtransport_watched"


def _check() -> None:
    from vllm.v1.executor.abstract import Executor

    expect(Executor.__init__, uses=["vllm_config"])
    _check_rpc(Executor)
    check_recompute()


def _check_rpc(kind: Any) -> None:
    expect(kind.collective_rpc, takes=["self", "method", "timeout", "args", "kwargs"])


PATCH = Patch("watch_weights", _check, setting="watch_weights", costs="this engine does not start")

OnChange = Callable[["dict[int, Shard]", str], None]


class WeightWatch:
    """Watches the weights of one engine.

    Args:
        config: vLLM's configuration, the same object that its executor holds.
        on_change: called when the identity changed, with the new key spaces of each worker's chunks in the pool, by
            rank, and the reason.
    """

    def __init__(self, config: Any, on_change: OnChange) -> None:
        self.config = config
        self._on_change = on_change
        self._first = ""  # first checksum over all workers
        self._checkpoint = ""
        self._identity: str | None = None
        self._suspect = ""  # name of the last call that may have changed the weights since the last check
        self._asleep = False
        self._looking = False

    def call(self, rpc: Callable[..., Any], method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``rpc(method, *args, **kwargs)``, and check the weights if they may have changed."""
        name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
        if self._looking:
            return rpc(method, *args, **kwargs)
        if isinstance(method, str) and name in HARMLESS:
            due = self._suspect if name in STEPS else name == FIRST_LOOK and self._identity is None
            if due:
                self._look(rpc)
            return rpc(method, *args, **kwargs)
        if self._identity is None:
            self._look(rpc)
        self._suspect = name
        if name in TAKES_MEMORY:
            self._each(rpc, take_pages_away, f"weights: {name} frees the memory of the KV cache")
            self._asleep = True
        try:
            return rpc(method, *args, **kwargs)
        finally:
            if name == WAKES and _wakes_weights(args, kwargs):
                self._asleep = False
            if not self._asleep:
                self._look_again(rpc)

    def _each(self, rpc: Callable[..., Any], what: Callable[..., Any], *args: Any) -> list[Any]:
        self._looking = True
        try:
            return list(rpc(what, args=args))
        finally:
            self._looking = False

    def _look_again(self, rpc: Callable[..., Any]) -> None:
        """Check the weights after a call, without raising: the call may have failed and broken the engine.

        If the check fails, the weights stay suspect and the next step checks them again.
        """
        try:
            self._look(rpc)
        except Exception:
            logger.exception("pdtransport: the weights could not be checked after %s", self._suspect)

    def _look(self, rpc: Callable[..., Any]) -> None:
        """Checksum all workers' weights, and announce a change."""
        reports: list[WeightReport] = self._each(rpc, sum_weights)
        why = self._suspect
        first = self._identity is None
        identity = self._judge(reports, why)
        if identity != (self._checkpoint if first else self._identity):  # workers start with their checkpoint's
            self._tell(rpc, identity, why, first)
        self._identity, self._suspect, self._asleep = identity, "", False

    def _tell(self, rpc: Callable[..., Any], identity: str, why: str, first: bool) -> None:
        reason = f"weights: {why} changed them here" if why else "weights: identified by the loaded parameters"
        (logger.info if first else logger.warning)("pdtransport: %s; their identity is %s", reason, identity)
        shards = {rank: shard for rank, shard in self._each(rpc, adopt_weights, identity, reason) if shard is not None}
        self._on_change(shards, reason)

    def _judge(self, reports: Sequence[WeightReport], why: str) -> str:
        """Decide the weights' identity from the workers' reports.

        At first this is the checkpoint's identity, if there is one. It stays the checkpoint's while the checksum equals
        the first one and all weights can be read. Otherwise the identity is ``loaded:`` and the checksum or, if some
        weights can't be read, a random ``unknown:`` identity that matches no peer.
        """
        checksum = _combined(reports)
        unseen = next((report.unseen for report in reports if report.unseen), "")
        if not self._first:
            self._first = checksum
            checkpoints = {report.checkpoint for report in reports}
            # Workers on several hosts may have loaded different files; then only the checksum identifies the weights.
            self._checkpoint = checkpoints.pop() if len(checkpoints) == 1 else ""
            if self._checkpoint:
                return self._checkpoint
        elif checksum == self._first and self._checkpoint and not unseen:
            return self._checkpoint
        if unseen:
            if self._identity is not None and self._identity.startswith("unknown:") and not why:
                return self._identity
            logger.warning(
                "pdtransport: not all weights can be read (%s): KV is not exchanged with other engines%s",
                unseen,
                f" after {why}; restart this engine to exchange it" if why else "; set model_id to name these weights",
            )
            return f"unknown:{secrets.token_hex(16)}"
        return f"loaded:{checksum}"


def _combined(reports: Sequence[WeightReport]) -> str:
    """Checksum over all workers: the KV of each worker depends on the weights of all."""
    facts = [[report.rank, report.checksum] for report in sorted(reports, key=lambda each: each.rank)]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _wakes_weights(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of ``collective_rpc("wake_up")`` brings the weights back."""
    called = kwargs.get("kwargs") or (args[2] if len(args) > 2 else None) or {}
    given = kwargs.get("args") or (args[1] if len(args) > 1 else None) or ()
    tags = called.get("tags", given[0] if given else None)
    return tags is None or "weights" in tags


_watches: weakref.WeakSet[WeightWatch] = weakref.WeakSet()  # of this process


def _watch_of(config: Any) -> WeightWatch | None:
    """The watch of the engine with this configuration, if any.

    A connector under MultiConnector has a shallow copy of the configuration, whose ``model_config`` is the same object.
    """
    watches, model = list(_watches), getattr(config, "model_config", None)
    own = next((each for each in watches if each.config is config), None)
    if own is not None or model is None:
        return own
    return next((each for each in watches if getattr(each.config, "model_config", None) is model), None)


def watch_executor(config: Any, on_change: OnChange) -> WeightWatch:
    """Hook the executor class that this configuration uses; the watch is active while its returned object lives.

    Raises:
        SettingsError: vLLM's executor or scheduler is not as expected.
    """
    try:
        from vllm.v1.executor.abstract import Executor

        if not PATCH.allowed():
            raise Unexpected(PATCH.state()["why"])
        kind = Executor.get_class(config)
        rpc = kind.collective_rpc
        _check_rpc(kind)
    except (ImportError, AttributeError, ValueError, Unexpected) as error:
        PATCH.fail(str(error))
        raise SettingsError(
            f"changes of weights can't be detected in this vLLM ({error}): set watch_weights: false if they never "
            "occur while this engine runs, or use another version"
        ) from None
    watch = WeightWatch(config, on_change)
    _watches.add(watch)
    if getattr(rpc, _HOOKED, False):
        return watch

    @functools.wraps(rpc)
    def watched(executor: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(rpc, executor)
        watch = _watch_of(getattr(executor, "vllm_config", None))
        return watch.call(call, method, args, kwargs) if watch is not None else call(method, *args, **kwargs)

    setattr(watched, _HOOKED, True)
    kind.collective_rpc = watched
    return watch
