"""Real SGLang on the CPU: what is served is what vLLM serves and the reference says, or it fails before serving.

SGLang has an environment of its own; vLLM runs in this one.
"""

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, assert_close
from engines import SMALL, SMALL_DENSE, add_cache_scales, concatenated, flat, options, random_model, run_engine, stored
from safetensors.torch import load_file, save_file
from sglang_server import ask_server
from transformers import (
    AutoTokenizer,
    FalconH1Config,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Llama4Config,
    PreTrainedConfig,
    StableLmConfig,
)

import fouroversix_plugin as fos
from fouroversix_plugin import reference
from fouroversix_plugin.checkpoint import quantize_checkpoint

SGLANG = ROOT / ".venv-sglang"
OLDER = "0.5.16"
"""Has no registry for MoE runners."""
RELEASES = {"0.5.23": None, "0.5.19": SGLANG / "releases" / "0.5.19", OLDER: SGLANG / "releases" / OLDER}

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/setup.sh installs its CPU build)")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not SGLANG.is_dir(), reason="no .venv-sglang (scripts/test_sglang.sh makes it)"),
]

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome. Both cities are older than the countries they "
    "govern, and each of them lies on a river: Paris on the Seine, Rome on the Tiber.",
    "Once upon a time a farmer had twelve apples. He gave three of them to his daughter and sold four at the market, "
    "so five were left in the basket.",
]
TOKENS = 12
METHOD = ["--quantization", "nvfp4_4over6"]
RUNNER = ["--moe-runner-backend", "fouroversix"]
NO_RADIX = "--disable-radix-cache"
"""What models with states instead of a KV cache need on a CPU."""
TWO = ["--tp", "2"]
CONFIGS = ROOT / "configs" / "serve"
HALVES = ["--config", str(CONFIGS / "sglang-experts.yaml")]
"""Two ranks, each with half of the experts, instead of half of each."""


def asking_for(recipe: str, **more: Any) -> list[str]:
    return ["--json-model-override-args", json.dumps(options(recipe, **more)["hf_overrides"])]


def environment(release: Path | None = None) -> dict[str, str]:
    path = [str(ROOT / "tests" / "stubs"), *([str(release)] if release else [])]
    return {
        "PYTHONPATH": ":".join(path),
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # several servers start at once
    }


