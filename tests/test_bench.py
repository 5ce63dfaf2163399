"""scripts/bench_gemm.py and bench_serve.py without a GPU: what is measured, what breaks, verdicts, tables, plots."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import bench_gemm
import bench_gemm_peers as peers
import bench_gemm_report as report
import bench_serve
import bench_serve_models as models
import bench_serve_report as serve_report
import bench_serve_sglang
import bench_timeline
import bench_timing
import engine_process
import pytest
import torch
from bench_gemm_report import Dense, Moe
from conftest import ROOT, assert_same_tensor
from safetensors import safe_open

from fouroversix_plugin.inspection import inspect_checkpoint

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


# --- serving: models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    models.write_quantized(models.SHAPES["small-moe"], folder, 512, "cpu")
    return folder


@pytest.mark.parametrize("name", ["stock", "w4a16", "w4a4"])
def test_every_layer_is_there_and_sound(small_moe: Path, name: str) -> None:
    text = inspect_checkpoint(small_moe / name).text()
    assert "208 of 208 quantized weights pass every check" in text  # 4 layers of 4 + 3 x 16
    config = json.loads((small_moe / name / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(4)]
    assert (set(routers) <= set(config["quantization_config"]["ignore"])) == (name == "stock")


def test_copies_of_the_first_layer_are_the_same_bytes_once(small_moe: Path) -> None:
    tensors = []
    for layer in (0, 3):
        with safe_open(small_moe / "stock" / f"layer-{layer}.safetensors", framework="pt") as file:
            prefix = f"model.layers.{layer}."
            tensors.append({name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert_same_tensor(name, tensor, tensors[1][name])
    assert len({(small_moe / name / "layer-3.safetensors").stat().st_ino for name in ("stock", "w4a16", "w4a4")}) == 1
    activations = [
        json.loads((small_moe / name / "config.json").read_text())["quantization_config"]["activations"]
        for name in ("w4a16", "w4a4")
    ]
    assert (activations[0], activations[1]["granularity"]) == (None, "token")


def test_the_shapes_have_the_sizes_they_are_named_after() -> None:
    def weights(shape: models.Shape) -> int:
        counts = {name: math.prod(size) for name, size in shape.sizes()}
        first = sum(count for name, count in counts.items() if name.startswith(models.FIRST))
        return sum(counts.values()) + (shape.layers - 1) * first

    assert weights(models.SHAPES["llama-8b"]) == pytest.approx(8.03e9, rel=0.001)
    assert weights(models.SHAPES["qwen3-30b-a3b"]) == pytest.approx(30.5e9, rel=0.002)


# --- timelines -------------------------------------------------------------------------------------------------------


def test_a_kernel_is_timed_from_another_calls_start() -> None:
    kernel = bench_timeline.Kernel
    # Of three calls: the second kernel starts before the first has ended, and takes twice as long once.
    calls = [(100.0, 5.0), (200.0, 5.0), (300.0, 10.0)]
    kernels = [k for at, long in calls for k in (kernel("b", at + 2, at + 2 + long), kernel("a", at, at + 3))]
    assert bench_timeline.medians(kernels, 3) == [kernel("a", 0, 3), kernel("b", 2, 7)]
    with pytest.raises(ValueError, match="5 kernels in 3 calls"):
        bench_timeline.medians(kernels[1:], 3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("void fos::cuda::(anonymous namespace)::gemm<fos::cuda::Shape<128, 4, 1>, 0>(fos::cuda::Gemm)", "gemm"),
        ("fos::cuda::(anonymous namespace)::sort_slots(fos::cuda::Route)", "sort_slots"),
        ("fused_moe_kernel", "fused_moe_kernel"),
    ],
)
def test_a_kernels_name_keeps_its_types(name: str, said: str) -> None:
    assert bench_timeline.short(name) == said


# --- serving: processes ----------------------------------------------------------------------------------------------

LOADING = {
    "vllm": "INFO Model loading took 4.53 GiB memory and 6.250000 seconds",
    "sglang": "[2026-01-01] Load weight end. elapsed=6.25 s, type=LlamaForCausalLM, quant=modelopt_fp4, "
    "quant_algo=NVFP4, avail mem=133.05 GB, mem usage=4.53 GB.",
}
ENGINE = f"""
import json, sys, time
job = json.load(open(sys.argv[1]))
print({LOADING}[job["engine"]], flush=True)
print("INFO fouroversix: products of experts W4A16 by triton (passed over: hopper: no nvcc)", flush=True)
with open(job["records"], "a") as file:
    print(json.dumps(dict(configuration=job["configuration"], point="1", speed=100.0)), file=file)
