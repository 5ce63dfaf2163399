"""What the tests of engines share: small models, runs in a process of its own, and what their results are held to."""

import asyncio
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Left
from divergence_scores import Document
from engine_process import end_group, plugin_environment
from safetensors.torch import load_file, save_file
from server_client import Client
from server_process import serving

import fouroversix_plugin as fos
from fouroversix_plugin import reference

# A random Mixtral whose four heads split over two ranks.
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
SMALL_DENSE = {name: value for name, value in SMALL.items() if "experts" not in name}

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What engines merge, by the names in checkpoints."""
PLAIN = fos.Recipe(adaptive=False, scale_max=448)
RECIPES = {"w4a16": "w4a16", "w4a4": "nvfp4_4over6"}
"""Presets by the form of a checkpoint."""
SCHEMES = ["W4A16", "W4A4"]

# What the tests of engines on GPUs share.
KINDS = ["dense", "moe"]
"""SmolLM2 and its form with experts; models of any other kind are random."""
STREAMS, LENGTH = 32, 64
PATIENCE = 20
"""Seconds for runs to end themselves, once none are left."""

Checkpoint = Callable[[str, str], Future[Path]]
"""The folder of a model's kind in a form."""
Emulated = Callable[..., torch.Tensor]
"""Logprobs of a kind and a scheme, with all that is not quantized in fp32 or another dtype."""


def options(recipe: str, **more: Any) -> dict[str, Any]:
    """LLM arguments that ask for a preset the way --hf-overrides does."""
    return {"hf_overrides": {"quantization_config": {"quant_method": "nvfp4_4over6", "recipe": recipe, **more}}}


def add_cache_scales(tensors: dict[str, torch.Tensor], k: float, v: float) -> None:
    """Those of a KV cache in FP8, as NVIDIA's checkpoints hold them: beside the weights of k_proj and v_proj."""
    for name in list(tensors):
        for which, scale in (("k", k), ("v", v)):
            if name.endswith(f".{which}_proj.weight"):
                tensors[f"{name.removesuffix('weight')}{which}_scale"] = torch.tensor(scale)


def random_model(config: Mapping[str, Any], folder: Path, device: str = "cpu") -> Path:
    """A random Llama in BF16, or a Mixtral where the config has experts; ``device`` is where it is made."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = (
            MixtralForCausalLM(MixtralConfig(**config))
            if "num_local_experts" in config
            else LlamaForCausalLM(LlamaConfig(**config))
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def random_mamba(folder: Path) -> Path:
    """A random Mamba-2 in BF16 whose one group two ranks share: a loader of its own gives both a copy."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 256, "num_heads": 8, "head_dim": 64, "state_size": 16, "n_groups": 1}
    config = Mamba2Config(**sizes, num_hidden_layers=2, chunk_size=16, initializer_range=0.1)
    Mamba2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def random_adapter(folder: Path, rank: int) -> Path:
    """A LoRA adapter for attention of a model of SMALL's sizes."""
    tensors: dict[str, torch.Tensor] = {}
    modules = {"q_proj": 256, "v_proj": 128, "o_proj": 256}
    for layer, (name, rows) in itertools.product(range(2), modules.items()):
        module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, 256) / 16
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank) / 8
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [*modules], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def wanted(request: pytest.FixtureRequest) -> set[str]:
    """The runs that the chosen tests of a file name in their `engine` marks."""
    return {
        name.format(**item.callspec.params if hasattr(item, "callspec") else {})
        for item in request.session.items
        if item.path == request.path
        for mark in item.iter_markers("engine")
        for name in mark.args
    }


def done(path: Path) -> Future[Path]:
    future: Future[Path] = Future()
    future.set_result(path)
    return future


def prompts_of(checkpoint: Checkpoint, kind: str) -> list[list[int]]:
    """English for a model that knows it, else anything."""
    return _prompts(checkpoint(kind, "bf16").result() if kind in KINDS else None)


