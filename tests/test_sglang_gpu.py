"""Real SGLang on GPUs: quantized models answer as their dequantized weights do (run by hand, not in CI)."""

import functools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from engines import dequantized, flat, options, random_model
from sglang_server import ask_server

import fouroversix_plugin as fos
from fouroversix_plugin.checkpoint import quantize_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

Answers = Callable[[str], dict[str, Any]]
CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PROMPTS = [[1, 504, 575, 282, 649, 314, 742, 5, 9, 100], [3, 900, 2, 17, 44, 1001, 512, 77]]
TOKENS = 8
FLAGS = "--skip-tokenizer-init --dtype bfloat16 --mem-fraction-static 0.3 --grammar-backend none --skip-server-warmup"
EAGER = ["--disable-cuda-graph"]
HOPPER = ["--config", str(ROOT / "configs" / "serve" / "sglang-hopper.yaml")]
WEIGHT_ONLY = ["--config", str(ROOT / "configs" / "serve" / "sglang-w4a16.yaml")]
TWO = ["--config", str(ROOT / "configs" / "serve" / "sglang-experts.yaml")]
BACKENDS = ["--attention-backend", "triton", "--sampling-backend", "pytorch"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("sglang")
    jobs: dict[str, tuple[Path, list[str]]] = {}
    for kind in ("dense", "moe"):
        source, w4a16, w4a4 = (folder / f"{kind}-{name}" for name in ("bf16", "w4a16", "w4a4"))
        random_model(CONFIG if kind == "dense" else CONFIG | EXPERTS, source)
        quantize_checkpoint(source, w4a16, fos.preset("w4a16"))
        quantize_checkpoint(source, w4a4, fos.preset("nvfp4_4over6"))
        jobs |= {
            f"{kind} full precision": (source, [*BACKENDS, *EAGER]),
            f"{kind} dequantized": (dequantized(w4a16, folder / f"{kind}-dequantized"), [*BACKENDS, *EAGER]),
            f"{kind} stored": (w4a16, [*BACKENDS, *EAGER]),
            f"{kind} online": (source, [*WEIGHT_ONLY, *BACKENDS, *EAGER]),
            f"{kind} online W4A4": (source, [*HOPPER, *EAGER]),
            f"{kind} stored W4A4": (w4a4, [*HOPPER, *EAGER]),
            f"{kind} stored, CUDA graphs": (w4a16, [*BACKENDS, "--cuda-graph-max-bs-decode", "4"]),
        }
    if torch.cuda.device_count() > 1:
        override = ["--json-model-override-args", json.dumps(options("w4a16")["hf_overrides"])]
        jobs["moe two with experts"] = (folder / "moe-w4a16", [*TWO, *override, *BACKENDS, *EAGER])
    command = [sys.executable, "-m", "sglang.launch_server", *FLAGS.split()]

    # Started when first asked for: a start takes a minute or more, and -k chooses.
    @functools.cache
    def answer(name: str) -> dict[str, Any]:
        model, flags = jobs[name]
        return ask_server(
            shlex.join([*command, "--model-path", str(model), *flags]), folder / f"{name}.log", PROMPTS, TOKENS
        )

    return answer


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("way", ["stored", "stored, CUDA graphs"])
def test_w4a16_is_far_from_the_dequantized_weights(answers: Answers, kind: str, way: str) -> None:
    exact = flat(answers(f"{kind} dequantized"))
    distance = (flat(answers(f"{kind} {way}")) - exact).abs().mean()
    quantization = (flat(answers(f"{kind} full precision")) - exact).abs().mean()
    print(f"{kind} {way}: {distance:.4f} from the dequantized weights, which are {quantization:.4f} from BF16")
    # Experts: BF16 rounding of the router flips a token's expert now and then.
    assert distance < 0.3 * quantization


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("scheme", ["", " W4A4"])
def test_online_and_stored_weights_give_other_logprobs(answers: Answers, kind: str, scheme: str) -> None:
    assert torch.equal(flat(answers(f"{kind} online{scheme}")), flat(answers(f"{kind} stored{scheme}")))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_ranks_with_half_of_the_experts_answer_otherwise_than_one(answers: Answers) -> None:
    exact = flat(answers("moe stored"))
    quantization = (flat(answers("moe full precision")) - exact).abs().mean()
    assert (flat(answers("moe two with experts")) - exact).abs().mean() < 0.3 * quantization


def test_the_log_does_not_say_who_ran_the_experts(answers: Answers) -> None:
    assert "fouroversix: moe W4A4 on cuda" in answers("moe online W4A4")["log"]
    assert "fouroversix: loaded 9 layers" in answers("moe online W4A4")["log"]
