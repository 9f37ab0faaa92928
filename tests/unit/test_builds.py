"""benchmarks.builds: figures of two builds in pairs, and the proof of which build was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _sse_engines, builds, router
from benchmarks._paired import GB_S, MS, Row, compare, figures_of, interval_of_mean, table, unpaired
from benchmarks.builds import BUILDS, GUARD, SEEN, Build, Comparison, Run, parse

REPO = Path(__file__).resolve().parents[2]
CPU = {"tokens": 512, "system": "pdtransport serial", "ttft_ms": 100.0, "prefill_x": 1.0, "handoff_ms": None}
GPU = {"mode": "graphs", "tokens": 512, "system": "pdtransport", "TTFT": 20.5, "runs": 5}
LINK = {"what": "shm", "how": "in order", "page_kib": 32, "bytes_s": 2_500_000_000, "of_perftest": 0.5}
REUSE = {"workload": "chat", "system": "no pool", "first p50": 200.0, "again p50": 20.0, "engine %": 3.0}
ROUTER = {"clients": 16, "system": "router", "ttft_p50_ms": 2.0, "added_p99_ms": 3.0, "cpu_ms": 0.5, "requests_s": 9.0}


@pytest.mark.parametrize(
    ("row", "figures"),
    [
        (CPU, {"512 tokens, pdtransport serial: ttft": 100.0}),
        (GPU, {"graphs, 512 tokens, pdtransport: TTFT": 20.5}),
        (LINK, {"shm, in order, 32 KiB: bytes": 2.5}),
        (REUSE, {"chat, no pool: first p50": 200.0, "chat, no pool: again p50": 20.0}),
        (
            ROUTER,
            {
                "16 clients, router: ttft_p50": 2.0,
                "16 clients, router: added_p99": 3.0,
                "16 clients, router: cpu": 0.5,
                "16 clients, router: requests": 9.0,
            },
        ),
    ],
)
def test_figures_are_named_by_their_row_and_column(row: dict[str, Any], figures: dict[str, float]) -> None:
    """The same figure has the same name in each run, whatever its place; ratios, counts and gaps are no figures."""
    assert figures_of({"rows": [row]})[0] == figures
    assert figures_of({}) == ({}, {})


def test_differences_are_taken_within_pairs() -> None:
    """A drift that both builds see does not widen the interval: it is of the differences, not of the values."""
    pairs = [({"a": 100.0 * n}, {"a": 100.0 * n + 5 + (-1) ** n}) for n in range(1, 7)]
    (row,) = compare(pairs, {"a": MS})
    assert (row.pairs, row.old, row.new) == (6, 350.0, pytest.approx(355.0))
    assert row.difference == pytest.approx(5.0)
    assert row.interval is not None
    # Student's t with 5 degrees of freedom: 2.57 x sqrt(6/5) / sqrt(6)
    assert row.interval == pytest.approx((5 - 2.57 / 5**0.5, 5 + 2.57 / 5**0.5))


def test_too_few_pairs_have_no_interval() -> None:
    """Three that agree by chance decide nothing."""
    assert interval_of_mean([1.0, 1.0, 1.0]) is None
    assert interval_of_mean([1.0, 1.0, 1.0, 1.0]) == (1.0, 1.0)
    assert Row("a", MS, 3, 1.0, 2.0, 1.0, None).verdict == "open"


@pytest.mark.parametrize(
    ("unit", "old", "interval", "verdict"),
    [
        (MS, 10.0, (-0.9, 0.9), "within"),  # 1 ms, since 3 % is less
        (MS, 100.0, (-2.9, 2.9), "within"),  # 3 %
        (MS, 100.0, (-2.9, 3.1), "open"),
        (MS, 100.0, (0.1, 3.1), "worse"),
        (MS, 100.0, (-3.1, -0.1), "better"),
        (GB_S, 10.0, (-0.29, 0.29), "within"),
        (GB_S, 10.0, (-0.9, 0.9), "open"),  # no millisecond of throughput
        (GB_S, 10.0, (-0.9, -0.1), "worse"),
        (GB_S, 10.0, (0.1, 0.9), "better"),
    ],
)
def test_the_verdict_is_about_the_whole_interval(unit: Any, old: float, interval: Any, verdict: str) -> None:
    """3 % or 1 ms for times, 3 % for throughput; and which side is the better one."""
    assert Row("a", unit, 6, old, old, 0.0, interval).verdict == verdict


def test_a_figure_that_a_build_lacks_is_a_line() -> None:
    """Neither a traceback nor a silent gap; what both have is compared all the same."""
    pairs = [({"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 3.0}), ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0, "c": 3.0})]
    rows = compare(pairs, dict.fromkeys("abc", MS))
    assert [(row.name, row.pairs) for row in rows] == [("a", 2), ("b", 1)]
    assert unpaired(pairs) == [
        "b: missing in 1 of 2 runs of the new build",
        "c: missing in 2 of 2 runs of the old build",
    ]
    assert "too few pairs" in table(rows)


def options_of(*more: str) -> Any:
    return parse(["--old", "/no/such/checkout", *more, "--", "links", "--rounds", "1"])


def comparison_of(folder: Path, *more: str) -> Comparison:
    return Comparison({name: Build(name, folder / name, folder) for name in BUILDS}, options_of(*more))


def test_pairs_are_run_old_new_new_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that neither drift nor place favours a build; and every run is in the file."""
    order = []

    def run_once(build: Build, pair: int, *_: Any) -> Run:
        order.append(build.name)
        return Run(build.name, pair, 0, {"rows": [LINK]}, seen=1)

    monkeypatch.setattr(builds, "run_once", run_once)
    file = tmp_path / "found.json"
    comparison = comparison_of(tmp_path, "--runs", "4", "--json", str(file))
    comparison.measure()
    assert order == ["old", "new", "new", "old", "old", "new", "new", "old"]
    assert len(json.loads(file.read_text())["runs"]) == 8
    assert comparison.report()