@functools.cache
def _prompts(source: Path | None) -> list[list[int]]:
    if source is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(SMALL["vocab_size"], (STREAMS * LENGTH,), generator=generator)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source)
        ids = torch.tensor(tokenizer((ROOT / "LICENSE").read_text())["input_ids"][: STREAMS * LENGTH])
    return ids.view(STREAMS, LENGTH).tolist()


@contextmanager
def all_started(
    request: pytest.FixtureRequest,
    order: Sequence[str],
    prepare: Callable[[str, str], Callable[[], dict[str, Any]]],
    at_a_time: int | None,
) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """The runs that chosen tests name as "KIND: WAY", by that name, begun in the order of their ways; those of "two"
    ranks where there are two GPUs. ``prepare`` says of a kind and a way what a thread then does.
    """
    names = sorted((name.split(": ") for name in wanted(request)), key=lambda name: (order.index(name[1]), name[0]))
    with ThreadPoolExecutor(at_a_time) as pool:
        started: dict[str, Future[dict[str, Any]]] = {}
        try:
            for kind, way in names:
                if not way.startswith("two") or torch.cuda.device_count() > 1:
                    started[f"{kind}: {way}"] = pool.submit(prepare(kind, way))
            yield started
        finally:
            for future in started.values():
                future.cancel()
            kill_children()


def chat_once(command: str, model: str, log: Path, left: Left) -> dict[str, Any]:
    """What a server says of France, and its log."""
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": model, "messages": [question], "temperature": 0, "max_tokens": 16}

    async def ask() -> dict[str, Any]:
        async with (
            serving(command, log, left()) as server,
            Client(server.base_url, check_alive=server.check_alive) as client,
            asyncio.timeout(left()),
        ):
            return await client.post("chat/completions", body)

    reply = asyncio.run(ask())
    return {"text": reply["choices"][0]["message"]["content"], "log": log.read_text()}


