"""scripts/bench_gemm.py without a GPU: what is measured, processes that break, verdicts, tables and plots."""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_gemm
import bench_gemm_peers as peers
import bench_gemm_report as report
import bench_timing
import pytest
import torch
from bench_gemm_report import Dense, Moe

SMALL_MOE = Moe("small", 8, 2, 64, 32)


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times calls on the CPU, where there are no graphs and events."""

    def seconds(call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def graph_seconds(calls: Sequence[Callable[[], object]], replays: int) -> float:
        return sum(map(seconds, calls)) / len(calls)

    monkeypatch.setattr(bench_timing, "event_seconds", seconds)
    monkeypatch.setattr(bench_timing, "graph_seconds", graph_seconds)
    monkeypatch.setattr(bench_gemm, "COLD_BYTES", 1 << 14)


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("wall_clock")
def test_every_peer_computes_the_product_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "humming", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    options = bench_gemm.parse(["--tokens", "1,5", "--worker", str(tmp_path / "records")])
    options.shapes = [Dense(64, 96), SMALL_MOE]
    options.peers = [name for name in options.peers if name != "read"]
    bench_gemm.work(options, "cpu")
    records = bench_gemm.read_records(options.worker)
    errors = {(r["shape"], r["peer"]): r["relative_error"] for r in records if "relative_error" in r}
    ours = {("64x96", name) for name in ("w4a16", "w4a4", "w4a4-gemm", "bf16", "dequantize")}
    assert errors.keys() == ours | {("small", "w4a16"), ("small", "w4a4")}
    for where, error in errors.items():
        assert 0 < error < 0.02, where
    measured = report.times(records)
    assert measured["64x96"].keys() == {1, 5}
    assert measured["64x96"][5].keys() == {name for _, name in ours}
    failed = {(r["shape"], r["peer"]) for r in records if "failed" in r}
    assert failed == {("64x96", "marlin"), ("64x96", "humming"), ("small", "vllm-bf16"), ("small", "marlin")}


@pytest.mark.usefixtures("wall_clock")
def test_a_wrong_scale_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = peers.Peer("wrong", lambda w, tokens: lambda x: 2 * (x @ bench_gemm.ops.dequantize(w, x.dtype).T))
    monkeypatch.setitem(peers.DENSE, "bf16", wrong)
    options = bench_gemm.parse(["--tokens", "1", "--peers", "bf16", "--worker", str(tmp_path / "records")])
    options.shapes = [Dense(64, 96)]
    bench_gemm.work(options, "cpu")
    (line,) = report.notes(bench_gemm.read_records(options.worker), {"bf16": "wrong"})
    assert line == "wrong: relative error 1 at 64x96: ITS RESULT IS WRONG"


def test_weights_and_experts_are_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gemm, "COLD_BYTES", 10_000)
    weights = bench_gemm.make_weights(Dense(64, 96), "cpu")
    assert sum(w.nbytes for w in weights) >= 10_000
    assert len({w.packed.data_ptr() for w in weights}) == len(weights)
    inputs = bench_gemm.make_inputs(SMALL_MOE, 1, 8, "cpu")
    for first in (0, 4):  # 8 experts, two a token: four calls read all
        assert sorted(torch.cat([r.topk_ids[0] for r in inputs[first : first + 4]]).tolist()) == list(range(8))
    several = bench_gemm.make_inputs(SMALL_MOE, 50, 1, "cpu")[0]
    assert several.topk_ids.shape == (50, 2)
    assert (several.topk_ids[:, 0] != several.topk_ids[:, 1]).all()
    assert len(several.topk_ids.unique()) == 8


# --- processes that break --------------------------------------------------------------------------------------------

# Plays bench_gemm.py's worker: does shapes "a" and "b" with three peers, of which the second ends the process.
WORKER = """
import json, os, sys, time
path, how = sys.argv[1:]
def records():
    return [json.loads(line) for line in open(path)] if os.path.exists(path) else []
