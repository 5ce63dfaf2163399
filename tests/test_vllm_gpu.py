"""Real vLLM on GPUs, beside this package on the CPU and stock BF16 (run by hand, not in CI; -s shows the figures).

A test names the engine runs it needs in its `engine` mark. Those of all chosen tests start together, each in a process
of its own, as many at a time as there are cores for: a start takes long, and -k chooses. What has no results after
--seconds fails; everything else is judged.
"""

import functools
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Left, assert_close, calc_diff
from engine_process import plugin_environment
from engines import (
    KINDS,
    LENGTH,
    PATIENCE,
    PLAIN,
    RECIPES,
    SCHEMES,
    SMALL_DENSE,
    STREAMS,
    Checkpoint,
    Emulated,
    all_started,
    answered,
    assert_adapted,
    assert_batch_invariant,
    assert_w4a4,
    assert_w4a16,
    calibrated,
    chat_once,
    dequantized,
    done,
    emulations,
    flat,
    moved,
    moved_beside_bf16,
    options,
    prompts_of,
    quantized_by_cli,
    random_adapter,
    random_model,
    reference_experts,
    reference_linear,
    rounding,
    run_engine,
    static_amax,
    wanted,
)
from safetensors import safe_open
from safetensors.torch import load_file

import fouroversix_plugin as fos

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("psutil", reason="vLLM brings it")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

Make = Callable[[str], Future[Path]]
Job = dict[str, Any]
Runs = Callable[[str], dict[str, Any]]

EXPERTS = "block_sparse_moe.experts"
ATTENTION = ["self_attn.qkv_proj", "self_attn.o_proj"]
PARTS = {"dense": [*ATTENTION, "mlp.gate_up_proj", "mlp.down_proj"], "moe": [*ATTENTION, EXPERTS]}
LAYERS = [f"model.layers.{n}" for n in range(0, 30, 6)]
CAPTURED = [f"{layer}.{part}" for layer in LAYERS for part in {*PARTS["dense"], *PARTS["moe"]}]
CONFIGS = ["vllm-throughput", "vllm-latency", "vllm-small", "vllm-w4a16"]

FEW, MANY = 16, 512
"""Tokens to generate."""
# While it captures a graph, vLLM attends from as many places of one sequence as the graph has rows: memory must be
# there for them.
MODEL_LENGTH = STREAMS * LENGTH
RANK = 8