def kill_children() -> None:
    """All processes that tests have started and that still run."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            # Python's own, which ends with us, complains of what others then do not find.
            if "resource_tracker" not in " ".join(process.cmdline()):
                process.kill()


def run_engine(
    folder: Path,
    jobs: dict[str, dict[str, Any]],
    prompts: list[list[int]],
    documents: Sequence[Document] = (),
    limit: float = 1800,
    **environment: str,
) -> dict[str, Any]:
    """Results of the jobs as ``vllm_worker.py`` writes them; its process and their children have ``limit`` seconds.

    What a process that ended too early did not come to has an error as its result.
    """
    request, out, log = (folder / name for name in ("request.json", "results.json", "worker.log"))
    request.write_text(json.dumps({"prompts": prompts, "documents": documents, "jobs": jobs}))
    command = [sys.executable, str(ROOT / "tests" / "vllm_worker.py"), str(request), str(out)]
    environment = os.environ | plugin_environment(folder) | environment
    with log.open("wb") as said:
        worker = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        ended = f"status {worker.wait(limit)}"
    except subprocess.TimeoutExpired:
        ended = f"{limit:.0f} s were over"
    finally:
        end_group(worker)
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    unfinished = {"error": f"no result ({ended}): {log.read_text(errors='replace')[-3000:]}"}
    return dict.fromkeys(jobs, unfinished) | results


def quantized_by_cli(source: Path, target: Path, recipe: str, form: str = "nvfp4_4over6") -> Path:
    """In a process of its own: several checkpoints are made at once, and threads would wait for each other."""
    command = [sys.executable, "-m", "fouroversix_plugin.cli", "quantize", str(source), str(target)]
    subprocess.run([*command, "--recipe", recipe, "--format", form], check=True, stdout=subprocess.DEVNULL)
    return target


def dequantized(stored: Path, target: Path) -> Path:
    """The checkpoint ``stored`` with its weights dequantized to BF16: what any engine serves without this plugin."""
    shutil.copytree(stored, target)
    tensors = load_file(stored / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_scale_2")]:
        module = name.removesuffix(".weight_scale_2")
        q = fos.NVFP4Tensor(
            tensors[f"{module}.weight"], tensors.pop(f"{module}.weight_scale"), tensors.pop(f"{module}.weight_scale_2")
        )
        tensors[f"{module}.weight"] = fos.dequantize(q, torch.bfloat16)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".input_scale")}
    save_file(tensors, target / "model.safetensors")
    (target / "hf_quant_config.json").unlink(missing_ok=True)
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config))
    return target


def static_amax(kind: str) -> torch.Tensor:
    """Calibrated, one might say: some live rows are larger and some much smaller. ``kind`` is a projection."""
    return torch.tensor({"w1": 9.0, "w3": 9.0, "w2": 3.0}.get(kind, 6.0) / 2688) * 2688


def calibrated(source: Path, target: Path) -> Path:
    """A W4A4 export of ModelOpt as it was before config.json knew of it: no weights share a scale, inputs have one."""
    shutil.copytree(source, target)
    held = load_file(source / "model.safetensors")
    for name in [name for name in held if name.endswith("proj.weight") or ".experts." in name]:
        module, kind = name.removesuffix(".weight"), name.split(".")[-2]
        q = fos.quantize(held[name], PLAIN)
        held |= {name: q.packed, f"{name}_scale": q.block_scale, f"{name}_scale_2": q.decode_scale}
        held[f"{module}.input_scale"] = static_amax(kind) / 2688
    save_file(held, target / "model.safetensors")
    exclude = ["lm_head", "model.layers.*.block_sparse_moe.gate"]
    settings = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": exclude}
    (target / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": settings})
    )
    return target


def answered(result: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in result, result["error"]
    return result


def flat(result: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([logprob for prompt in answered(result)["logprobs"] for logprob in prompt])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean())


@contextmanager
def emulations(checkpoint: Checkpoint, left: Left, kinds: Iterable[str]) -> Iterator[Emulated]:
    """:func:`emulated_logprobs` of both schemes, computed in the background: of ``kinds`` from now on, of others once
    they are asked for.
    """
    pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))

    @functools.cache
    def start(kind: str) -> dict[tuple[str, torch.dtype], Future[torch.Tensor]]:
        return {
            (scheme, dtype): pool.submit(
                emulated_logprobs,
                *(checkpoint(kind, form).result() for form in ("bf16", scheme.lower())),
                prompts_of(checkpoint, kind),
                fos.Recipe() if scheme == "W4A4" else None,
                dtype,
            )
            for scheme, dtype in itertools.product(SCHEMES, (torch.float32, torch.bfloat16))
            if (scheme, dtype) != ("W4A16", torch.bfloat16)
        }

    for kind in kinds:
        start(kind)
    yield lambda kind, scheme, dtype=torch.float32: start(kind)[scheme, dtype].result(left(PATIENCE))
    pool.shutdown(wait=False, cancel_futures=True)


def rounding(emulated: Emulated, kind: str) -> float:
    """How far W4A4 logprobs move when all else is rounded to BF16: codes flip, and each flip moves others."""
    return distance(emulated(kind, "W4A4", torch.bfloat16), emulated(kind, "W4A4"))


def off_in_mean(logprobs: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """With its standard error over prompts: what is off at one place is off at others of its prompt."""
    of_prompts = (logprobs - expected).view(STREAMS, -1).mean(1)
    return float(of_prompts.mean()), float(of_prompts.std()) / STREAMS**0.5


def moved(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, int]:
    """Distance of two runs' logprobs, those of generated tokens as long as these agree; how many tokens that is."""
    apart, agreeing = [(flat(one) - flat(other)).abs()], 0
    for i in range(len(one["tokens"])):
        pairs = list(zip(one["tokens"][i], other["tokens"][i], strict=False))
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        apart.append((torch.tensor(one["generated"][i][:same]) - torch.tensor(other["generated"][i][:same])).abs())
        agreeing += same
    return float(torch.cat(apart).mean()), agreeing


