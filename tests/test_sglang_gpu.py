"""Real SGLang on GPUs, beside this package on the CPU and stock BF16 (run by hand, not in CI; -s shows the figures).

A test names the servers it needs in its `engine` mark. Those of all chosen tests start together, as many at a time as
there are cores: a start takes a minute or more, and -k chooses. What has not answered after --seconds fails; everything
else is judged.
"""

import functools
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Left
from engine_process import plugin_environment
from engines import (
    KINDS,
    LENGTH,
    PATIENCE,
    RECIPES,
    SCHEMES,
    SMALL,
    Checkpoint,
    Emulated,
    all_started,
    assert_batch_invariant,
    assert_w4a4,
    assert_w4a16,
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
    random_model,
    rounding,
    wanted,
)
from sglang_server import ask_server

pytest.importorskip("sglang", reason="SGLang is not installed")
pytest.importorskip("psutil", reason="SGLang brings it")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

Runs = Callable[[str], dict[str, Any]]

TOKENS = 16

# Servers that start together would each take the others' memory for its own: the cache is stated, not measured.
SHARE = ["--max-total-tokens", "8192", "--mem-fraction-static", "0.5"]
BACKENDS = ["--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"]
BARE = ["--skip-tokenizer-init", "--skip-server-warmup", "--dtype", "bfloat16"]
EAGER = ["--disable-cuda-graph"]
# A prompt is a step and has a graph of its size, as has a stream that decodes: no rows pad, whose number orders sums.
GRAPHS = ["--cuda-graph-max-bs-decode", "2", "--cuda-graph-max-bs-prefill", str(LENGTH)]
# By NCCL alone: SGLang's own sums over ranks compile when they first run.
TWO = ["--disable-custom-all-reduce", *EAGER]
# A prompt that was asked before would not be a prompt any more.
UNCACHED = ["--disable-radix-cache"]
INVARIANT = ["--enable-deterministic-inference", *UNCACHED]
W4A16 = ["--json-model-override-args", json.dumps(options("w4a16")["hf_overrides"])]
README = ["--quantization", "nvfp4_4over6", "--moe-runner-backend", "fouroversix"]
COMMAND = "as the README says"


def config(name: str) -> list[str]:
    return ["--config", str(ROOT / "configs" / "serve" / f"sglang-{name}.yaml")]