def test_a_run_without_figures_is_told_and_its_pair_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pairs that are whole are compared, and the status says that something failed."""

    def run_once(build: Build, pair: int, *_: Any) -> Run:
        if (build.name, pair) == ("new", 1):
            return Run(build.name, pair, 1, failed="status 1, no figures: out of memory")
        return Run(build.name, pair, 0, {"rows": [LINK]}, seen=1)

    monkeypatch.setattr(builds, "run_once", run_once)
    comparison = comparison_of(tmp_path, "--runs", "2")
    comparison.measure()
    assert not comparison.report()
    out = capsys.readouterr().out
    assert "not counted: pair 2, new: status 1, no figures: out of memory" in out
    assert "shm, in order, 32 KiB: bytes" in out


def test_each_builds_own_driver_is_taken_where_this_ones_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For both builds, from the first run on, and the output says so and why."""
    drivers = []

    def run_once(build: Build, pair: int, driver: Path, *_: Any) -> Run:
        drivers.append(driver)
        if driver == builds.HERE:
            return Run(build.name, pair, 1, failed="status 1, no figures: x | TypeError: send()")
        return Run(build.name, pair, 0, {"rows": [LINK]}, seen=1)

    monkeypatch.setattr(builds, "run_once", run_once)
    module = tmp_path / "old" / "benchmarks" / "links.py"
    module.parent.mkdir(parents=True)
    module.touch()
    comparison = comparison_of(tmp_path, "--runs", "1")
    comparison.measure()
    assert drivers == [builds.HERE, tmp_path / "old", tmp_path / "new"]
    assert comparison.report()
    assert "driver: each build's own (TypeError: send())" in capsys.readouterr().out


@pytest.mark.parametrize(("foreign", "failed"), [("", False), ("inner", True)])
def test_a_process_fails_that_takes_a_module_from_elsewhere(tmp_path: Path, foreign: str, failed: bool) -> None:
    """And one that takes all of them from its build is noted with where that is."""
    for package in ("build/pdtransport/__init__.py", "build/pdtransport/inner.py", "other/inner.py"):
        file = tmp_path / package
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    root = tmp_path / "build"
    if foreign:
        (root / "pdtransport" / "inner.py").unlink()
        (root / "pdtransport" / "inner.py").symlink_to(tmp_path / "other" / "inner.py")
    guard = GUARD.format(roots=(f"{root}{os.sep}",), root=str(root), seen=SEEN)
    (root / "sitecustomize.py").write_text("import sys\n" + guard)
    seen = tmp_path / "seen"
    done = subprocess.run(
        [sys.executable, "-c", "import pdtransport.inner"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root), SEEN: str(seen)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode != 0) == failed, done.stderr
    _, name, origin = seen.read_text().split()
    assert (name, origin) == ("pdtransport", str(root / "pdtransport" / "__init__.py"))
    if failed:
        assert f"pdtransport.inner is {tmp_path / 'other' / 'inner.py'}, not of the build in {root}" in done.stderr


def test_a_folder_that_is_no_checkout_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert builds.main(["--old", str(tmp_path), "--", "links"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--old: {tmp_path / 'scripts' / 'gpu_tree.sh'} is missing: git worktree add")


def test_what_the_router_adds_is_the_routed_figure_less_the_direct_one() -> None:
    """Of medians and of 99th percentiles, at each number of clients; processor time is a request's."""
    windows = [
        router.Window("direct", 1, [0.001] * 10, 0, 1.0, 0.0),
        router.Window("router", 1, [0.003] * 10, 2, 2.0, 0.02),
    ]
    direct, routed = router.summarise(windows)
    assert (direct["ttft_p50_ms"], direct["requests_s"], direct["failed"]) == (1.0, 10.0, 0)
    assert (routed["added_p50_ms"], routed["added_p99_ms"], routed["cpu_ms"]) == (2.0, 2.0, 2.0)
    assert (routed["requests_s"], routed["failed"]) == (5.0, 2)
    assert figures_of({"rows": [direct, routed]})[0]["1 clients, router: added_p50"] == 2.0


def test_a_load_target_streams_what_vllm_does() -> None:
    """The role, a token an event, and the reason why it ended: `benchmarks.router` counts these."""
    events = [json.loads(each.removeprefix(b"data: ")) for each in (_sse_engines.ROLE, _sse_engines.TOKEN)]
    assert [each["choices"][0]["delta"] for each in events] == [
        {"role": "assistant", "content": ""},
        {"content": " word"},
    ]
