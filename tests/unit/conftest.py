"""What the tests on a real GPU share; they skip where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pdtransport.kernels import gpu


@pytest.fixture(scope="module")
def cupy() -> Any:
    module = pytest.importorskip("cupy", reason="needs cupy")
    try:
        count = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    if not count:
        pytest.skip("needs an NVIDIA GPU")
    return module


@pytest.fixture(scope="module")
def pages(cupy: Any) -> Iterator[gpu.GpuPages]:
    opened = gpu.GpuPages(0)
    yield opened
    opened.close()
