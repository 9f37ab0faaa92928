"""Which worker runs what where several run the tests (pytest-xdist, ``--dist loadgroup``): a module stays together,
since they share fixtures, names and ports. ``tests/vllm`` sees to its own."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name != "vllm" and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