DENSE = {**SMALL_DENSE, "max_position_embeddings": MODEL_LENGTH}
LARGE = DENSE | {"num_attention_heads": 32, "head_dim": 128}
RANDOM = {
    "small dense": DENSE,
    "small moe": DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    # Layers of Llama 3 8B, and of Qwen3 30B-A3B as a Mixtral.
    "large dense": LARGE
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_key_value_heads": 8},
    "large moe": LARGE
    | {"hidden_size": 2048, "intermediate_size": 768, "num_local_experts": 128, "num_experts_per_tok": 8}
    | {"num_hidden_layers": 2, "num_key_value_heads": 4},
}
WHOLE = {"large dense": (32, 15), "large moe": (48, 45)}
"""Layers of the whole model, and the seconds that loading it may take."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

OURS = {"quantization": "nvfp4_4over6"}
# Engines that start together would each take the others' memory for its own: theirs is stated, not measured.
SHARE = {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 1 << 30}
# The prompts are one step, and the streams are one: no graph is filled up with rows, whose number orders sums.
SIZES = {"cudagraph_capture_sizes": [STREAMS, STREAMS * LENGTH]}
GRAPHS = {
    "compiled": SIZES,
    # Not traced: graphs of the whole model, attention included, of steps that only decode or of all.
    "decoding": SIZES | {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "whole": SIZES | {"mode": 0, "cudagraph_mode": "FULL"},
    # Traced, not fused: graphs between attention, of the kernels that an eager run calls.
    "pieces": SIZES | {"mode": 3, "backend": "eager", "cudagraph_mode": "PIECEWISE"},
}
# Attention that computes the same whatever a graph was captured for; FlashAttention 3 takes a schedule made for it.
TRITON = {"attention_backend": "TRITON_ATTN"}
# By NCCL alone: vLLM's own sums over ranks need more of a machine.
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "disable_custom_all_reduce": True}
STAGES = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
# Of all but experts, which are split over both: each by its rows, or a half of them for each.
REPLICAS = {"two replicas": [], "two replicas with half of the experts": ["--enable-expert-parallel"]}
# vLLM asserts that sleeping freed memory of the GPU: more than others may take meanwhile.
SLEEPY = {"enable_sleep_mode": True, "kv_cache_memory_bytes": 8 << 30}
# Without names, lm_head could be adapted too, and prompts' logprobs would come through that.
LORA = {"enable_lora": True, "max_lora_rank": RANK, "lora_target_modules": ["q_proj", "v_proj", "o_proj"]}
AGAIN = {"reload": True, "sleep": True}
INVARIANT = "batch-invariant"


def job(model: Future[Path], asked: dict[str, Any] | None = None, **more: Any) -> Job:
    sizes = {"max_model_len": MODEL_LENGTH, "max_num_seqs": STREAMS, "max_num_batched_tokens": STREAMS * LENGTH}
    return {"model": model, "tokens": FEW, "options": {**sizes, **SHARE, "dtype": "bfloat16"} | (asked or {}), **more}


def graphs(way: str) -> dict[str, Any]:
    return {"enforce_eager": False, "compilation_config": GRAPHS[way]}


def every_scheme(make: Make, asked: dict[str, Any], tokens: int = FEW) -> dict[str, Job]:
    quantized = {scheme: job(make(scheme.lower()), asked, tokens=tokens) for scheme in SCHEMES}
    return {"BF16": job(make("bf16"), asked), **quantized}


def also_alone(make: Make, scheme: str) -> dict[str, Job]:
    return {"": job(make(scheme.lower()), graphs("compiled"), alone=True)}


WAYS: dict[str, Callable[[Make], dict[str, Job]]] = {
    "compiled": lambda make: every_scheme(make, graphs("compiled"), MANY),
    "W4A16": lambda make: {
        "BF16": job(make("bf16")),
        "dequantized": job(make("dequantized")),
        "stored": job(make("w4a16")),
        "online": job(make("bf16"), options("w4a16")),
        "modelopt": job(make("w4a16 as modelopt"), OURS),
        "compressed-tensors": job(make("w4a16 as compressed-tensors"), OURS),
    },
    "W4A4": lambda make: {
        "stored": job(make("w4a4"), capture=CAPTURED),
        "online": job(make("bf16"), OURS),
        "compressed-tensors": job(make("w4a16 as compressed-tensors"), OURS | options("nvfp4_4over6")),
        "static": job(make("calibrated"), OURS | options("nvfp4_static"), capture=CAPTURED),
    },
    "decoding": lambda make: every_scheme(make, graphs("decoding")),
    "whole": lambda make: every_scheme(make, graphs("whole")),
    "whole by Triton": lambda make: every_scheme(make, graphs("whole") | TRITON),
    "eager by Triton": lambda make: every_scheme(make, TRITON),
    # By one order of sums, whatever else there is in a step, and by whichever is the fastest.
    **{f"{INVARIANT} {scheme}": functools.partial(also_alone, scheme=scheme) for scheme in ["BF16", *SCHEMES]},
    "fast W4A16": functools.partial(also_alone, scheme="W4A16"),
    # Graphs read the weights from where they were.
    "stored, again": lambda make: {"": job(make("w4a16"), graphs("whole") | SLEEPY, **AGAIN)},
    "online, again": lambda make: {"": job(make("bf16"), OURS | SLEEPY, **AGAIN)},
    "online": lambda make: {"": job(make("bf16"), options("w4a16"))},
    "adapted": lambda make: {"": job(make("w4a16"), LORA, adapter=make("adapter"))},
    "pieces": lambda make: every_scheme(make, graphs("pieces")),
    "one": lambda make: {"BF16": job(make("bf16")), "W4A16": job(make("w4a16"))},
    "two BF16": lambda make: {"": job(make("bf16"), TWO)},
    "two online W4A16": lambda make: {"": job(make("bf16"), options("w4a16") | TWO)},
    "two stored W4A16": lambda make: {"": job(make("w4a16"), TWO)},
    "two online W4A4": lambda make: {"": job(make("bf16"), OURS | TWO)},
    "two stored W4A4": lambda make: {"": job(make("w4a4"), TWO)},
    "two with half of the experts": lambda make: {"": job(make("w4a16"), TWO | {"enable_expert_parallel": True})},
    "two in line BF16": lambda make: {"": job(make("bf16"), STAGES)},
    "two in line online W4A16": lambda make: {"": job(make("bf16"), options("w4a16") | STAGES)},
    "two in line stored W4A16": lambda make: {"": job(make("w4a16"), STAGES)},
}
"""Jobs by the way a model is served."""
ORDER = ["compiled", *REPLICAS, *CONFIGS, *WAYS]
"""In which runs start: what takes longest first, then what says most."""


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """The folder of a model's kind in a form, which is made in the background once it is asked for."""
    folder = tmp_path_factory.mktemp("checkpoints")

    with ThreadPoolExecutor() as pool:

        @functools.cache
        def ask(kind: str, form: str) -> Future[Path]:
            target = folder / f"{kind} {form}"
            if form == "adapter":
                return done(random_adapter(target, RANK))
            if form == "bf16" and kind in RANDOM:
                return done(random_model(RANDOM[kind], target, DEVICE))
            if form == "bf16":
                return done(request.getfixturevalue("models")[KINDS.index(kind)])
            if form == "dequantized":
                quantized = ask(kind, "w4a16")
                return pool.submit(lambda: dequantized(quantized.result(), target))
            source = ask(kind, "bf16").result()
            if form == "calibrated":
                return pool.submit(calibrated, source, target)
            scheme, _, spelled = form.partition(" as ")
            return pool.submit(quantized_by_cli, source, target, RECIPES[scheme], spelled or "nvfp4_4over6")

        yield ask


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    checkpoint: Checkpoint,
    left: Left,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Runs]:
    """Results by the name of a run: the kind of model and the way it is served."""
    folder = tmp_path_factory.mktemp("runs")

    def prepare(kind: str, way: str) -> Callable[[], dict[str, Any]]:
        place = folder / f"{kind} {way}"
        place.mkdir()
        if way in CONFIGS or way in REPLICAS:
            return functools.partial(chat, way, checkpoint(kind, "bf16").result(), place / "server.log", left)
        jobs, asked = WAYS[way](functools.partial(checkpoint, kind)), prompts_of(checkpoint, kind)

        def run() -> dict[str, Any]:
            for described in jobs.values():
                described |= {key: str(value.result()) for key, value in described.items() if isinstance(value, Future)}
            switches = {"VLLM_BATCH_INVARIANT": "1"} if way.startswith(INVARIANT) else {}
            return run_engine(place, jobs, asked, limit=left(), **switches)

        return run

    at_a_time = max(1, (os.cpu_count() or 1) * 3 // 4)
    with all_started(request, ORDER, prepare, at_a_time) as started:
        yield lambda name: started[name].result(left(PATIENCE)) | {"folder": folder / name.replace(":", "")}


def chat(way: str, model: Path, log: Path, left: Left) -> dict[str, Any]:
    """What a server with a file of configs/serve says, or one of two replicas."""
    replicas = ["--data-parallel-size=2", *REPLICAS[way]] if way in REPLICAS else []
    file = ROOT / "configs" / "serve" / f"{'vllm-throughput' if replicas else way}.yaml"
    share = [f"--{name.replace('_', '-')}={value}" for name, value in SHARE.items()] + replicas
    environment = [f"{name}={value}" for name, value in plugin_environment(log.parent).items()]
    # `vllm serve`, wherever its script was installed.
    serve = ["env", *environment, sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    command = [*serve, str(model), "--config", str(file), *share]
    return chat_once(shlex.join(command), str(model), log, left)


# --- what is served ---


@pytest.fixture(scope="module")
def emulated(request: pytest.FixtureRequest, checkpoint: Checkpoint, left: Left) -> Iterator[Emulated]:
    """What the CPU path says of a model: computed beside the runs, not after the last that is waited for."""
    served = {name.partition(":")[0] for name in wanted(request)}
    with emulations(checkpoint, left, [kind for kind in KINDS if kind in served]) as ask:
        yield ask


@pytest.mark.engine("{kind}: W4A16")
@pytest.mark.parametrize("kind", KINDS)
def test_w4a16_is_further_from_the_cpu_path_than_bf16_rounding(runs: Runs, emulated: Emulated, kind: str) -> None:
    served = runs(f"{kind}: W4A16")
    assert_w4a16(emulated, kind, *(flat(served[way]) for way in ("stored", "dequantized", "BF16")))


@pytest.mark.engine("{kind}: W4A4", "{kind}: W4A16")
@pytest.mark.parametrize("kind", KINDS)
def test_w4a4_is_further_from_the_cpu_path_than_rounding(runs: Runs, emulated: Emulated, kind: str) -> None:
    ours, far = (flat(runs(f"{kind}: {scheme}")["stored"]) for scheme in ("W4A4", "W4A16"))
    assert_w4a4(emulated, kind, ours, far)


@pytest.mark.engine("{kind}: W4A4")
@pytest.mark.parametrize("way", ["stored", "static"])
@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind in KINDS for part in PARTS[kind]])
def test_a_served_w4a4_layer_is_not_the_reference(
    runs: Runs, checkpoint: Checkpoint, kind: str, part: str, way: str
) -> None:
    served, static = runs(f"{kind}: W4A4"), way == "static"
    flat(served[way])
    captured = load_file(served["folder"] / f"{way}.safetensors", DEVICE)
    folder = checkpoint(kind, "calibrated" if static else "w4a4").result()
    tensors = load_file(folder / "model.safetensors", DEVICE)
    compute, seen = (reference_experts, ["w1", "w2"]) if part == EXPERTS else (reference_linear, [part])
    recipe, amax = (PLAIN, [static_amax(name).to(DEVICE) for name in seen]) if static else (fos.Recipe(), [])
    # Gate and up in BF16 differ in their last bit here and there, which flips codes of the experts' second product.
    limits = (1e-3, 1e-2) if part == EXPERTS else (1e-5, 2e-3)
    for name in (f"{layer}.{part}" for layer in LAYERS):
        y, expected = captured[f"{name}/y"], compute(captured, tensors, name, recipe, *amax)
        print(f"{kind} {name}, {way}: calc_diff {calc_diff(y, expected):.2g}")
        assert_close(y, expected, *limits)