def moved_beside_bf16(
    what: str, ours: tuple[dict[str, Any], dict[str, Any]], stock: tuple[dict[str, Any], dict[str, Any]]
) -> tuple[float, float]:
    """Distances of two runs of ours, and of two of BF16."""
    by, agreeing = moved(*ours)
    of_bf16, _ = moved(*stock)
    print(f"{what}: moved by {by:.4f}, BF16 by {of_bf16:.4f}; {agreeing} tokens")
    return by, of_bf16


def assert_batch_invariant(what: str, beside: str, served: dict[str, Any], fast: dict[str, Any]) -> None:
    """Prompts asked one by one and together have the same answers to the bit, unlike those of the fastest kernels.

    Args:
        beside: where a run's results have what it said the other way.
    """
    for name, found in ((what, served), ("the fastest kernels", fast)):
        by, agreeing = moved(found, found[beside])
        print(f"{name}: moved by {by:.4f} where prompts are not alone; {agreeing} tokens agree")
    assert {key: served[key] for key in served[beside]} == served[beside]
    assert fast["logprobs"] != fast[beside]["logprobs"], "nothing here depends on the batch"


def assert_w4a16(
    emulated: Emulated, kind: str, served: torch.Tensor, dequantized: torch.Tensor, full: torch.Tensor
) -> None:
    """As near to what the CPU path says in fp32 as the dequantized weights in the engine's own BF16 are."""
    exact = emulated(kind, "W4A16")
    ours, stock, far = (distance(logprobs, exact) for logprobs in (served, dequantized, full))
    apart = distance(served, dequantized)
    print(
        f"{kind} W4A16: {ours:.4f} from the CPU path in fp32, dequantized weights in stock BF16 {stock:.4f}; "
        f"{apart:.4f} from each other; quantization moves {far:.4f}"
    )
    assert ours < 1.6 * stock
    assert far > 3 * stock, "the bound above means nothing if other weights would pass it"


def assert_w4a4(emulated: Emulated, kind: str, served: torch.Tensor, w4a16: torch.Tensor) -> None:
    """Rounding moves SmolLM2's logprobs as far as W4A4 itself does, but up as often as down: the mean stays."""
    one, other = emulated(kind, "W4A4"), emulated(kind, "W4A4", torch.bfloat16)
    limit = rounding(emulated, kind)
    (off, error), (far, far_error) = (off_in_mean(found, (one + other) / 2) for found in (served, w4a16))
    print(
        f"{kind} W4A4: {distance(served, one):.4f} from the CPU path in fp32, which BF16 moves by {limit:.4f}; "
        f"in the mean {off:.4f} ± {error:.4f}, W4A16 {far:.4f} ± {far_error:.4f}"
    )
    assert distance(served, one) < 1.3 * limit
    assert abs(off) < 3 * error
    assert abs(far) > 3 * far_error, "the bound above means nothing if full-precision activations would pass it"


def assert_adapted(
    result: dict[str, Any], source: Path, stored_folder: Path, adapter: Path, prompts: list[list[int]]
) -> None:
    """W4A16 with an adapter, as near to the stored weights plus B A in fp32 as without it to the stored weights."""
    without = emulated_logprobs(source, stored_folder, prompts)
    exact = emulated_logprobs(source, stored_folder, prompts, adapter=adapter)
    rounded, added = distance(flat(result), without), distance(exact, without)
    off = distance(torch.tensor(result["adapted"]).flatten(), exact)
    print(f"adapter: {off:.4f} from the CPU path in fp32, without it {rounded:.4f}; it moves {added:.4f}")
    assert off < 2 * rounded
    assert added > 10 * rounded, "the adapter changes nothing that could be seen"