"""
ENDS = {
    "well": ("", None),
    "hangs": ("time.sleep(60)", "2 s were over"),
    "raises": (
        "print('(EngineCore) ERROR ValueError: No available memory for the cache blocks.')\n"
        "raise RuntimeError('Engine core initialization failed. See root cause above.')",
        "ValueError: No available memory for the cache blocks.",
    ),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "ended with -9"),
}


@pytest.mark.parametrize(("engine", "end"), [*(("vllm", end) for end in ENDS), ("sglang", "well")])
def test_a_configuration_that_ends_badly_keeps_what_it_measured(tmp_path: Path, engine: str, end: str) -> None:
    more, reason = ENDS[end]
    options = bench_serve.parse(["--engine", engine, "--shape", "small", "--seconds", "2"])
    command = [sys.executable, "-c", ENGINE + more]
    records: list[dict[str, Any]] = []
    bench_serve.run_configuration(options, "w4a16", tmp_path, command, time.monotonic() + 2, records, nullcontext)
    assert serve_report.speeds(records) == {"w4a16": {"1": 100.0}}
    assert {"configuration": "w4a16", "model_gib": 4.53, "load_seconds": 6.25} in records
    assert {"configuration": "w4a16", "products": {"experts": "triton"}} in records
    assert [r["failed"] for r in records if "failed" in r] == ([reason] if reason else [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("during", ["measuring", "removing the models"])
def test_a_signal_leaves_an_engine_or_loses_what_it_measured(tmp_path: Path, during: str, number: int) -> None:
    engine = tmp_path / "engine.py"
    pid = tmp_path / "pid"
    take_long = f"""
import os, pathlib, tempfile, time
def take_long(*_):
    pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))
    time.sleep(300)