done = {(r["shape"], r["peer"]) for r in records() if "finished" in r}
broke = {r["peer"] for r in records() if "broke" in r}
def write(shape, peer, **what):
    with open(path, "a") as file:
        file.write(json.dumps({"shape": shape, "peer": peer, **what}) + "\\n")
for shape in "ab":
    for peer in "xyz":
        if (shape, peer) in done:
            continue
        write(shape, peer, began=True)
        if peer == "y" and peer not in broke:
            if how == "failed":
                write(shape, peer, failed="CUDA error: an illegal memory access was encountered")
            time.sleep(60 if how == "hangs" else 0)
            os._exit(3)
        write(shape, peer, tokens=1, seconds=1.0)
        write(shape, peer, finished=1)
"""


@pytest.mark.parametrize(
    ("how", "why"), [("dies", "its process ended with status 3"), ("failed", "CUDA error: an illegal memory access")]
)
def test_a_peer_that_ends_the_process_leaves_the_others(tmp_path: Path, how: str, why: str) -> None:
    path = tmp_path / "records"
    assert bench_gemm.run_workers([sys.executable, "-c", WORKER, str(path), how], path, 60) is None
    records = bench_gemm.read_records(path)
    assert {(r["shape"], r["peer"]) for r in records if "seconds" in r} >= {(s, p) for s in "ab" for p in "xz"}
    (failed,) = (r for r in records if "failed" in r)
    assert (failed["shape"], failed["peer"]) == ("a", "y")
    assert why in failed["failed"]


def test_a_run_that_hangs_ends_in_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "records"
    stopped = bench_gemm.run_workers([sys.executable, "-c", WORKER, str(path), "hangs"], path, 2)
    assert stopped == "the time limit of 2 s ended it"
    records = bench_gemm.read_records(path)
    assert [(r["shape"], r["peer"]) for r in records if "seconds" in r] == [("a", "x")]
    assert [r["failed"] for r in records if "failed" in r] == [stopped]


def test_a_worker_that_never_starts_ends_the_run(tmp_path: Path) -> None:
    stopped = bench_gemm.run_workers([sys.executable, "-c", "raise SystemExit(5)"], tmp_path / "records", 60)
    assert stopped == "its process ended with status 5"


# --- verdicts --------------------------------------------------------------------------------------------------------


def records_of(shape: str, tokens: int, **seconds: float) -> list[dict[str, Any]]:
    return [
        {"shape": shape, "tokens": tokens, "peer": peer.replace("_", "-"), "seconds": s} for peer, s in seconds.items()
    ]


def judge(shape: Dense | Moe, tokens: int, **seconds: float) -> list[tuple[float | None, bool | None]]:
    found = report.verdicts("w4a16", [shape], report.times(records_of(shape.name, tokens, **seconds)))
    return [(verdict.ratio, verdict.met) for verdict in found]


DENSE, MOE = report.DENSE_SHAPES[0], report.MOE_SHAPES[0]


@pytest.mark.parametrize(
    ("shape", "tokens", "seconds", "expected"),
    [
        (DENSE, 1, {"w4a16": 0.85, "marlin": 1.0, "humming": 1.2}, [(0.85, True)]),
        (DENSE, 16, {"w4a16": 0.86, "marlin": 1.3, "humming": 1.0}, [(0.86, False)]),
        (DENSE, 16, {"w4a16": 0.5, "marlin": 1.0}, [(None, None)]),
        (DENSE, 32, {"w4a16": 9.0, "marlin": 1.0, "humming": 1.0}, []),
        (DENSE, 64, {"w4a16": 0.9, "marlin": 0.1, "humming": 1.0}, [(0.9, True)]),
        (DENSE, 256, {"w4a16": 1.01, "humming": 1.0}, [(1.01, False)]),
        (DENSE, 8192, {"w4a16": 1.08, "bf16": 1.0, "marlin": 2.0}, [(1.08, True), (0.54, False)]),
        (MOE, 64, {"w4a16": 0.8, "marlin": 1.0, "vllm_bf16": 0.1}, [(0.8, True)]),
        (MOE, 1024, {"w4a16": 0.8, "marlin": 1.2, "vllm_bf16": 1.0}, [(0.8, False)]),
        (MOE, 4096, {"w4a16": 0.9, "vllm_bf16": 1.0}, [(0.9, True)]),
    ],
)
def test_verdicts(shape: Dense | Moe, tokens: int, seconds: dict[str, float], expected: list[Any]) -> None:
    assert judge(shape, tokens, **seconds) == [(pytest.approx(ratio), met) for ratio, met in expected]


def test_floors_are_those_worked_out_by_hand() -> None:
    assert max(Dense(4096, 4096).floors(1)) == pytest.approx(2.2e-6, rel=0.02)
    assert max(Dense(4096, 4096).floors(8192)) == pytest.approx(347.9e-6, rel=0.01)
    assert max(MOE.floors(1)) == pytest.approx(4.9e-6, rel=0.02)
    assert max(MOE.floors(1, experts=4)) == pytest.approx(2.5e-6, rel=0.02)
    assert max(MOE.floors(4096)) == pytest.approx(391e-6, rel=0.01)


# --- tables and plots ------------------------------------------------------------------------------------------------


def test_table_shows_missing_times_as_dashes() -> None:
    records = records_of("4096x4096", 16, w4a16=8.04e-6, bf16=13.7e-6) + records_of("4096x4096", 8192, bf16=3585e-6)
    text = report.shape_table(DENSE, {"w4a16": "ours", "bf16": "cuBLAS", "humming": "Humming"}, records)
    assert [re.split(r"\s*\|\s*", line)[1:-1] for line in text.splitlines() if "---" not in line] == [
        ["M", "ours", "cuBLAS", "Humming", "memory floor", "tensor floor"],
        ["16", "8.0", "13.7", "-", "2.3", "0.7"],
        ["8192", "-", "3585", "-", "33.4", "347.9"],
    ]


def test_reasons_are_said_once() -> None:
    failed = {"peer": "humming", "failed": "ModuleNotFoundError: No module named 'humming'"}
    records = [
        failed | {"shape": "a"},
        failed | {"shape": "b"},
        {"peer": "bf16", "shape": "a", "relative_error": math.nan},
    ]
    assert report.notes(records, {"humming": "Humming"}) == [
        "bf16: relative error nan at a: ITS RESULT IS WRONG",
        "Humming: no times for a, b: ModuleNotFoundError: No module named 'humming'",
    ]


def test_report_is_printed_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = bench_gemm.parse(["--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png"), "--quick"])
    records = [
        record
        for shape in options.shapes
        for M in (1, 64, 4096)
        for record in records_of(
            shape.name, M, w4a16=1e-5 * M, w4a4=2e-5 * M, bf16=3e-5 * M, vllm_bf16=3e-5 * M, marlin=2e-5 * M, read=5e-6
        )
    ]
    bench_gemm.report(options, records, "some GPU")
    said = capsys.readouterr().out
    assert "ours W4A16: 7 of 11 aims met, 4 not known" in said  # Humming is not there
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["records"] == records
    assert {aim["met"] for aim in written["aims"] if aim["ours"] == "w4a16"} == {True, None}
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "shapes", "count"),
    [
        (["--dense"], "4096x4096", 5),
        (["--moe"], "qwen3-30b-a3b", 2),
        (["--quick"], "4096x4096", 3),
        (["--shapes", "e64-h4096,128x64"], "e64-h4096", 2),
    ],
)
def test_options_choose_shapes(arguments: list[str], shapes: str, count: int) -> None:
    chosen = bench_gemm.parse(arguments).shapes
    assert (chosen[0].name, len(chosen)) == (shapes, count)


@pytest.mark.parametrize("arguments", [["--shapes", "4096"], ["--shapes", "64x40"], ["--peers", "cutlass"]])
def test_bad_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench_gemm.parse(arguments)