def run_python(script: str | Path, *arguments: str, release: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A program in SGLang's environment."""
    variables = [f"{name}={value}" for name, value in environment(release).items()]
    command = ["env", *variables, str(SGLANG / "bin" / "python"), str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def spelled(config: Path) -> list[str]:
    """A file for --config as flags."""
    flags: list[str] = []
    for name, value in yaml.safe_load(config.read_text()).items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags


def served(
    folder: Path,
    name: str,
    model: Path,
    prompts: list[list[int]],
    flags: list[str],
    release: Path | None = None,
    update: Path | None = None,
) -> dict[str, Any]:
    """Logprobs of the prompts and the tokens that follow them, by a server of SGLang's that starts and stops."""
    variables, on_cpu = environment(release), CONFIGS / "sglang-cpu.yaml"
    if TWO[0] in flags or HALVES[0] in flags:
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    command = ["env", *(f"{key}={value}" for key, value in variables.items()), str(SGLANG / "bin" / "python")]
    command += ["-m", "sglang.launch_server", "--model-path", str(model), "--skip-server-warmup"]
    # SGLang reads one file: beside another, flags stand for the one of CPUs.
    command += [*(spelled(on_cpu) if HALVES[0] in flags else ["--config", str(on_cpu)]), *flags]
    return ask_server(shlex.join(command), folder / f"{name}.log", prompts, TOKENS, update=update)


# --- servers, beside vLLM's answers for the same checkpoints ---

SHARED = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
SMALL_PROMPTS = [[1, 504, 575, 282, 649, 314, 742, 5, 9, 100]]
LAYER = "model.layers.1"
EXPERTS = f"{LAYER}.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `bf16`, `w4a16` and `w4a4`: a random Mixtral whose four heads split over two ranks.

    And `shared`, in W4A16: experts beside one that all tokens share, and a factor on the routed ones.
    """
    folder = tmp_path_factory.mktemp("small")
    random_model(SMALL, folder / "bf16")
    quantize_checkpoint(folder / "bf16", folder / "w4a16", fos.preset("w4a16"))
    quantize_checkpoint(folder / "bf16", folder / "w4a4", fos.preset("nvfp4_4over6"))
    Glm4MoeForCausalLM(Glm4MoeConfig(**SHARED)).to(torch.bfloat16).save_pretrained(folder / "shared-bf16")
    quantize_checkpoint(folder / "shared-bf16", folder / "shared", fos.preset("w4a16"))
    return folder


@pytest.fixture(scope="module")
def answers(
    models: tuple[Path, Path], small: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Every server's answers, and vLLM's."""
    folder = tmp_path_factory.mktemp("servers")
    dense, moe = models
    stored_moe = folder / "moe-w4a16"
    quantize_checkpoint(moe, stored_moe, fos.preset("w4a16"))
    tokenizer = AutoTokenizer.from_pretrained(dense)
    texts: list[list[int]] = [tokenizer(text)["input_ids"] for text in TEXTS]
    bare = ["--skip-tokenizer-init", "--dtype", "bfloat16"]
    # In BF16 the unquantized model's logprobs, too, differ between the engines: by 0.04 in the mean.
    exact = ["--dtype", "float32"]
    jobs: dict[str, tuple[Any, ...]] = {
        "dense": (dense, texts, [*METHOD, *exact, *asking_for("w4a16")]),
        "dense W4A4": (dense, texts, [*METHOD, *exact]),
        "moe": (stored_moe, texts, [*METHOD, *RUNNER, *exact], None, moe),
        "moe, older SGLang": (stored_moe, texts, [*METHOD, *RUNNER, *exact], RELEASES[OLDER], moe),
        "shared": (small / "shared", SMALL_PROMPTS, ["--skip-tokenizer-init", *exact]),
        "two online": (small / "bf16", SMALL_PROMPTS, [*bare, *TWO, *asking_for("w4a16"), *RUNNER]),
        "two stored": (small / "w4a16", SMALL_PROMPTS, [*bare, *TWO]),
        "two with experts": (small / "w4a16", SMALL_PROMPTS, [*bare, *HALVES]),
        "two with experts online": (small / "bf16", SMALL_PROMPTS, [*bare, *HALVES, *asking_for("w4a16")]),
    }
    full = {"dtype": "float32"}
    vllm: dict[str, dict[str, Any]] = {
        "dense": {"model": str(dense), "options": options("w4a16") | full, "tokens": TOKENS},
        "dense W4A4": {"model": str(dense), "options": {"quantization": "nvfp4_4over6"} | full},
        "moe": {"model": str(stored_moe), "options": full, "tokens": TOKENS},
    }
    small_vllm: dict[str, dict[str, Any]] = {
        "one": {"model": str(small / "w4a16")},
        "shared": {"model": str(small / "shared"), "options": full, "tokens": TOKENS},
    }
    for name in ("texts", "small"):
        (folder / name).mkdir()
    # Most of a start is one thread that imports.
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(served, folder, name, *job) for name, job in jobs.items()}
        other = pool.submit(run_engine, folder / "texts", vllm, texts)
        few = pool.submit(run_engine, folder / "small", small_vllm, SMALL_PROMPTS)
        results = {name: future.result() for name, future in running.items()}
        return results | {f"vLLM's {name}": result for name, result in (other.result() | few.result()).items()}


@pytest.mark.parametrize(
    ("name", "theirs"), [("dense", "dense"), ("moe", "moe"), ("moe, older SGLang", "moe"), ("shared", "shared")]
)
def test_a_w4a16_server_answers_otherwise_than_vllm(answers: dict[str, Any], name: str, theirs: str) -> None:
    difference = (flat(answers[name]) - flat(answers[f"vLLM's {theirs}"])).abs()
    print(f"{name}: logprobs differ from vLLM's by {difference.mean():.2g}, at most {difference.max():.2g}")
    assert difference.max() < 1e-3
    assert answers[name]["tokens"] == answers[f"vLLM's {theirs}"]["tokens"]


def test_a_w4a4_server_answers_unlike_vllm(answers: dict[str, Any]) -> None:
    """The engines' last bits differ, which flips codes of quantized activations here and there, and these add up.

    To how much depends on the processor: to 0.55 of what quantizing does on an AMD EPYC, to less than 0.4 on a Xeon.
    """
    difference = (flat(answers["dense W4A4"]) - flat(answers["vLLM's dense W4A4"])).abs()
    print(f"W4A4: logprobs differ from vLLM's by {difference.mean():.2g}, at most {difference.max():.2g}")
    quantized = (flat(answers["dense W4A4"]) - flat(answers["dense"])).abs()
    assert difference.mean() < 0.75 * quantized.mean()


@pytest.mark.parametrize("way", ["two online", "two stored", "two with experts"])
def test_two_ranks_answer_otherwise_than_one(answers: dict[str, Any], way: str) -> None:
    assert (flat(answers[way]) - flat(answers["vLLM's one"])).abs().max() < 0.06


def test_two_ranks_quantize_for_their_own_amax(answers: dict[str, Any]) -> None:
    """With one amax over the ranks, online bytes are slices of the stored ones: not a bit differs."""
    assert torch.equal(flat(answers["two online"]), flat(answers["two stored"]))
    assert torch.equal(flat(answers["two with experts online"]), flat(answers["two with experts"]))


@pytest.mark.parametrize("name", ["moe", "moe, older SGLang"])
def test_new_weights_end_a_server(answers: dict[str, Any], name: str) -> None:
    """It answers prompts before and after it is asked to load some as vLLM does."""
    assert answers[name]["update"]["success"] is False
    assert "got new weights for a running server" in answers[name]["update"]["message"]


def test_the_log_does_not_say_what_was_loaded(answers: dict[str, Any]) -> None:
    for name in ("dense", "dense W4A4"):
        summary = "fouroversix: loaded 120 layers, 106168320 weights, 4.500 bits per weight, 45."
        assert summary in answers[name]["log"]
    # Attention's two and the experts of each of 30 layers: fused, not one layer for each of 48 expert weights.
    assert all("fouroversix: loaded 90 layers" in answers[name]["log"] for name in ("moe", "moe, older SGLang"))
    assert "fouroversix: moe W4A16 on cpu" in answers["moe"]["log"]


# --- what is loaded and computed, layer by layer, and what is refused ---

O_PROJ, K_PROJ = f"{LAYER}.self_attn.o_proj", f"{LAYER}.self_attn.k_proj"
QKV = f"{LAYER}.self_attn.qkv_proj"
LAYERS = [QKV, O_PROJ, EXPERTS]
Tensors = dict[str, torch.Tensor]

BAD_TENSORS: dict[str, tuple[str, Callable[[Tensors], Any], tuple[str, ...]]] = {
    "no packed weight": ("w4a16", lambda t: t.pop(f"{O_PROJ}.weight"), ("o_proj.weight: got nothing",)),
    "no decode scale of one shard": (
        "w4a16",
        lambda t: t.pop(f"{K_PROJ}.weight_scale_2"),
        ("qkv_proj.weight_scale_2: got nothing",),
    ),
    "no packed weight of one expert": ("w4a16", lambda t: t.pop(f"{EXPERTS}.2.w3.weight"), ("experts", "got nothing")),
    "no full-precision shard": ("bf16", lambda t: t.pop(f"{K_PROJ}.weight"), ("qkv_proj.weight: got nothing",)),
    "no full-precision expert": ("bf16", lambda t: t.pop(f"{EXPERTS}.0.w2.weight"), ("experts", "got nothing")),
    "NaN in a weight": (
        "bf16",
        lambda t: t[f"{O_PROJ}.weight"].__setitem__((3, 5), torch.nan),
        ("o_proj.weight: got 1 NaN or infinite values, the first at (3, 5)",),
    ),
    "too short": (
        "w4a16",
        lambda t: t.update({f"{O_PROJ}.weight": t[f"{O_PROJ}.weight"][:-8].contiguous()}),
        ("o_proj.weight: got shape (248, 128), needed (256, 128)",),
    ),
    "too short in full precision": (
        "bf16",
        lambda t: t.update({f"{K_PROJ}.weight": t[f"{K_PROJ}.weight"][:-8].contiguous()}),
        ("qkv_proj.weight: got shape (120, 256), needed (128, 256)",),
    ),
    "an expert too short": (
        "w4a16",
        lambda t: t.update({f"{EXPERTS}.1.w1.weight": t[f"{EXPERTS}.1.w1.weight"][:-8].contiguous()}),
        ("experts (w13_*).weight: got shape (120, 128), needed (128, 128)",),
    ),
    "full precision where packed is needed": (
        "w4a16",
        lambda t: t.update({f"{O_PROJ}.weight": torch.zeros(256, 256, dtype=torch.bfloat16)}),
        ("o_proj.weight: got torch.bfloat16, needed torch.uint8", "`ignore`"),
    ),
    "packed where full precision is needed": (
        "bf16",
        lambda t: t.update({f"{O_PROJ}.weight": torch.zeros(256, 128, dtype=torch.uint8)}),
        ("o_proj.weight: got torch.uint8, needed one of torch.bfloat16",),
    ),
}

REFUSED: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "another runner": (
        "bf16",
        [*METHOD, "--moe-runner-backend", "triton"],
        ("experts: got --moe-runner-backend triton", "needed fouroversix"),
    ),
    "tokenizer workers": (
        "bf16",
        [*METHOD, "--tokenizer-worker-num", "2"],
        ("--tokenizer-worker-num: got 2, needed 1",),
    ),
    "unknown preset": ("bf16", asking_for("mystery"), ("recipe: got 'mystery'", "'w4a16'")),
    "other weights than stored": ("w4a16", asking_for("nvfp4"), ("weights were quantized with mse 256 amax",)),
    "random bytes for stored weights": ("w4a16", ["--load-format", "dummy"], ("got --load-format dummy",)),
    "part of a fused layer ignored": (
        "bf16",
        asking_for("w4a16", ignore=["*.q_proj"]),
        ("qkv_proj: `ignore` matches", "all of its parts or none"),
    ),
    "K not in whole blocks": (
        "bf16",
        ["--json-model-override-args", json.dumps({"intermediate_size": 136}), *METHOD],
        ("experts", "got 136, needed a multiple of 16", "`ignore`"),
    ),
}


