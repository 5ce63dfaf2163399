"""NVFP4 checkpoints of others in real vLLM on the CPU: the same weights answer alike however they are spelled."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close
from engines import (
    PLAIN,
    add_cache_scales,
    calibrated,
    dequantized,
    distance,
    flat,
    options,
    reference_experts,
    reference_linear,
    run_engine,
    static_amax,
    stored,
)
from safetensors.torch import load_file, save_file

import fouroversix_plugin as fos
from fouroversix_plugin.checkpoint import quantize_checkpoint
from fouroversix_plugin.nvfp4 import scales_to_layout

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/setup.sh installs its CPU build)")
pytestmark = pytest.mark.engine

# Sizes that are whole blocks, but neither 128 rows nor 64 columns: padded files differ from the others.
CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 288,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
PROMPTS = [[1, 504, 575, 282, 649, 314, 742, 5, 9, 100], [3, 900, 2, 17, 44]]
LAYER = "model.layers.1"
OURS = {"quantization": "nvfp4_4over6"}


def edited(
    source: Path,
    target: Path,
    tensors: Callable[[str, fos.NVFP4Tensor], dict[str, torch.Tensor]],
    block: dict[str, Any],
) -> None:
    """A copy of one of our checkpoints in somebody else's spelling."""
    shutil.copytree(source, target)
    held = load_file(source / "model.safetensors")
    for module in [name.removesuffix(".weight_scale_2") for name in held if name.endswith(".weight_scale_2")]:
        q = stored(held, module)
        for name in ("weight", "weight_scale", "weight_scale_2"):
            del held[f"{module}.{name}"]
        held |= {f"{module}.{name}": tensor for name, tensor in tensors(module, q).items()}
    save_file(held, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = block
    (target / "config.json").write_text(json.dumps(config))


def padded(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    out = torch.zeros(-(-tensor.shape[0] // rows) * rows, -(-tensor.shape[1] // columns) * columns, dtype=tensor.dtype)
    out[: tensor.shape[0], : tensor.shape[1]] = tensor
    return out


def as_fouroversix(module: str, q: fos.NVFP4Tensor) -> dict[str, torch.Tensor]:
    rows, columns = q.shape
    values = padded(q.packed, 128, 32)
    scales = scales_to_layout(q.block_scale, "128x4")
    return {
        "quantized_weight_values": values,
        "quantized_weight_scale_factors": scales,
        "quantized_weight_amax": (q.decode_scale.double() * 1536).float().reshape(1),
        "quantized_weight_metadata": torch.tensor([rows, columns, values.shape[0], values.shape[1] * 2, 1, 1]),
    }


def with_cache_scales(source: Path, target: Path) -> Path:
    """A copy that asks for a KV cache in FP8 and holds its scales, as NVIDIA's do."""
    shutil.copytree(source, target)
    held = load_file(target / "model.safetensors")
    add_cache_scales(held, 0.1, 0.1)
    save_file(held, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    (target / "config.json").write_text(json.dumps(config))
    return target


def static_activations(scheme: fos.Scheme) -> dict[str, Any]:
    return dataclasses.replace(scheme, input_scale="static").to_dict()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("formats")
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**CONFIG)).to(torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 4
    model.save_pretrained(folder / "bf16")
    quantize_checkpoint(folder / "bf16", folder / "w4a16", fos.preset("w4a16"))
    quantize_checkpoint(folder / "bf16", folder / "w4a4", fos.preset("nvfp4_4over6"))
    for name in ("modelopt", "compressed-tensors"):
        quantize_checkpoint(folder / "bf16", folder / name, fos.preset("w4a16"), format=name)
    block = {"quant_method": "fouroversix", "modules_to_not_convert": ["lm_head", "gate"]}
    edited(folder / "w4a4", folder / "fouroversix", as_fouroversix, block)
    calibrated(folder / "bf16", folder / "calibrated")
    attention = [f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.self_attn.o_proj"]
    static = {"model": str(folder / "calibrated"), "capture": [*attention, f"{LAYER}.block_sparse_moe.experts"]}
    damaged = folder / "swapped"
    shutil.copytree(folder / "compressed-tensors", damaged)
    held = load_file(damaged / "model.safetensors")
    held[f"{LAYER}.self_attn.o_proj.weight_global_scale"].reciprocal_()
    save_file(held, damaged / "model.safetensors")
    jobs: dict[str, dict[str, Any]] = {
        "ours": {"model": str(folder / "w4a16")},
        "ours W4A4": {"model": str(folder / "w4a4")},
        "modelopt": {"model": str(folder / "modelopt"), "options": OURS},
        "modelopt, cache in FP8": {"model": str(folder / "modelopt"), "options": OURS | {"kv_cache_dtype": "fp8"}},
        "modelopt, cache with scales": {
            "model": str(with_cache_scales(folder / "modelopt", folder / "cache")),
            "options": OURS,
        },
        "compressed-tensors": {"model": str(folder / "compressed-tensors"), "options": OURS},
        "compressed-tensors, asked for W4A4": {
            "model": str(folder / "compressed-tensors"),
            "options": options("nvfp4_4over6") | OURS,
        },
        "fouroversix": {"model": str(folder / "fouroversix")},
        "calibrated": {"model": str(folder / "calibrated"), "options": OURS},
        "calibrated, W4A16": {"model": str(folder / "calibrated"), "options": options("w4a16") | OURS},
        "dequantized": {"model": str(dequantized(folder / "calibrated", folder / "dequantized"))},
        "static": {**static, "options": options("nvfp4_static") | OURS},
        "static without scales": {"model": str(folder / "modelopt"), "options": options("nvfp4_static") | OURS},
        "static online": {"model": str(folder / "bf16"), "options": options("nvfp4_static")},
        "static ours": {
            "model": str(folder / "w4a4"),
            "options": {"hf_overrides": {"quantization_config": static_activations(fos.preset("nvfp4_4over6"))}},
        },
        "swapped": {"model": str(damaged), "options": OURS},
    }
    return {"folder": folder, **run_engine(folder, jobs, PROMPTS)}


@pytest.mark.parametrize(
    ("spelled", "ours"),
    [
        ("modelopt", "ours"),
        ("compressed-tensors", "ours"),
        ("compressed-tensors, asked for W4A4", "ours W4A4"),
        ("fouroversix", "ours W4A4"),
    ],
)
def test_another_spelling_gives_another_answer(served: dict[str, Any], spelled: str, ours: str) -> None:
    assert torch.equal(flat(served[spelled]), flat(served[ours]))


def test_scales_of_a_cache_in_fp8_are_passed_over(served: dict[str, Any]) -> None:
    usual, unscaled, scaled = (flat(served[f"modelopt{how}"]) for how in ("", ", cache in FP8", ", cache with scales"))
    assert not torch.equal(scaled, unscaled)
    assert distance(scaled, usual) < 0.2


def test_merged_projections_with_scales_of_their_own_are_garbled(served: dict[str, Any]) -> None:
    # One scale for all of q, k and v would be off by the ratio of their amaxes: a factor of four here.
    difference = (flat(served["calibrated, W4A16"]) - flat(served["dequantized"])).abs()
    assert difference.max() < 0.1
    scales = load_file(served["folder"] / "calibrated" / "model.safetensors")
    q, v = (scales[f"{LAYER}.self_attn.{name}.weight_scale_2"] for name in ("q_proj", "v_proj"))
    assert 3 < v / q < 5


@pytest.mark.parametrize(
    ("job", "line"),
    [
        ("ours", "weights as stored by nvfp4_4over6 (mse 256 amax); activations: not quantized (W4A16)"),
        ("modelopt", "weights as stored by modelopt; activations: not quantized (W4A16)"),
        ("calibrated", "weights as stored by modelopt; activations: mse 256 amax, per token (W4A4)"),
        ("static", "activations: plain NVFP4 448, by the checkpoint's static input_scale (W4A4)"),
    ],
)
def test_the_log_does_not_say_where_weights_and_activations_come_from(
    served: dict[str, Any], job: str, line: str
) -> None:
    flat(served[job])
    assert any(line in logged for logged in served[job]["log"])


@pytest.mark.parametrize("layer", ["self_attn.qkv_proj", "self_attn.o_proj"])
def test_a_static_input_scale_is_not_what_a_linear_layer_uses(served: dict[str, Any], layer: str) -> None:
    captured, tensors = captures(served)
    layer = f"{LAYER}.{layer}"
    y, static = captured[f"{layer}/y"], static_amax(layer)
    assert_close(y, reference_linear(captured, tensors, layer, PLAIN, static), diff=1e-5, ratio=2e-3)
    with pytest.raises(AssertionError):
        assert_close(y, reference_linear(captured, tensors, layer, PLAIN), diff=1e-5, ratio=2e-3)


def test_static_input_scales_are_not_what_experts_use(served: dict[str, Any]) -> None:
    captured, tensors = captures(served)
    layer = f"{LAYER}.block_sparse_moe.experts"
    y, static = captured[f"{layer}/y"], (static_amax("w1"), static_amax("w2"))
    assert_close(y, reference_experts(captured, tensors, layer, PLAIN, *static), diff=1e-3, ratio=1e-2)
    with pytest.raises(AssertionError):
        assert_close(y, reference_experts(captured, tensors, layer, PLAIN), diff=1e-3, ratio=1e-2)


def captures(served: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    flat(served["static"])
    folder = served["folder"]
    return load_file(folder / "static.safetensors"), load_file(folder / "calibrated" / "model.safetensors")


@pytest.mark.parametrize(
    ("job", "needed"),
    [
        ("static without scales", ("model.layers.0.self_attn.qkv_proj.input_scale: got nothing",)),
        ("static online", ("got a full-precision checkpoint for static activations",)),
        ("static ours", ("got static activations for a checkpoint of nvfp4_4over6",)),
        ("swapped", (f"{LAYER}.self_attn.o_proj.weight_scale_2: got", "looks like an encode scale")),
    ],
)
def test_what_cannot_be_right_is_served(served: dict[str, Any], job: str, needed: tuple[str, ...]) -> None:
    error = served[job].get("error", "")
    for text in needed:
        assert text in error
