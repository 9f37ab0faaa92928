"""Identity of the checkpoint that vLLM loads, computed in the background while the model is loaded.

vLLM itself chooses the files (by index file and preferred format). Weights that are not loaded from local files (dummy
weights, tensorizer, streams from object stores) have no such identity; the loaded parameters are compared instead
(:mod:`pdtransport.vllm.patches.weight_watch`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtransport.errors import SettingsError
from pdtransport.kv.checkpoint import FILES, TENSORS, digest_files, digest_tensors
from pdtransport.kv.digest_cache import DigestCache, FileFacts, facts_of
from pdtransport.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

NAMED = "named:"  # prefix of the identity of weights named by model_id
NICENESS = 5  # of the digest threads, so that loading the model has priority
STREAMED = "runai_streamer"  # a load format that also reads safetensors from a local folder
SLOW_S = 1.0  # log if the start waited longer than this for a digest

_begun: dict[tuple[str, ...], CheckpointDigest] = {}
_lock = threading.Lock()


class CheckpointDigest:
    """Digest of one checkpoint of this process. Call ``begin`` as early as possible; ``result`` waits for it."""

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self._thread: threading.Thread | None = None
        self._identity = ""
        self._error: Exception | None = None
        self._facts: list[FileFacts] = []
        self._files: list[Path] = []
        self._wait_s = 0.0

    @classmethod
    def begin(cls, config: VllmConfig, wait_s: float) -> CheckpointDigest:
        """Start the digest of this configuration's checkpoint, unless its files are not on this host yet; once per
        checkpoint.

        Args:
            wait_s: how long to wait for another process that computes the same digest.
        """
        model, load = config.model_config, config.load_config
        key = (str(model.model), str(model.revision), str(load.load_format), str(load.download_dir))
        with _lock:
            found = _begun.get(key)
            if found is None:
                found = _begun[key] = cls(config)
            found._start(wait_s)
        return found

    def result(self, wait_s: float) -> str:
        """Wait for the identity; empty if the weights do not come from files on this host.

        Raises:
            SettingsError: files are damaged or changed in the meantime, or the digest took longer than ``wait_s``.
        """
        began = time.monotonic()
        self._start(wait_s)  # a model from the hub may not have been downloaded when the digest began
        if self._thread is not None:
            self._thread.join(wait_s)
            if self._thread.is_alive():
                raise SettingsError(
                    f"the digest of the weights took longer than weights_digest_s ({wait_s:g} s): raise it, or set "
                    "model_id to name these weights"
                )
        if self._error is not None:
            raise SettingsError(f"the digest of the weights failed: {self._error}") from None
        if self._thread is not None and not self._stood_still():
            raise SettingsError("weight files changed while the model was loaded: start again when they are final")
        waited = time.monotonic() - began
        if waited > SLOW_S:
            logger.info("pdtransport: waited %.1f s for the weights' digest, which is cached from now on", waited)
        return self._identity

    def _stood_still(self) -> bool:
        """Whether vLLM would still load the same files; the hub client may have downloaded a newer revision."""
        try:
            _, files = weight_files(self._config)
            return facts_of(files) == facts_of(self._files) == self._facts
        except (NoFiles, OSError):
            return False

    def _start(self, wait_s: float) -> None:
        if self._thread is not None:
            return
        self._wait_s = wait_s
        try:
            kind, self._files = weight_files(self._config)
            self._facts = facts_of(self._files)
        except NoFiles as why:
            logger.info("pdtransport: the weights are identified by checksums of the loaded parameters: %s", why)
            return
        except Exception as error:  # noqa: BLE001 - raised again in result()
            self._error = error
            return
        self._thread = threading.Thread(target=self._compute, args=(kind,), name="pdtransport-weights", daemon=True)
        self._thread.start()

    def _compute(self, kind: str) -> None:
        main = threading.main_thread()
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        except (OSError, AttributeError):
            pass  # the digest still works, but may slow down loading
        digest = digest_tensors if kind == TENSORS else digest_files
        compute = partial(digest, self._files, cancelled=lambda: not main.is_alive())
        try:
            self._identity = DigestCache().identity(kind, self._files, compute, self._wait_s)
        except Exception as error:  # noqa: BLE001 - raised again in result()
            self._error = error


def checkpoint_identity(config: VllmConfig, settings: Settings) -> str:
    """Identity of what this worker's weights were loaded from; empty if the loaded parameters must be compared.

    Raises:
        SettingsError: see :meth:`CheckpointDigest.result`; or there are no weight files and ``watch_weights`` is off.
    """
    if settings.model_id is not None:
        return f"{NAMED}{settings.model_id}"
    wait_s = settings.weights_digest_s
    identity = CheckpointDigest.begin(config, wait_s).result(wait_s)
    if not identity and not settings.watch_weights:
        raise SettingsError(
            f"load format {config.load_config.load_format} leaves no weight files to identify these weights by, and "
            "watch_weights is false: set model_id to name the weights, or watch_weights: true"
        )
    return identity


class NoFiles(Exception):
    """The weights do not come from files on this host, or the files are not here yet; the message says which."""


def weight_files(config: VllmConfig) -> tuple[str, list[Path]]:
    """Kind of digest, and the files that vLLM loads.

    Raises:
        NoFiles: there are no such files on this host.
    """
    load_format = str(config.load_config.load_format)
    if load_format == "dummy":
        raise NoFiles("load format dummy")
    model = Path(str(config.model_config.model))
    if model.is_file():  # GGUF and the like
        return FILES, [model]
    loader = _loader(config, load_format)
    folder = model if model.is_dir() else snapshot(config)
    try:
        found = loader._prepare_weights(str(folder), None, None, True, None)
        files = [Path(each) for each in found[1]]
    except (RuntimeError, OSError) as error:
        raise NoFiles(f"no weight files in {folder}: {error}"[:300]) from None
    except (AttributeError, TypeError, IndexError):  # another vLLM
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NoFiles(f"no weight files in {folder}")
    return (TENSORS if all(file.suffix == ".safetensors" for file in files) else FILES), files


def _loader(config: VllmConfig, load_format: str) -> Any:
    """vLLM's loader for checkpoint files.

    Raises:
        NoFiles: this load format uses another loader.
    """
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load = config.load_config
    if load_format == STREAMED:
        load = replace(load, load_format="safetensors", model_loader_extra_config={})
    loader = get_model_loader(load)
    if not isinstance(loader, DefaultModelLoader):
        raise NoFiles(f"load format {load_format}")
    return loader


def snapshot(config: VllmConfig) -> Path:
    """Local folder of the hub's files for this model and revision.

    Raises:
        NoFiles: they are not on this host.
    """
    model = config.model_config
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                str(model.model),
                revision=model.revision,
                cache_dir=config.load_config.download_dir,
                local_files_only=True,
            )
        )
    except Exception as error:  # noqa: BLE001 - the hub's own errors, or no such library
        raise NoFiles(f"{model.model} is not on this host: {type(error).__name__}") from None