# What SGLang's class of a model does with packed weights shows in its configuration alone: it fails when it is built.
FORMS: dict[str, dict[str, Any]] = {
    "ours": fos.preset("w4a16").to_dict(),
    "ModelOpt's": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "compressed-tensors'": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {}}},
    },
    "fouroversix's": {"quant_method": "fouroversix"},
}
TINY = {"num_hidden_layers": 1, "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
LLAMA4 = Llama4Config(
    architectures=["Llama4ForConditionalGeneration"],
    text_config={**TINY, **HEADS, "intermediate_size_mlp": 256, "num_local_experts": 2, "moe_layers": []},
    vision_config={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2},
)
FALCON = FalconH1Config(
    architectures=["FalconH1ForCausalLM"],
    **{**TINY, **HEADS, "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 32},
)
STABLE = StableLmConfig(architectures=["StableLmForCausalLM"], **TINY, num_attention_heads=2, num_key_value_heads=2)
GLM = Glm4MoeConfig(architectures=["Glm4MoeForCausalLM"], **SHARED)

UNSERVED: dict[str, tuple[PreTrainedConfig, str, tuple[str, ...]]] = {
    **{
        f"attention of Llama 4 in {form} form": (
            LLAMA4,
            form,
            ("language_model.model.layers.0.self_attn.qkv_proj: got packed", "--ignore '*.self_attn.[qkv]_proj'"),
        )
        for form in FORMS
    },
    "Mamba of Falcon-H1": (FALCON, "ours", ("model.layers.0.mamba.in_proj: got packed", "--ignore '*.mamba.*'")),
    "attention of StableLM": (STABLE, "ours", ("self_attn.q_proj: got packed", "--ignore '*.self_attn.*'")),
    "shared experts of GLM 4.5 that compressed-tensors packed": (
        GLM,
        "compressed-tensors'",
        ("model.layers.1.mlp.shared_experts.gate_up_proj: got packed", "--ignore '*.shared_experts.*'"),
    ),
}


def described(folder: Path, config: PreTrainedConfig, form: str) -> Path:
    """A quantized checkpoint without its tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "quantization_config": FORMS[form]}))
    return folder


def with_head(small: Path) -> Path:
    """The random GLM-4 MoE with a head for multi-token prediction, one more layer."""
    folder = small / "head-bf16"
    shutil.copytree(small / "shared-bf16", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if "layers.2." in name}
    size = SHARED["hidden_size"]
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(size, 2 * size, dtype=torch.bfloat16)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"model.layers.3.{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    return folder


def granite(small: Path) -> Path:
    """A random Granite 4, in W4A16, whose layers are all of attention and experts."""
    sizes = {**TINY, "num_attention_heads": 2, "num_key_value_heads": 2, "shared_intermediate_size": 256}
    config = GraniteMoeHybridConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, layer_types=["attention"])
    GraniteMoeHybridForCausalLM(config).to(torch.bfloat16).save_pretrained(small / "granite-bf16")
    quantize_checkpoint(small / "granite-bf16", small / "granite", fos.preset("w4a16"))
    return small / "granite"


def changed(small: Path, name: str, base: str, change: Callable[[Tensors], Any]) -> Path:
    folder = small / name
    folder.mkdir()
    (folder / "config.json").write_bytes((small / base / "config.json").read_bytes())
    tensors = load_file(small / base / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def as_modelopt(small: Path) -> Path:
    """A W4A4 export of ModelOpt as it was before config.json knew of it."""
    folder = changed(small, "modelopt", "w4a16", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    ignore = config.pop("quantization_config")["ignore"]
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ignore}
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": settings})
    )
    return folder


@pytest.fixture(scope="module")
def loaded(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of tests/sglang_worker.py, with `folder`, where captured tensors lie."""
    random_model(SMALL_DENSE, small / "dense-bf16")
    quantize_checkpoint(small / "dense-bf16", small / "dense", fos.preset("w4a16"))
    jobs: dict[str, dict[str, Any]] = {
        "stored W4A4": {"model": small / "w4a4", "layers": LAYERS},
        "online W4A4": {"model": small / "bf16", "flags": [*METHOD, *RUNNER], "layers": LAYERS},
        "modelopt": {"model": as_modelopt(small), "flags": METHOD, "layers": LAYERS},
        "modelopt W4A16": {"model": small / "modelopt", "flags": asking_for("w4a16"), "layers": LAYERS},
        "cache in FP8": {
            "model": changed(small, "cache", "dense", lambda tensors: add_cache_scales(tensors, 0.25, 0.5)),
            "flags": ["--kv-cache-dtype", "fp8_e4m3"],
        },
        "cache in BF16": {"model": small / "cache"},
        # Of attention that SGLang lets be deterministic; none of it runs here.
        "invariant": {
            "model": small / "w4a4",
            "flags": ["--attention-backend", "triton", "--enable-deterministic-inference"],
            "layers": LAYERS,
        },
        "dummy": {"model": small / "bf16", "flags": [*METHOD, "--load-format", "dummy"]},
        "ignoring": {
            "model": small / "bf16",
            "flags": asking_for("w4a16", ignore=["lm_head", "model.layers.0.self_attn.[qkv]_proj", "*.1.*.experts.*"]),
        },
    }
    head, stored_head = with_head(small), small / "head"
    quantize_checkpoint(head, stored_head, fos.preset("w4a16"), format="modelopt")
    jobs |= {
        "Granite": {"model": granite(small), "flags": [NO_RADIX]},
        "a head": {"model": stored_head, "draft": stored_head, "flags": METHOD},
        "a head online": {"model": head, "draft": head, "flags": METHOD},
        "a draft model": {"model": stored_head, "draft": small / "w4a16", "flags": METHOD},
        "itself": {"model": small / "w4a16", "draft": small / "w4a16"},
    }
    for number, (name, (config, form, _)) in enumerate(UNSERVED.items()):
        jobs[name] = {"model": described(small / f"described-{number}", config, form), "flags": [*METHOD, NO_RADIX]}
    for number, (name, (base, change, _)) in enumerate(BAD_TENSORS.items()):
        flags = METHOD if base == "bf16" else []
        jobs[name] = {"model": changed(small, f"tensor-{number}", base, change), "flags": flags}
    jobs |= {name: {"model": small / base, "flags": flags} for name, (base, flags, _) in REFUSED.items()}
    folder = tmp_path_factory.mktemp("loaded")
    request, out = folder / "request.json", folder / "results.json"
    request.write_text(json.dumps(jobs, default=str))
    done = run_python(ROOT / "tests" / "sglang_worker.py", str(request), str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return {"folder": folder, **json.loads(out.read_text())}


def captured(loaded: dict[str, Any], job: str) -> Tensors:
    assert "error" not in loaded[job], loaded[job]["error"]
    return load_file(loaded["folder"] / f"{job}.safetensors")


@pytest.mark.parametrize("job", ["online W4A4", "modelopt", "invariant"])
def test_the_same_weights_compute_something_else(loaded: dict[str, Any], job: str) -> None:
    ours, theirs = captured(loaded, "stored W4A4"), captured(loaded, job)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_sglangs_switch_for_batch_invariance_is_passed_over(loaded: dict[str, Any]) -> None:
    line = "fouroversix: products are batch-invariant, as --enable-deterministic-inference asks"
    assert [name for name, job in loaded.items() if name != "folder" and line in job.get("log", ())] == ["invariant"]


@pytest.mark.parametrize(
    ("job", "activations"), [("stored W4A4", fos.Recipe()), ("modelopt W4A16", None)], ids=["W4A4", "W4A16"]
)
def test_a_layer_is_not_the_reference(
    small: Path, loaded: dict[str, Any], job: str, activations: fos.Recipe | None
) -> None:
    tensors, seen = load_file(small / "w4a4" / "model.safetensors"), captured(loaded, job)
    for layer, parts in ((QKV, ("q_proj", "k_proj", "v_proj")), (O_PROJ, ("o_proj",))):
        weights = [stored(tensors, f"{LAYER}.self_attn.{part}") for part in parts]
        expected = torch.cat([reference.linear(seen[f"{layer}/x"], w, activations) for w in weights], dim=-1)
        assert_close(seen[f"{layer}/y"], expected, diff=1e-5, ratio=2e-3)
    experts = [[stored(tensors, f"{EXPERTS}.{e}.{w}") for w in ("w1", "w3", "w2")] for e in range(4)]
    w13 = fos.NVFP4Tensor.stack([concatenated(w1, w3) for w1, w3, _ in experts])
    w2 = fos.NVFP4Tensor.stack([w2 for _, _, w2 in experts])
    x, y, weights, ids = (seen[f"{EXPERTS}/{name}"] for name in ("x", "y", "topk_weights", "topk_ids"))
    assert (ids == -1).any(), "an expert of another rank was not exercised"
    assert_close(y, reference.moe(x, w13, w2, weights, ids, activations), diff=1e-3, ratio=1e-2)
    assert_close(seen[f"{EXPERTS}/scaled"], 2.5 * y, diff=1e-5, ratio=1e-2)
    each = seen[f"{EXPERTS}/each"]
    assert each.shape == (*ids.shape, x.shape[1])
    assert_close((each.float() * weights.unsqueeze(-1)).sum(1), y, diff=1e-4, ratio=1e-2)
    on_input = reference.moe(x, w13, w2, weights[:, :1], ids[:, :1], activations, "silu", True)
    assert_close(seen[f"{EXPERTS}/on_input"], on_input, diff=1e-3, ratio=1e-2)


def test_online_loading_holds_the_whole_model_in_full_precision(loaded: dict[str, Any]) -> None:
    # Experts and attention of a layer, whose tensors come mixed.
    captured(loaded, "online W4A4")
    assert loaded["online W4A4"]["most_held"] <= 3


def test_random_weights_for_benchmarks_are_taken_for_an_incomplete_checkpoint(loaded: dict[str, Any]) -> None:
    assert "error" not in loaded["dummy"], loaded["dummy"]["error"]


def test_scales_of_a_cache_in_fp8_are_dropped(loaded: dict[str, Any]) -> None:
    in_fp8, in_bf16 = loaded["cache in FP8"], loaded["cache in BF16"]
    assert in_fp8.get("cache") == [[0.25, 0.5]] * SMALL_DENSE["num_hidden_layers"], in_fp8
    assert in_bf16.get("cache") == [], in_bf16


def test_ignore_list_leaves_out_other_layers(loaded: dict[str, Any]) -> None:
    """One of two qkv by its checkpoint names, the experts of the other layer: four of six layers remain."""
    assert any("loaded 4 layers," in line for line in loaded["ignoring"]["log"]), loaded["ignoring"]


def test_a_model_that_asks_what_others_do_not_does_not_load(loaded: dict[str, Any]) -> None:
    """Granite 4: for scales of the KV cache, and whether an expert was loaded."""
    assert any("loaded 5 layers," in line for line in loaded["Granite"]["log"]), loaded["Granite"]


@pytest.mark.parametrize("head", ["a head", "a head online"])
def test_a_head_for_multi_token_prediction_is_taken_for_quantized(loaded: dict[str, Any], head: str) -> None:
    assert not any("loaded" in line for line in loaded[head]["log"]), loaded[head]


@pytest.mark.parametrize("draft", ["a draft model", "itself"])
def test_another_draft_model_is_taken_for_a_head(loaded: dict[str, Any], draft: str) -> None:
    assert any("loaded 6 layers," in line for line in loaded[draft]["log"]), loaded[draft]


@pytest.mark.parametrize("name", [*BAD_TENSORS, *REFUSED, *UNSERVED])
def test_sglang_serves_what_it_must_refuse(loaded: dict[str, Any], name: str) -> None:
    assert "error" in loaded[name], "it was served"
    for needle in (BAD_TENSORS | REFUSED | UNSERVED)[name][2]:
        assert needle in loaded[name]["error"]


# --- other releases ---


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What tests/sglang_release.py prints in a release, whose version is added as `needed`."""
    done = run_python(ROOT / "tests" / "sglang_release.py", release=RELEASES[request.param])
    assert done.returncode == 0, done.stderr[-3000:]
    return {"needed": request.param, **json.loads(done.stdout.splitlines()[-1])}


def test_a_release_does_not_take_the_plugin(release: dict[str, Any]) -> None:
    assert release["version"] == release["needed"]
    assert release["registered"] == ["FourOverSixConfig", "fouroversix"]


def test_parts_that_sglang_fuses_are_quantized_although_ignored(release: dict[str, Any]) -> None:
    assert release["ignored"] == dict.fromkeys(release["ignored"], "UnquantizedLinearMethod")


def test_an_ignore_list_in_the_checkpoints_names_ignores_nothing(release: dict[str, Any]) -> None:
    assert release["renamed"] == {"language_model.model": True, "model.language_model": True, "visual": False}


def test_a_shared_expert_that_is_ignored_is_quantized_with_the_others(release: dict[str, Any]) -> None:
    for name, refusal in release["shared"].items():
        assert f"`ignore` matches 'model.layers.0.mlp.{name}', which SGLang fuses" in refusal


def test_a_release_loads_new_weights_into_prepared_ones(release: dict[str, Any]) -> None:
    """By each of its ways to do so; into a model without any of ours it may."""
    assert {"update_weights_from_disk", "update_weights_from_tensor"} <= release["updates"].keys()
    refusal = "layer 7: got new weights for a running server, which nvfp4_4over6 does not take; restart it"
    assert [*release["updates"].values()] == [[[False, refusal], "went on"]] * len(release["updates"])
