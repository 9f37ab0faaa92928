"""Which worker runs what where several run the tests (pytest-xdist, ``--dist loadgroup``): a module stays together,
since they share fixtures, names and ports. ``tests/vllm`` is one group, and comes first: it takes longest, the
other workers run all others beside it, and who is done first helps."""

from __future__ import annotations

import gc
import logging
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no fault of the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


# Tests whose outcome does not depend on what else the machine does: a failure of theirs counts at once.
DETERMINED = {"unit", "sim", "model"}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules are imported without garbage collection: a third less processor time, vLLM being among them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            folder = item.path.parent.name
            item.add_marker(pytest.mark.xdist_group(folder if folder == "vllm" else item.path.stem))
    if hasattr(config, "workerinput"):  # of pytest-xdist
        items.sort(key=lambda item: item.path.parent.name != "vllm")
    if config.pluginmanager.hasplugin("rerunfailures"):
        for item in items:
            # Processes that wait for each other on a machine with fewer processors than they want: what fails is tried
            # once more, and printed. A wrong answer is never tried again.
            if item.path.parent.name not in DETERMINED:
                item.add_marker(pytest.mark.flaky(reruns=1, rerun_except=["WrongAnswer"]))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names each test that passed at its second try only, and why it failed: a fault of the test, or of the product."""
    again = terminalreporter.getreports("rerun")
    if again:
        terminalreporter.section("failed at the first try: each wants a mend")
        for report in again:
            lines = str(report.longrepr).strip().splitlines()
            why = next((line for line in lines if line.startswith("E ")), lines[-1])
            terminalreporter.write_line(f"AGAIN {report.nodeid}: {why}")


@pytest.fixture(autouse=True)
def _logging_of_our_own() -> None:
    """A test that has vLLM load its plugins sends our lines to vLLM's log: the next test's ``caplog`` wants them."""
    logger = logging.getLogger("pdtransport")
    for handler in [each for each in logger.handlers if type(each).__module__ == "pdtransport.vllm.logs"]:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
