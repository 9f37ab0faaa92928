"""The stream that vLLM launches the model on, held by a barrier."""

from __future__ import annotations

import logging

from pdtransport.kv.geometry import HOST

logger = logging.getLogger(__name__)


class GpuStream:
    """A :class:`pdtransport.engine.holding.ModelStream` of one GPU.

    Args:
        device: as CUDA numbers it in this process.

    Raises:
        GpuError: CUDA has no barriers here, or what we launch would wait with the model.
    """

    def __init__(self, device: int) -> None:
        from pdtransport.kernels.barrier import Barrier

        self._device = device
        self._barrier = Barrier(device)
        self._barrier.try_beside(self._current())

    def close(self, seconds: float) -> int:
        return self._barrier.close(self._current(), seconds)

    def open(self, ticket: int) -> bool:
        return self._barrier.open(ticket)

    def _current(self) -> int:
        import torch

        return int(torch.cuda.current_stream(self._device).cuda_stream)


def model_stream(device: int) -> GpuStream | None:
    """None where KV is in host memory, or the GPU can't be held."""
    if device == HOST:
        return None
    try:
        return GpuStream(device)
    except RuntimeError as error:
        logger.info("pdtransport: steps are held before they are launched: %s", error)
        return None