@pytest.mark.engine("{kind}: {scheme}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("scheme", "way"),
    [
        ("W4A16", "online"),
        ("W4A16", "modelopt"),
        ("W4A16", "compressed-tensors"),
        ("W4A4", "online"),
        ("W4A4", "compressed-tensors"),
    ],
)
def test_the_same_weights_answer_otherwise(runs: Runs, kind: str, scheme: str, way: str) -> None:
    """Quantized while loading, or spelled as others spell them."""
    served = runs(f"{kind}: {scheme}")
    assert torch.equal(flat(served[way]), flat(served["stored"]))
    assert served[way]["generated"] == served["stored"]["generated"]


# --- graphs and compilers ---


def eager(runs: Runs, kind: str, scheme: str, way: str) -> dict[str, Any]:
    if way.endswith(" by Triton"):
        return runs(f"{kind}: eager by Triton")[scheme]
    return runs(f"{kind}: W4A16")["BF16"] if scheme == "BF16" else runs(f"{kind}: {scheme}")["stored"]


@pytest.mark.engine("{kind}: {way}", "{kind}: W4A16", "{kind}: W4A4")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "way", [*GRAPHS, pytest.param("whole by Triton", marks=pytest.mark.engine("{kind}: eager by Triton"))]
)
def test_graphs_move_answers_more_than_those_of_bf16(
    runs: Runs, emulated: Emulated, kind: str, scheme: str, way: str
) -> None:
    """Where BF16's answers stay the same to the bit, ours have to; compilers round other layers otherwise."""
    stock, stock_agreeing = moved(runs(f"{kind}: {way}")["BF16"], eager(runs, kind, "BF16", way))
    ours, agreeing = moved(runs(f"{kind}: {way}")[scheme], eager(runs, kind, scheme, way))
    limit = 1.5 * stock
    if scheme == "W4A4" and stock > 0:
        limit = 1.3 * rounding(emulated, kind)
    print(
        f"{kind} {scheme}, {way}: moved by {ours:.4f} (limit {limit:.4f}), BF16 by {stock:.4f}; "
        f"{agreeing} tokens agree, BF16's {stock_agreeing}"
    )
    assert ours <= limit
    # Only tokens that agree are compared above.
    assert stock > 0 or agreeing >= 0.8 * stock_agreeing