"""
    program = f"import bench_serve; bench_serve.__file__ = {str(engine)!r}"
    if during == "measuring":
        engine.write_text(ENGINE.replace("argv[1]", "argv[-1]") + take_long + "take_long()")
    else:
        engine.write_text(ENGINE.replace("argv[1]", "argv[-1]"))
        program += take_long + "tempfile.TemporaryDirectory.cleanup = take_long"
    program += "\nbench_serve.main()"
    command = [sys.executable, "-c", program, "--shape", "small", "--configurations", "bf16,w4a16", "--dummy"]
    process = subprocess.Popen(
        command, cwd=ROOT / "scripts", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.monotonic() + 120
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert re.search(r"\| bf16 +\| +100 ", said), said
    assert ("bf16: a signal came first" in said) == (during == "measuring")
    assert "bf16: tokens a second by streams: 1: 100" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_arguments_of_vllm() -> None:
    options = bench_serve.parse(["--streams", "1,256", "--llm", '{"gpu_memory_utilization": 0.5}'])
    stock = bench_serve.engine_arguments(options, "stock", Path("/models"))
    assert (stock["model"], stock["max_num_seqs"], stock["gpu_memory_utilization"]) == ("/models/stock", 256, 0.5)
    assert stock["max_model_len"] == 8193
    assert stock["compilation_config"] == {"cudagraph_capture_sizes": [1, 2, 4, 8, 256]}
    assert "load_format" not in stock
    assert bench_serve.engine_arguments(options, "bf16", Path("/models"))["load_format"] == "dummy"
    options = bench_serve.parse(["--dummy", "--enforce-eager"])
    assert options.configurations == ["bf16", "w4a16", "w4a4"]
    online = bench_serve.engine_arguments(options, "w4a16", Path("/models"))
    assert (online["model"], online["load_format"]) == ("/models/bf16", "dummy")
    assert online["hf_overrides"]["quantization_config"] == {"quant_method": "nvfp4_4over6", "recipe": "w4a16"}
    assert "compilation_config" not in online


def sglang_arguments(configuration: str, *given: str) -> dict[str, Any]:
    options = bench_serve.parse(["--engine", "sglang", "--streams", "1,256", *given])
    return bench_serve.engine_arguments(options, configuration, Path("/models"))


@pytest.mark.parametrize(
    ("configuration", "layers"),
    [
        ("bf16", (None, "triton", None)),
        ("stock", ("modelopt_fp4", "marlin", "marlin")),
        ("w4a16", ("nvfp4_4over6", "fouroversix", None)),
        ("w4a4", ("nvfp4_4over6", "fouroversix", None)),
    ],
)
def test_arguments_of_sglang(configuration: str, layers: tuple[str | None, ...]) -> None:
    given = sglang_arguments(configuration, "--llm", '{"attention_backend": "fa3"}')
    keys = ("quantization", "moe_runner_backend", "fp4_gemm_runner_backend")
    assert tuple(given.get(key) for key in keys) == layers
    assert given["model_path"] == f"/models/{configuration}"
    assert (given.get("load_format") == "dummy") == (configuration == "bf16")
    assert ("json_model_override_args" in given) == (configuration == "stock")
    assert (given["cuda_graph_bs_decode"], given["max_running_requests"]) == ([1, 256], 256)
    assert (given["attention_backend"], given["sampling_backend"]) == ("fa3", "pytorch")


def test_sglang_is_told_of_made_up_weights_and_of_stock() -> None:
    online = sglang_arguments("w4a4", "--dummy", "--enforce-eager")
    assert (online["model_path"], online["load_format"]) == ("/models/bf16", "dummy")
    block = {"quant_method": "nvfp4_4over6", "recipe": "nvfp4_4over6"}
    assert json.loads(online["json_model_override_args"]) == {"quantization_config": block}
    assert online["disable_cuda_graph"]
    assert "cuda_graph_bs_decode" not in online
    stock = json.loads(sglang_arguments("stock")["json_model_override_args"])["quantization_config"]
    assert (stock["quant_method"], stock["quant_algo"], stock["group_size"]) == ("modelopt", "NVFP4", 16)


class OneTokenLess:
    """Plays sglang.Engine; with five prompts at once it forgets a token."""

    def __init__(self, **arguments: Any) -> None:
        self.model = arguments["model_path"]

    def generate(self, input_ids: list[list[int]], sampling_params: dict[str, Any]) -> list[dict[str, Any]]:
        assert all(token < 10 for prompt in input_ids for token in prompt)
        tokens = [sampling_params["max_new_tokens"]] * len(input_ids)
        tokens[-1] -= len(input_ids) == 5
        return [{"output_ids": [0] * count, "meta_info": {"completion_tokens": count}} for count in tokens]


def test_every_point_is_timed_and_its_tokens_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_serve_sglang, "constructor", lambda: OneTokenLess)
    job = {
        "configuration": "w4a4",
        "engine": "sglang",
        "arguments": {"model_path": "/models"},
        "vocabulary": 10,
        "streams": [1, 4],
        "prefill": (2, 30),
        "new_tokens": 3,
        "repeats": 2,
        "records": str(tmp_path / "records"),
    }
    bench_serve.measure(job)
    start, *points = map(json.loads, Path(job["records"]).read_text().splitlines())
    assert start.keys() == {"configuration", "start_seconds"}
    assert [point["point"] for point in points] == ["1", "4", "prefill"]
    tokens = [3, 12, 60]
    assert [p["speed"] for p in points] == [n / min(p["seconds"]) for n, p in zip(tokens, points, strict=True)]
    assert [len(point["seconds"]) for point in points] == [2, 2, 2]
    with pytest.raises(RuntimeError, match="5 streams generated 14 tokens, needed 15"):
        bench_serve.measure(job | {"streams": [5]})


@pytest.mark.parametrize("installed", [(), engine_process.GROUPS[:1]], ids=["not installed", "installed before SGLang"])
@pytest.mark.parametrize("group", engine_process.GROUPS)
def test_a_checkout_is_unknown_to_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], group: str
) -> None:
    point = EntryPoint("fouroversix", "fouroversix_plugin.serving.vllm:register", "")
    monkeypatch.setattr(engine_process.metadata, "entry_points", lambda group: [point] * (group in installed))
    environment = os.environ | engine_process.plugin_environment(tmp_path)
    program = (
        "import sys; from importlib.metadata import distributions\n"
        "(found,) = (d for d in distributions(path=sys.path[1:2]) if d.name == 'fouroversix-plugin')\n"
        f"(point,) = found.entry_points.select(group={group!r})\n"
        "print(point.load().__module__)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    engine = group.partition(".")[0]
    assert (done.stdout, done.returncode) == (f"fouroversix_plugin.serving.{engine}\n", 0), done.stderr


def test_an_installed_plugin_is_made_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("fouroversix", "fouroversix_plugin.serving.vllm:register", "")
    monkeypatch.setattr(engine_process.metadata, "entry_points", lambda group: [point])
    assert engine_process.plugin_environment(tmp_path) == {}


# --- serving: verdicts -----------------------------------------------------------------------------------------------


def served(**speeds: tuple[float, ...]) -> list[dict[str, Any]]:
    points = ("1", "16", "64", "256", "prefill")
    return [
        {"configuration": name, "point": point, "speed": speed}
        for name, of_points in speeds.items()
        for point, speed in zip(points, of_points, strict=False)
    ]


def test_served_verdicts_of_a_dense_model() -> None:
    records = served(
        bf16=(200, 3000, 10000, 22000, 37000),
        stock=(280, 4000, 9500, 14600, 21700),
        w4a16=(330, 4400, 10400, 22000, 33400),
        w4a4=(290, 4000, 9900, 21000, 31000),
    )
    found = {(v.aim.ours, v.point, v.aim.others): v.met for v in serve_report.verdicts(records, experts=False)}
    assert found == {
        ("w4a16", "1", ("stock",)): True,
        ("w4a16", "16", ("stock",)): False,  # 1.10
        ("w4a16", "1", ("bf16",)): True,
        ("w4a16", "16", ("bf16",)): False,  # 1.47
        ("w4a16", "64", ("bf16", "stock")): False,  # 1.04
        ("w4a16", "256", ("bf16",)): True,
        ("w4a16", "prefill", ("bf16",)): True,
        ("w4a4", "1", ("w4a16",)): False,  # 0.879
        ("w4a4", "16", ("w4a16",)): True,
        ("w4a4", "256", ("w4a16",)): True,
        ("w4a4", "prefill", ("w4a16",)): False,  # 0.93
    }


def test_served_verdicts_of_experts_and_of_missing_speeds() -> None:
    records = served(bf16=(100, 100), stock=(90, 120), w4a16=(111, 131, 100))
    found = [(v.aim.ours, v.point, v.met) for v in serve_report.verdicts(records, experts=True)]
    assert found == [
        ("w4a16", "1", True),
        ("w4a16", "16", False),
        ("w4a16", "64", None),
        ("w4a4", "1", None),
        ("w4a4", "16", None),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", "no/such/folder.json"), "there is no folder no/such"),
        (("--plot", "."), "is a folder"),
        (("--streams", ","), "needs a number"),
        (("--llm", "[1]"), "needs a JSON object"),
        (("--dummy", "--configurations", "stock"), "nothing is left to measure"),
    ],
    ids=str,
)
def test_wrong_usage_is_found_after_the_work(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_serve.parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_served_report_is_printed_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = bench_serve.parse(["--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png")])
    records = [
        *served(bf16=(204, 3110, 10386, 22065, 37500), w4a16=(330, 5000)),
        {"configuration": "w4a16", "model_gib": 5.66, "load_seconds": 4.25, "start_seconds": 61.0},
        {"configuration": "w4a16", "products": {"linear": "hopper", "experts": "triton"}},
        {"configuration": "stock", "failed": "ValueError: no kernel"},
    ]
    bench_serve.report(options, records, "some GPU")
    said = capsys.readouterr().out
    (row,) = (line for line in said.splitlines() if line.startswith("| ours W4A16 ") and "61.0" in line)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["330", "5000", "-", "-", "-", "4.2", "61.0", "5.7"]
    assert "ours W4A16: products of linear by hopper, products of experts by triton\n" in said
    assert "stock NVFP4: ValueError: no kernel\n" in said
    assert "2 of 8 aims met, 6 not known" in said
    assert json.loads((tmp_path / "o.json").read_text())["records"] == records
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
