"""Arguments and tables of the benchmarks and test drivers that a GPU session runs: mistakes there cost device time."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _gpu_handoff, gpu_kernels, handoff, interference, load, pool
from benchmarks._decode_streams import Gap, within
from benchmarks._gpu_handoff import Sample, runs_per_100, summarise, table
from benchmarks._gpu_scale import FULL, REHEARSAL
from tests.rig import device, twin_gpu
from tests.rig.client import Answer, to_decode, to_prefill
from tests.rig.device import Place, seated, wide_vectors
from tests.rig.servers import ServerSpec
from tests.vllm.__main__ import outcomes
from tests.vllm.__main__ import parse as parse_tests


def test_the_full_model_has_the_size_that_the_figures_speak_of() -> None:
    """128 KiB of KV per token: 16,000 tokens are 2.1 GB; the cache holds the longest prompt more than twice."""
    assert FULL.kv_token_bytes == 128 << 10
    assert FULL.kv_tokens > 2 * max(FULL.lengths)
    assert max(FULL.lengths) + _gpu_handoff.MAX_TOKENS <= FULL.max_len


def test_the_pool_is_measured_beside_plain_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the stand-in for a GPU: each figure is there, and what was loaded is what was stored."""
    assert pool.parse(["--gpu"]).bytes == 1 << 30
    monkeypatch.setattr(pool, "_cuda_memcpy", ctypes.memmove)
    with twin_gpu.installed():
        found = pool.gpu_bandwidth(4 << 20, 1 << 20, 1)
    assert {"memcpy out", "memcpy in", "store", "load", "store / memcpy", "kernel out/16b", "registered s"} <= set(
        found
    )
    assert "GB/s" in pool.table({"bandwidth": found})