@pytest.mark.engine("{kind}: compiled")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_long_generation_ends_in_nan(runs: Runs, kind: str, scheme: str) -> None:
    generated = torch.tensor(answered(runs(f"{kind}: compiled")[scheme])["generated"])
    print(f"{kind} {scheme}: logprobs of {tuple(generated.shape)} tokens from {generated.min():.2f}")
    assert generated.shape == (STREAMS, MANY)
    assert generated.isfinite().all()


# --- batches ---


@pytest.mark.engine(f"{{kind}}: {INVARIANT} {{scheme}}", "{kind}: fast W4A16")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["BF16", *SCHEMES])
def test_invariant_answers_depend_on_other_prompts(runs: Runs, kind: str, scheme: str) -> None:
    """To the bit; those of the fastest kernels do."""
    served, fast = (answered(runs(f"{kind}: {way}")[""]) for way in (f"{INVARIANT} {scheme}", "fast W4A16"))
    assert_batch_invariant(f"{kind} {scheme}", "alone", served, fast)
    if scheme != "BF16":
        assert "fouroversix: products are batch-invariant, as VLLM_BATCH_INVARIANT asks" in served["log"]


# --- weights that go and come back, adapters, memory ---


@pytest.mark.engine("{kind}: {way}, again")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["stored", "online"])
def test_weights_that_are_loaded_again_or_slept_are_others(runs: Runs, kind: str, way: str) -> None:
    served = runs(f"{kind}: {way}, again")[""]
    before = flat(served)
    found = {name: torch.tensor(served[name]).flatten() for name in ("forgotten", "reloaded", "woken", "refilled")}
    assert not torch.equal(found["forgotten"], before), "the weights were never gone"
    for name in ("reloaded", "woken", "refilled"):
        assert torch.equal(found[name], before), name