def stored(tensors: Mapping[str, torch.Tensor], module: str) -> fos.NVFP4Tensor:
    return fos.NVFP4Tensor(*(tensors[f"{module}.{name}"] for name in ("weight", "weight_scale", "weight_scale_2")))


def concatenated(a: fos.NVFP4Tensor, b: fos.NVFP4Tensor) -> fos.NVFP4Tensor:
    scales = torch.cat([a.block_scale.view(torch.uint8), b.block_scale.view(torch.uint8)]).view(torch.float8_e4m3fn)
    return fos.NVFP4Tensor(torch.cat([a.packed, b.packed]), scales, torch.cat([a.row_decode_scale, b.row_decode_scale]))


def stacked_experts(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[fos.NVFP4Tensor, fos.NVFP4Tensor]:
    """w13 and w2 of all experts whose names begin with ``name``."""
    count = sum(f"{name}.{e}.w1.weight" in tensors for e in range(len(tensors)))
    experts = [[stored(tensors, f"{name}.{e}.{w}") for w in ("w1", "w3", "w2")] for e in range(count)]
    w13 = [concatenated(w1, w3) for w1, w3, _ in experts]
    return fos.NVFP4Tensor.stack(w13), fos.NVFP4Tensor.stack([w2 for _, _, w2 in experts])


def reference_linear(
    captured: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    layer: str,
    activations: fos.Recipe,
    amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the specification gives for the captured input of a served linear layer, merged or not."""
    parent, _, name = layer.rpartition(".")
    weights = [stored(tensors, f"{parent}.{part}") for part in MERGED.get(name, (name,))]
    x = captured[f"{layer}/x"]
    return torch.cat([reference.linear(x, w, activations, None, amax) for w in weights], dim=-1)


def reference_experts(
    captured: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    layer: str,
    activations: fos.Recipe,
    *amax: torch.Tensor,
) -> torch.Tensor:
    """What the specification gives for the captured input and routing of served experts."""
    x, weights, ids = (captured[f"{layer}/{name}"] for name in ("x", "topk_weights", "topk_ids"))
    return reference.moe(x, *stacked_experts(tensors, layer), weights, ids, activations, "silu", False, *amax)


@torch.no_grad()
def emulated_logprobs(
    model: Path,
    stored_folder: Path,
    prompts: list[list[int]],
    activations: fos.Recipe | None = None,
    dtype: torch.dtype = torch.float32,
    adapter: Path | None = None,
) -> torch.Tensor:
    """Logprobs of the prompts without an engine, on the CPU: this package multiplies the stored weights, transformers
    computes the rest of ``model`` in ``dtype``.
    """
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    tensors = load_file(stored_folder / "model.safetensors")
    added = {} if adapter is None else load_file(adapter / "adapter_model.safetensors")

    def linear(w: fos.NVFP4Tensor, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        y = fos.linear(x, w, activations)
        if f"{adapter_name}.lora_A.weight" not in added:
            return y
        a, b = (added[f"{adapter_name}.lora_{part}.weight"].to(dtype) for part in "AB")
        return y + x @ a.T @ b.T

    def moe(w13: fos.NVFP4Tensor, w2: fos.NVFP4Tensor, x: torch.Tensor, ids: Any, weights: Any) -> torch.Tensor:
        return fos.moe(x, w13, w2, weights, ids, activations)

    for name, module in network.named_modules():
        if f"{name}.weight_scale_2" in tensors:
            module.forward = partial(linear, stored(tensors, name), f"base_model.model.{name}")
        elif name.endswith(".experts"):  # of a Mixtral, which has another name in checkpoints
            module.forward = partial(moe, *stacked_experts(tensors, name.replace(".mlp.", ".block_sparse_moe.")))
    out = []
    for prompt in prompts:
        logprobs = network(torch.tensor([prompt])).logits[0].float().log_softmax(dim=-1)
        out += [float(logprobs[at, token]) for at, token in enumerate(prompt[1:])]
    return torch.tensor(out)
