"""vLLM's own unit tests of what it asks of a connector, with our connector in place of NixlConnector.

``python -m scripts.vllm_suite TREE``, where TREE is vLLM's source of the version that is installed (its source archive,
unpacked). Prints how many of the tests pass, and why others do not. Needs no GPU: a minute or two.

Their tests are run as they are; what they assume of NixlConnector is given to ours here:

- it takes part in both roles whatever ``kv_role`` says,
- a request's parameters name a host that exists, and a transfer,
- their model, which would be downloaded, is ``examples/models/tiny-lm``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODEL = Path(__file__).resolve().parents[1] / "examples/models/tiny-lm"
THEIRS, OURS = "NixlConnector", "PDTransportConnector"
FOLDER = Path("tests/v1/kv_connector/unit")
# All of vLLM's connector tests that run on CPU and are not of one connector's own classes.
MODULES = (
    "cache_pollution_prevention",
    "config",
    "error_propagation",
    "handshake_pp_aggregation",
    "hma_auto_config",
    "invalid_blocks_correctness",
    "kv_connector_lifecycle",
    "kv_load_failure_recovery",
    "output_aggregator",
    "remote_decode_lifecycle",
    "remote_prefill_lifecycle",
)
STATE = "its cache has Mamba's recurrent state, which we refuse"
KNOWN = {
    "test_p_side_chunked_prefill_mamba": f"{STATE}; expects that the connector cuts the prompt, as NIXL's does",
    "test_async_load_does_not_double_reserve_mamba_spec_blocks": STATE,
}


def adapted(init: Callable[..., None], change: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """``init`` with its keyword arguments changed."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        change(kwargs)
        init(self, *args, **kwargs)

    return wrapper


def use_our_model(arguments: dict[str, Any]) -> None:
    arguments["model"] = str(MODEL)


def use_our_connector(arguments: dict[str, Any]) -> None:
    if arguments.get("kv_connector") == THEIRS:
        arguments.update(kv_connector=OURS, kv_connector_module_path="pdtransport.vllm", kv_role="kv_both")


class Swap:
    """pytest plugin: adapts what the tests build, and counts."""

    def __init__(self, ours: bool) -> None:
        self.ours = ours
        self.passed: set[str] = set()
        self.others: dict[str, str] = {}

    def pytest_configure(self) -> None:
        from vllm.config import KVTransferConfig, ModelConfig

        ModelConfig.__init__ = adapted(ModelConfig.__init__, use_our_model)  # type: ignore[method-assign]
        if self.ours:
            KVTransferConfig.__init__ = adapted(  # type: ignore[method-assign]
                KVTransferConfig.__init__, use_our_connector
            )
            self._name_transfers()

    def _name_transfers(self) -> None:
        from tests.v1.kv_connector.unit import utils  # vLLM's

        create = utils.create_request

        def create_request(*args: Any, **kwargs: Any) -> Any:
            request = create(*args, **kwargs)
            if (request.kv_transfer_params or {}).get("do_remote_prefill"):
                request.kv_transfer_params.update(remote_host="127.0.0.1", transfer_id=request.request_id)
            return request

        utils.create_request = create_request

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.passed and report.when == "call":
            self.passed.add(name)
        elif not report.passed:
            lines = str(report.longrepr).splitlines()
            self.others[name] = next((line[1:].strip() for line in reversed(lines) if line.startswith("E ")), "skipped")


def bare(name: str) -> str:
    """The test's own name, without its module and parameters."""
    return name.partition("::")[2].partition("[")[0]


def why(name: str, problem: str) -> str:
    return KNOWN.get(bare(name), problem)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, help="vLLM's source tree")
    parser.add_argument("--theirs", action="store_true", help=f"leave {THEIRS} as it is (needs the package nixl)")
    parser.add_argument("-k", default="", help="only these tests, as pytest's option")
    options = parser.parse_args()
    modules = [FOLDER / f"test_{name}.py" for name in MODULES]
    if missing := [str(path) for path in modules if not (options.tree / path).exists()]:
        parser.error(f"{options.tree} has no {', '.join(missing)}: unpack vLLM's source archive, and name its folder")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as place:
        # Only their tests: the package beside them is not built, and would be imported instead of the installed one.
        Path(place, "tests").symlink_to((options.tree / "tests").resolve())
        os.chdir(place)
        sys.path.insert(0, place)
        swap = Swap(not options.theirs)
        confined = ["-c", os.devnull, "--rootdir", place, f"--confcutdir={Path(place) / FOLDER}"]
        chosen = ["-k", options.k] if options.k else []
        pytest.main(
            [*confined, *chosen, "-p", "no:cacheprovider", "-q", "--tb=short", "-W", "ignore", *map(str, modules)],
            plugins=[swap],
        )
    for name, problem in swap.others.items():
        print(f"{name}: {why(name, problem)}")
    print(f"{len(swap.passed)} of {len(swap.passed) + len(swap.others)} pass")
    unknown = [name for name in swap.others if not (swap.ours and bare(name) in KNOWN)]
    return 1 if unknown or not swap.passed else 0


if __name__ == "__main__":
    sys.exit(main())