def test_the_model_folder_holds_no_weights(tmp_path: Path) -> None:
    """A configuration, and a tokenizer that knows each of its tokens."""
    config = json.loads((FULL.write_model(tmp_path / "m") / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_key_value_heads"]) == (32, 4096, 8)
    assert {file.name for file in (tmp_path / "m").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert config["vocab_size"] == len(json.loads((tmp_path / "m" / "tokenizer.json").read_text())["model"]["vocab"])


@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_servers_of_a_pair_fit_one_gpu(mode: Any, tmp_path: Path) -> None:
    """Their KV caches have a size and their share of the card is small, so that two can start; graphs unless eager."""
    for spec in FULL.pair("pdtransport", tmp_path, mode, {"links": {"order": ["ucx"]}}):
        command = spec.command(1, 2)
        assert command[command.index("--kv-cache-memory-bytes") + 1] == str(FULL.kv_bytes)
        assert float(command[command.index("--gpu-memory-utilization") + 1]) < 0.1
        assert ("--enforce-eager" in command) == (mode == "eager")
        assert command[command.index("--load-format") + 1] == "dummy"
        assert '"order": ["ucx"]' in command[command.index("--kv-transfer-config") + 1]
        assert set(spec.environment(2)) - set(os.environ) <= {
            "VLLM_NO_USAGE_STATS",
            "HF_HUB_OFFLINE",
            "VLLM_USE_FLASHINFER_SAMPLER",
            "VLLM_CACHE_ROOT",
        }


def visible(spec: ServerSpec) -> str | None:
    return spec.environment(2).get("CUDA_VISIBLE_DEVICES")


def test_two_cards_seat_prefill_and_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each server has its own GPU first and sees the other's, whatever system it belongs to; the aggregated one sits
    with prefill. Without --cards nothing is said about GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = handoff.parse(["--gpu", "--cards", "2,5"])
    plan = _gpu_handoff.Plan(FULL, ["eager"], [], [64], 1, False, 1, {}, False, "", 0, 0.0, tmp_path, options.cards)
    for system in _gpu_handoff.SYSTEMS:
        seats = [visible(spec) for spec in _gpu_handoff.specs_of(plan, system, tmp_path, "eager")]
        assert seats == ["2,5", "5,2"][: len(seats)]
        assert len(seats) == (1 if system == "aggregated" else 2)
    assert json.loads(_gpu_handoff.document(plan, {}, []))["cards"] == [2, 5]
    assert [visible(spec) for spec in FULL.pair("nixl", tmp_path, "graphs")] == [None, None]
    assert interference.parse(["--gpu", "--cards", "0,1"]).cards == (0, 1)


def test_the_report_says_which_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "all_cards", lambda: ("A", "B"))
    assert handoff.where((1, 0)) == "prefill on GPU 1 (B), decode on GPU 0 (A)"
    assert handoff.where((0, 7)) == "prefill on GPU 0 (A), decode on GPU 7 (unknown)"
    assert handoff.where(()).startswith("all servers on one device: ")


def test_several_ranks_sum_without_multicast() -> None:
    """Nothing that vLLM chooses by itself for two ranks may use NVLink multicast."""
    wide = ServerSpec("tp2", tp=2, device="cuda", cards=(0, 1))
    assert device.NO_MULTICAST.items() <= wide.environment(2).items()
    assert device.NO_MULTICAST["NCCL_NVLS_ENABLE"] == "0"
    assert {"--disable-custom-all-reduce", "--compilation-config.pass_config.fuse_allreduce_rms=false"} <= set(
        wide.command(1, 2)
    )
    assert "--disable-custom-all-reduce" not in ServerSpec("tp1", device="cuda").command(1, 2)


def test_kernels_between_two_gpus_are_told_beside_cuda_s_own_copy() -> None:
    """As shares of the copy of equal size; checksums' cost against the plain pull."""

    def figure(what: str, mib: int, kib: int, gb_s: float) -> gpu_kernels.Figure:
        return gpu_kernels.figure(what, mib, kib, mib * gpu_kernels.MIB / gb_s / 1e9, 0.0, 0.0, 0.0)

    figures = [
        figure(gpu_kernels.PEER_COPY, 64, 0, 400.0),
        figure("pull", 64, 32, 330.0),
        figure("pull with checksums", 64, 32, 300.0),
    ]
    text = gpu_kernels.table(figures)
    assert "Checksums fused into the copy cost (target: under 5%): 64 MiB in 32 KiB: +10.0%" in text
    assert text.endswith("Pulled with checksums, of cudaMemcpyPeer: 64 MiB in 32 KiB: 75%")
    assert gpu_kernels.table([]).startswith("| what "), "a run that failed at once has a table too"
    assert gpu_kernels.two("1,0") == (1, 0)
    for wrong in ("0", "0,0", "a,b", "0,1,2"):
        with pytest.raises(argparse.ArgumentTypeError):
            gpu_kernels.two(wrong)


def test_push_dispatch_names_what_nixl_pairs_requests_by() -> None:
    """NixlPushConnector: decode is told prefill's engine and the id that both requests share."""

    class Stand:
        spec = ServerSpec("p", connector="nixl-push")
        control_port = 77

    decode = to_decode(Stand(), "ab" * 16)  # type: ignore[arg-type]
    config = Stand.spec.transfer_config(77)
    assert config == {"kv_role": "kv_both", "kv_connector": "NixlPushConnector", "engine_id": "p-77"}
    assert decode["remote_engine_id"] == config["engine_id"]
    assert decode["remote_request_id"] == f"cmpl-{'ab' * 16}-0"
    assert "transfer_id" not in to_prefill(Stand(), "x")  # type: ignore[arg-type]


def sample(system: str, ttft: float, **more: Any) -> Sample:
    return Sample("eager", system, 1024, ttft_s=ttft, **more)


def test_rows_are_medians_beside_the_aggregated_server() -> None:
    samples = [sample("aggregated", s) for s in (0.060, 0.050, 0.055)]
    samples += [sample("pdtransport", s, prefill_s=0.06, handoff_s=0.01, exposed_s=0.002) for s in (0.07, 0.09, 0.08)]
    samples += [sample("pdtransport", 0.088, fragmented=True), sample("pdtransport", 9.0, failed="late")]
    aggregated, whole, broken = summarise(samples)
    assert (aggregated["TTFT"], aggregated["+agg"]) == (55.0, 0.0)
    assert (whole["TTFT"], whole["(best)"], whole["+agg"], whole["exposed"]) == (80.0, 70.0, 25.0, 2.0)
    assert (whole["runs"], whole["failed"], whole["x whole"]) == (3, 1, None)
    assert (broken["system"], broken["x whole"]) == ("pdtransport fragmented", 1.1)
    assert (aggregated["paired"], whole["paired"], broken["paired"]) == (0.0, None, None), "a round more"
    assert summarise([each for each in samples if not each.failed])[1]["paired"] == 25.0  # of 10, 40 and 25
    text = table([aggregated, whole, broken])
    assert "+agg" in text
    assert "failed" in text.splitlines()[0]
    assert "commit" not in text  # nobody filled it


def test_samples_survive_a_file(tmp_path: Path) -> None:
    """``--resume`` reads what ``--json`` wrote."""
    options = handoff.parse(["--gpu"])
    plan = _gpu_handoff.Plan(FULL, options.modes, [], options.lens, 5, False, 1, {}, True, "", 0, 0.0, tmp_path)
    samples = [sample("nixl", 0.3, runs_per_100=12.5, events={"P opened": 0.1})]
    (tmp_path / "a.json").write_text(_gpu_handoff.document(plan, {}, samples))
    assert _gpu_handoff.read([tmp_path / "a.json"]) == samples


def test_what_was_measured_is_not_started_again(tmp_path: Path) -> None:
    done = [sample("aggregated", 0.1), sample("pdtransport P's token", 0.1)]
    plan = _gpu_handoff.Plan(
        FULL,
        ["eager"],
        ["aggregated", "pdtransport"],
        [64],
        1,
        False,
        1,
        {},
        False,
        (),
        0,
        time.monotonic() + 99,
        tmp_path,
    )
    assert list(_gpu_handoff.run(plan, done, print)) == []


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    said: list[str] = []
    plan = _gpu_handoff.Plan(
        FULL, ["eager"], ["aggregated", "nixl"], [64], 1, False, 2, {}, False, "", 0, time.monotonic() + 1, tmp_path
    )
    assert list(_gpu_handoff.run(plan, [], said.append)) == []
    assert said == ["eager: no time left for aggregated, nixl"]


@pytest.mark.parametrize(
    ("ids", "runs"),
    [([[1, 2, 3, 4]], 25.0), ([[4, 3, 2, 1]], 100.0), ([[1, 2, 9, 10]], 50.0), ([[7]], None), (None, None)],
)
def test_fragmentation_is_counted_in_ascending_runs(ids: Any, runs: float | None) -> None:
    assert runs_per_100(Answer([1], None, {"remote_block_ids": ids}, 0, 0, 0)) == runs


def test_handoff_arguments() -> None:
    """The defaults of the CPU stay; --gpu brings its own."""
    assert (handoff.parse([]).lens, handoff.parse([]).runs) == ([512, 2048, 4000], 7)
    assert handoff.chosen(handoff.parse(["--against", "none"])) == ["aggregated", "aggregated+idle", "pdtransport"]
    gpu = handoff.parse(["--gpu", "--against", "nixl-push,nixl", "--graphs", "--settings", '{"links": {}}'])
    assert (gpu.lens, gpu.runs, gpu.modes) == (list(FULL.lengths), 5, ["graphs"])
    assert handoff.chosen(gpu) == ["aggregated", "pdtransport", "nixl-push", "nixl"]
    assert handoff.chosen(handoff.parse(["--gpu", "--systems", "pdtransport"])) == ["pdtransport"]
    assert handoff.parse(["--rehearse"]).lens == list(REHEARSAL.lengths)


@pytest.mark.parametrize(
    "argv",
    [
        ["--gpu", "--lens", "17000"],
        ["--lens", "9000"],
        ["--gpu", "--modes", "fast"],
        ["--rehearse", "--graphs"],
        ["--against", "nixl-push"],
        ["--gpu", "--systems", "foo"],
        ["--gpu", "--runs", "0"],
        ["--gpu", "--settings", "{"],
        ["--gpu", "--cards", "0"],
        ["--gpu", "--cards", "1,1"],
        ["--gpu", "--cards", "one,two"],
        ["--rehearse", "--cards", "0,1"],
        ["--cards", "0,1"],
    ],
)
def test_wrong_handoff_arguments_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        handoff.parse(argv)


def test_interference_rows_compare_pushing_with_other_loads() -> None:
    windows = [
        interference.Window("computing", 0, 5, 5_000, [0.2, 2.2, 1.2, 3.2, 4.2], gaps_s=[0.020] * 99 + [0.040]),
        interference.Window("pushing", 5, 10, 5_000, [5.9, 7.94, 9.98], gaps_s=[0.0202] * 99 + [0.041]),
        interference.Window("joining", 5, 10, 5_000, [5.5, 6.5], gaps_s=[0.0202] * 99 + [0.041]),
        interference.Window("quiet", 10, 15, gaps_s=[0.01] * 10),
    ]
    rows = {row["load"]: row for row in interference.summarise(windows)}
    assert rows["computing"]["tok_s"] == 5_000, "from the first end to the last, not by how many a window caught"
    assert rows["pushing / computing"]["tok_s"] == pytest.approx(1 / 2.04)
    assert rows["pushing / computing"]["p50"] == pytest.approx(1.01)
    assert rows["pushing / joining"]["p99"] == 1
    assert "not within 3%" in interference.table(list(rows.values()))
    windows[1].done = [5.9, 6.92, 7.94]
    assert interference.table(interference.summarise(windows)).count("not within") == 0


def test_interference_windows_take_turns() -> None:
    loads = ["computing", "joining", "pushing"]
    assert interference.schedule(2) == ["quiet", *loads, *reversed(loads), "quiet"]
    loads = interference.schedule(5)
    assert loads.count("computing") == loads.count("pushing") == 5


def test_load_tells_the_second_token_from_later_ones() -> None:
    """A first token from prefill moves time in front of the second: it counts in no other column. Requests that failed
    are counted and in no percentile."""
    good = load.Sample("router", 4.0, 0, 100, ttft_s=0.2, gaps_s=[0.05, 0.01, 0.01], exposed_s=0.001)
    slow = load.Sample("router", 4.0, 1, 100, ttft_s=2.0, gaps_s=[0.07, 0.01, 0.01], first_token_from="prefill")
    lost = load.Sample("router", 4.0, 1, 100, failed="HTTP 500")
    (row,) = load.summarise([good, slow, lost], ttft_ms=1000, itl_ms=30)
    assert (row["requests"], row["failed"], row["from prefill"]) == (3, 1, 1)
    assert row["good"] == pytest.approx(1 / 3)
    assert row["TTFT p50"] == pytest.approx(1100)
    assert row["2nd max"] == pytest.approx(70)
    assert row["ITL max"] == pytest.approx(10)
    assert row["exposed p50"] == pytest.approx(1)
    assert "| 4 " in load.table([row])


def test_load_sends_all_systems_the_same_arrivals() -> None:
    """What differs between two rows of a round is the system, not the luck of its arrivals; rounds differ."""
    options = load.parse(["--rehearse", "--rates", "2", "--window", "20"])
    once, again, other = (load.Window(options, REHEARSAL, 2.0, number) for number in (0, 0, 1))
    assert once._arrivals == again._arrivals != other._arrivals
    assert 20 < len(once._arrivals) < 60
    assert all(64 <= length <= 512 and at < 20 for at, length in once._arrivals)


@pytest.mark.parametrize(
    "argv",
    [
        [], ["--rehearse", "--gpu"], ["--rehearse", "--graphs"], ["--rehearse", "--rates", "0"],
        ["--rehearse", "--lens", "64"], ["--rehearse", "--lens", "64,5000"], ["--rehearse", "--systems", "mooncake"],
        ["--rehearse", "--tokens", "2"], ["--rehearse", "--rates", "many"], ["--gpu", "--cards", "1"],
    ],
)  # fmt: skip
def test_load_refuses_what_it_can_not_measure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load.parse(argv)
    assert "error: " in capsys.readouterr().err


def test_gaps_count_for_the_window_that_holds_them() -> None:
    gaps = [Gap(1.0, 0.5), Gap(2.0, 0.5), Gap(3.2, 0.5)]
    assert within(gaps, 1.0, 3.0) == [0.5]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--gpu", "--rehearse"],
        ["--rehearse", "--graphs"],
        ["--rehearse", "--cards", "0,1"],
        ["--gpu", "--streams", "8"],
    ],
)
def test_wrong_interference_arguments_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        interference.parse(argv)