@pytest.mark.engine("small dense: adapted")
def test_an_adapter_is_added_to_other_weights(runs: Runs, checkpoint: Checkpoint) -> None:
    folders = (checkpoint("small dense", form).result() for form in ("bf16", "w4a16", "adapter"))
    assert_adapted(runs("small dense: adapted")[""], *folders, prompts_of(checkpoint, "small dense"))


@pytest.mark.engine("small moe: adapted")
def test_an_adapter_for_experts_is_served(runs: Runs) -> None:
    assert "does not do --enable-lora" in runs("small moe: adapted")[""]["error"]


@pytest.mark.engine("{kind}: W4A16")
@pytest.mark.parametrize("way", ["stored", "online", "modelopt", "compressed-tensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_takes_more_memory_than_its_weights(runs: Runs, kind: str, way: str) -> None:
    memory = answered(runs(f"{kind}: W4A16")[way])["memory"]
    # Beside them: what attention and rotary embeddings keep.
    assert memory["weights"] <= memory["taken"] <= 1.03 * memory["weights"], memory


@pytest.mark.engine("{kind}: online")
@pytest.mark.parametrize("kind", WHOLE)
def test_quantizing_while_loading_takes_more_than_a_layer_and_a_half(
    runs: Runs, checkpoint: Checkpoint, kind: str
) -> None:
    with safe_open(checkpoint(kind, "bf16").result() / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if ".layers.0." in name]  # noqa: SIM118
    layer, memory = 2 * sum(map(math.prod, shapes)), answered(runs(f"{kind}: online")[""])["memory"]
    above = (memory["peak"] - memory["weights"]) / layer
    mib = {name: size / 2**20 for name, size in {**memory, "layer": layer}.items()}
    print(
        f"{kind}: weights {mib['weights']:.0f} MiB, at the peak {mib['peak']:.0f} MiB: {above:.2f} layers of "
        f"{mib['layer']:.0f} MiB more"
    )
    assert above <= 1.5


@pytest.mark.engine("{kind}: online")
@pytest.mark.parametrize("kind", WHOLE)
def test_quantizing_while_loading_takes_long(runs: Runs, kind: str) -> None:
    """By the time of the loading thread, on a machine that is busy with other runs, and with what reading takes."""
    arrived, layers = answered(runs(f"{kind}: online")[""])["arrived"], RANDOM[kind]["num_hidden_layers"]
    # The first layer loads kernels, too.
    first = len(arrived) // layers - 1
    seconds = (arrived[-1] - arrived[first]) / (layers - 1)
    whole, limit = WHOLE[kind]
    print(f"{kind}: {seconds:.2f} s a layer, {whole * seconds:.1f} s for {whole} ({limit} s, were it alone)")
    assert whole * seconds <= 2 * limit


# --- servers ---


@pytest.mark.engine("dense: {config}")
@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_does_not_serve(runs: Runs, config: str) -> None:
    answer = runs(f"dense: {config}")
    print(f"{config}: {answer['text']!r}")
    assert "Paris" in answer["text"]
    assert "fouroversix: loaded 120 layers" in answer["log"]
    scheme = "W4A16" if config == "vllm-w4a16" else "W4A4"
    assert f"fouroversix: linear {scheme} on {DEVICE} by the {DEVICE} backend" in answer["log"]


# --- two GPUs ---

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
SMALL_KINDS = ["small dense", "small moe"]


def moved_by_two(runs: Runs, kind: str, split: str, way: str) -> tuple[float, float]:
    """How far W4A16 lies from one GPU's, and BF16."""
    one, ours, stock = runs(f"{kind}: one"), runs(f"{kind}: {split} {way}")[""], runs(f"{kind}: {split} BF16")[""]
    return moved_beside_bf16(f"{kind}, {split} {way}", (ours, one["W4A16"]), (stock, one["BF16"]))


@needs_two
@pytest.mark.engine("{kind}: two {way}", "{kind}: two BF16", "{kind}: one")
@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, f"{way} W4A16") for kind in SMALL_KINDS for way in ("online", "stored")]
    + [("small moe", "with half of the experts")],
)
def test_two_ranks_move_answers_more_than_those_of_bf16(runs: Runs, kind: str, way: str) -> None:
    ours, stock = moved_by_two(runs, kind, "two", way)
    assert ours < 2 * stock