WAYS: dict[str, tuple[str, list[str]]] = {
    "BF16": ("bf16", EAGER),
    "dequantized": ("dequantized", EAGER),
    "W4A16 graphs": ("w4a16", GRAPHS),
    "W4A4 graphs": ("w4a4", GRAPHS),
    "W4A16 online": ("bf16", [*config("w4a16"), *GRAPHS]),
    "W4A4 online": ("bf16", [*config("hopper"), *GRAPHS]),
    "BF16 graphs": ("bf16", GRAPHS),
    "W4A16": ("w4a16", EAGER),
    "W4A4": ("w4a4", EAGER),
    # Prompts are asked together, too: by one order of sums of whatever else there is in a step, or by the fastest.
    **{f"{scheme} invariant": (scheme.lower(), [*GRAPHS, *INVARIANT]) for scheme in ["BF16", *SCHEMES]},
    "W4A16 fast": ("w4a16", [*GRAPHS, *UNCACHED]),
    "two BF16": ("bf16", ["--tp-size", "2", *TWO]),
    "two with half of the experts": ("w4a16", [*config("experts"), *W4A16, *TWO]),
    COMMAND: ("bf16", README),
}
"""Checkpoint and flags by the way a model is served, in the order in which servers start."""


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """The folder of a model's kind in a form, which is made in the background once it is asked for."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(kind: str, form: str) -> Path:
        target = folder / f"{kind}-{form}"
        if form == "bf16":
            return random_model(SMALL, target)
        if form == "dequantized":
            return dequantized(ask(kind, "w4a16").result(), target)
        return quantized_by_cli(ask(kind, "bf16").result(), target, RECIPES[form])

    with ThreadPoolExecutor() as pool:

        @functools.cache
        def ask(kind: str, form: str) -> Future[Path]:
            if form == "bf16" and kind in KINDS:
                return done(request.getfixturevalue("models")[KINDS.index(kind)])
            if form != "bf16":
                ask(kind, "w4a16" if form == "dequantized" else "bf16")
            return pool.submit(make, kind, form)

        yield ask


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    checkpoint: Checkpoint,
    left: Left,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Runs]:
    """Answers by the name of a run: the kind of model and the way it is served."""
    folder = tmp_path_factory.mktemp("runs")
    environment = [f"{name}={value}" for name, value in plugin_environment(folder).items()]
    # A free port might not be one any more when a server that starts binds to it: others look for theirs meanwhile.
    ports = itertools.count(20000 + os.getpid() % 100 * 100)

    def prepare(kind: str, way: str) -> Callable[[], dict[str, Any]]:
        (form, flags), log = WAYS[way], folder / f"{kind} {way}.log"
        flags = [*flags, *BACKENDS, *SHARE, "--port", str(next(ports)), "--nccl-port", str(next(ports))]
        model = checkpoint(kind, form)
        # `sglang`, wherever its script was installed.
        serve = ["env", *environment, sys.executable, "-c", "from sglang.cli.main import main; main()", "serve"]

        def command(*more: str) -> str:
            return shlex.join([*serve, "--model-path", str(model.result()), *flags, *more])

        if way == COMMAND:
            return lambda: chat_once(command(), "default", log, left)
        asked = prompts_of(checkpoint, kind)
        together = way.endswith((" invariant", " fast"))
        return lambda: ask_server(command(*BARE), log, asked, TOKENS, left, together=together)

    with all_started(request, [*WAYS], prepare, os.cpu_count()) as started:
        yield lambda name: started[name].result(left(PATIENCE))


# --- what is served ---


@pytest.fixture(scope="module")
def emulated(request: pytest.FixtureRequest, checkpoint: Checkpoint, left: Left) -> Iterator[Emulated]:
    """What the CPU path says of a model: while servers start."""
    served = {name.partition(": ")[0] for name in wanted(request)}
    with emulations(checkpoint, left, [kind for kind in KINDS if kind in served]) as ask:
        yield ask


@pytest.mark.engine("{kind}: W4A16 graphs", "{kind}: dequantized", "{kind}: BF16")
@pytest.mark.parametrize("kind", KINDS)
def test_w4a16_is_further_from_the_cpu_path_than_bf16_rounding(runs: Runs, emulated: Emulated, kind: str) -> None:
    served = (flat(runs(f"{kind}: {way}")) for way in ("W4A16 graphs", "dequantized", "BF16"))
    assert_w4a16(emulated, kind, *served)


@pytest.mark.engine("{kind}: W4A4 graphs", "{kind}: W4A16 graphs")
@pytest.mark.parametrize("kind", KINDS)
def test_w4a4_is_further_from_the_cpu_path_than_rounding(runs: Runs, emulated: Emulated, kind: str) -> None:
    ours, far = (flat(runs(f"{kind}: {scheme} graphs")) for scheme in ("W4A4", "W4A16"))
    assert_w4a4(emulated, kind, ours, far)


@pytest.mark.engine("{kind}: {scheme} online", "{kind}: {scheme} graphs")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_config_serves_other_weights_than_those_stored(runs: Runs, kind: str, scheme: str) -> None:
    """Quantized while loading, as a file of configs/serve asks for."""
    online, stored = (runs(f"{kind}: {scheme} {way}") for way in ("online", "graphs"))
    assert torch.equal(flat(online), flat(stored))
    assert online["generated"] == stored["generated"]
    layers = {"dense": 120, "moe": 90}[kind]
    assert f"fouroversix: loaded {layers} layers" in online["log"]
    assert f"fouroversix: {'moe' if kind == 'moe' else 'linear'} {scheme} on cuda by the cuda backend" in online["log"]


@pytest.mark.engine("{kind}: {scheme}", "{kind}: {scheme} graphs", "{kind}: BF16", "{kind}: BF16 graphs")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_graphs_move_answers_more_than_those_of_bf16(runs: Runs, emulated: Emulated, kind: str, scheme: str) -> None:
    """Where BF16's answers stay the same to the bit, ours have to."""
    for step in ("Prefill", "Decode"):
        assert re.search(rf"{step} batch.* cuda graph: True", runs(f"{kind}: {scheme} graphs")["log"])
    stock, _ = moved(runs(f"{kind}: BF16 graphs"), runs(f"{kind}: BF16"))
    ours, agreeing = moved(runs(f"{kind}: {scheme} graphs"), runs(f"{kind}: {scheme}"))
    limit = 2 * stock
    if scheme == "W4A4" and stock > 0:
        limit = 1.3 * rounding(emulated, kind)
    print(f"{kind} {scheme}, graphs: moved by {ours:.4f} (limit {limit:.4f}), BF16 by {stock:.4f}; {agreeing} tokens")
    assert ours <= limit


@pytest.mark.engine("{kind}: {scheme} invariant", "{kind}: W4A16 fast")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["BF16", *SCHEMES])
def test_invariant_answers_depend_on_other_prompts(runs: Runs, kind: str, scheme: str) -> None:
    """To the bit; those of the fastest kernels do."""
    served, fast = runs(f"{kind}: {scheme} invariant"), runs(f"{kind}: W4A16 fast")
    assert_batch_invariant(f"{kind} {scheme}", "together", served, fast)
    if scheme != "BF16":
        assert "fouroversix: products are batch-invariant, as --enable-deterministic-inference asks" in served["log"]


@pytest.mark.engine("{kind}: as the README says")
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_of_the_readme_does_not_serve(runs: Runs, kind: str) -> None:
    answer = runs(f"{kind}: {COMMAND}")
    print(f"{kind}, {COMMAND}: {answer['text']!r}")
    assert "Paris" in answer["text"]
    assert "decode CUDA graph end" in answer["log"]
    assert f"fouroversix: {'moe' if kind == 'moe' else 'linear'} W4A4 on cuda by the cuda backend" in answer["log"]


# --- two GPUs ---


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.engine("small: two with half of the experts", "small: two BF16", "small: W4A16", "small: BF16")
def test_two_ranks_with_half_of_the_experts_move_answers_more_than_those_of_bf16(runs: Runs) -> None:
    both = runs("small: two with half of the experts"), runs("small: W4A16")
    ours, stock = moved_beside_bf16(
        "two ranks with half of the experts", both, (runs("small: two BF16"), runs("small: BF16"))
    )
    assert ours < 2 * stock