def test_the_environment_says_where_servers_run() -> None:
    assert Place.of({"PDT_DTYPE": "bfloat16"}) == Place("cpu", True, None, True, False, "bfloat16", None)
    assert Place.of({}).dtype == ("bfloat16" if wide_vectors() else "float32")
    place = Place.of({"PDT_DEVICE": "cuda", "PDT_ASYNC": "0", "PDT_START": "in-turn", "PDT_INVARIANT": "1"})
    assert place == Place("cuda", False, False, False, True, "bfloat16", None)
    assert (place.block_size, place.margin_or(0.25), Place().margin_or(0.25)) == (16, 0.0, 0.25)
    assert Place.of({"PDT_MARGIN": "0.5"}).margin_or(0.25) == 0.5
    assert (Place.of({"PDT_CARDS": "0, 1"}).cards, Place.of({}).cards) == ((0, 1), ())
    assert [seated((0, 1), 0), seated((0, 1), 1), seated((3,), 1), seated((), 1)] == [(0, 1), (1, 0), (3,), ()]
    with pytest.raises(ValueError, match="PDT_DEVICE"):
        Place.of({"PDT_DEVICE": "gpu"})
    with pytest.raises(ValueError, match="PDT_CARDS=0,x: different numbers of GPUs"):
        Place.of({"PDT_CARDS": "0,x"})
    with pytest.raises(ValueError, match=r"PDT_DTYPE=fp8: one of bfloat16, float32 is needed"):
        Place.of({"PDT_DTYPE": "fp8"})


def test_outcomes_of_a_test_run(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(
        "<testsuites><testsuite><testcase classname='tests.vllm.test_a' name='one' time='1.26'/>"
        "<testcase classname='tests.vllm.test_a' name='two' time='0'><failure message='AssertionError: no&#10;more'/>"
        "</testcase><testcase classname='tests.vllm.test_b' name='three'><skipped message='two GPUs'/></testcase>"
        "</testsuite></testsuites>"
    )
    assert [(row["test"], row["outcome"], row["why"]) for row in outcomes(tmp_path / "junit.xml")] == [
        ("test_a::one", "passed", ""),
        ("test_a::two", "failed", "AssertionError: no"),
        ("test_b::three", "skipped", "two GPUs"),
    ]
    assert outcomes(tmp_path / "none.xml") == []
    assert parse_tests(["--aborts", "7"]).aborts == 7