@needs_two
@pytest.mark.engine("{kind}: two online {scheme}", "{kind}: two stored {scheme}")
@pytest.mark.parametrize("kind", SMALL_KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_ranks_quantize_for_their_own_amax(runs: Runs, kind: str, scheme: str) -> None:
    """With one amax over the ranks, online bytes are slices of the stored ones: not a bit differs."""
    online, stored = (runs(f"{kind}: two {way} {scheme}")[""] for way in ("online", "stored"))
    assert torch.equal(flat(online), flat(stored))


@needs_two
@pytest.mark.engine("{kind}: two in line {way}", "{kind}: two in line BF16", "{kind}: one")
@pytest.mark.parametrize("way", ["online W4A16", "stored W4A16"])
@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_two_stages_move_answers_more_than_those_of_bf16(runs: Runs, kind: str, way: str) -> None:
    ours, stock = moved_by_two(runs, kind, "two in line", way)
    assert ours <= 2 * stock


@needs_two
@pytest.mark.engine("moe: {way}")
@pytest.mark.parametrize("way", REPLICAS)
def test_replicas_do_not_serve(runs: Runs, way: str) -> None:
    answer = runs(f"moe: {way}")
    print(f"{way}: {answer['text']!r}")
    assert "Paris" in answer["text"]
