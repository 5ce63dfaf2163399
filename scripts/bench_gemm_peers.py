"""Who is timed by bench_gemm.py: our kernels and others', each behind the same two functions.

``prepare(weight, tokens)`` turns a quantized weight into a call; ``prepare_input`` is done once for an input, outside
of what is timed. Everybody gets the same NVFP4 weights, in the layout and precision they want. Nothing of another
project is imported before its own ``prepare``, so that a peer that cannot be had is an ordinary error.
"""

import json
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fouroversix_plugin.kernels import ops, triton_gemm
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe

BF16 = torch.bfloat16


class Experts(NamedTuple):
    """Weights of a mixture of experts: w13 [E, 2I, H], gate rows first, and w2 [E, H, I]."""

    w13: NVFP4Tensor
    w2: NVFP4Tensor


class Routed(NamedTuple):
    """Tokens [M, H], and the experts of each: fp32 weights and int32 numbers [M, top_k]."""

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


Call = Callable[[Any], Any]


@dataclass(frozen=True)
class Peer:
    """One column of the table.

    Args:
        title: the column's.
        prepare: a weight (NVFP4Tensor or Experts) and the numbers of tokens to come, to a call that takes what
            ``prepare_input`` made of an input: x [M, K], or Routed.
        prepare_input: what is not timed.
        activations: the recipe that the activations go through, as a check has to know; None if they stay as they are.
        computes: False for what only moves the weights: nothing to check, and as fast for any number of tokens.
    """

    title: str
    prepare: Callable[[Any, Sequence[int]], Call]
    prepare_input: Callable[[Any], Any] = lambda x: x
    activations: Recipe | None = None
    computes: bool = True


# --- dense -----------------------------------------------------------------------------------------------------------


def _ours(weight: NVFP4Tensor, activations: Recipe | None) -> Call:
    prepared = ops.prepare_weight(weight, BF16)
    return lambda x: ops.linear(x, prepared, activations, None)


def _our_gemm(weight: NVFP4Tensor) -> Call:
    """W4A4 without its quantizer: the activations come as exact bf16 values and a scale per token."""
    w = ops.prepare_weight(weight, BF16)
    linear = torch.ops.fouroversix.linear
    return lambda x: linear(x[0], w.weight, w.block_scale, w.decode_scale, x[1], None, BF16)


def _cublas(weight: NVFP4Tensor) -> Call:
    w = ops.dequantize(weight, BF16)
    return lambda x: F.linear(x, w)


def _dequantize(weight: NVFP4Tensor) -> Call:
    w = NVFP4Tensor(weight.packed, weight.block_scale, weight.row_decode_scale.contiguous())
    return lambda x: F.linear(x, ops.dequantize(w, BF16))


def _read(weight: NVFP4Tensor) -> Call:
    from bench_read import read

    words = torch.cat((weight.packed.flatten(), weight.block_scale.view(torch.uint8).flatten())).view(torch.int32)
    return lambda x: read(words)


def _marlin(weight: NVFP4Tensor) -> Call:
    """As vLLM's MarlinNvFp4LinearKernel has and calls it."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4 as marlin

    N, K = weight.shape
    layer: Any = torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition, layer.params_dtype = N, K, BF16
    layer.weight = _parameter(weight.packed)
    layer.weight_scale = _parameter(weight.block_scale)
    layer.weight_global_scale = _parameter(weight.decode_scale)
    marlin.prepare_fp4_layer_for_marlin(layer)
    return lambda x: marlin.apply_fp4_marlin_linear(
        x, layer.weight, layer.weight_scale, layer.weight_global_scale, layer.workspace, N, K
    )


def _humming(weight: NVFP4Tensor, tokens: Sequence[int]) -> Call:
    """Its own layer for ModelOpt's NVFP4, bf16 activations."""
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    N, K = weight.shape
    method = {"quant_method": "modelopt", "quant_algo": "nvfp4"}
    with torch.device(weight.device):
        layer = HummingLayer(shape_n=N, shape_k=K, weight_config=method, torch_dtype=BF16)
    decode_scale = weight.decode_scale.reshape(1)
    layer.load_from_tensors(
        {"weight": weight.packed, "weight_scale": weight.block_scale, "weight_scale_2": decode_scale}
    )
    layer.transform()
    # Its choice for every number of tokens is a list of [above, up to, configuration]. Left to itself it compiles all
    # of them, some ninety, at the first call: here only those that are asked for.
    choices = get_heuristics_config(layer.humming_config)
    used = json.dumps([choice for choice in choices if any(choice[0] < M <= choice[1] for M in tokens)])
    return lambda x: layer(x, tuning_config=used)


# --- mixture of experts ----------------------------------------------------------------------------------------------


def _our_moe(experts: Experts, activations: Recipe | None) -> Call:
    w13, w2 = ops.prepare_experts(*experts, BF16)
    return lambda routed: ops.moe(routed.x, w13, w2, routed.topk_weights, routed.topk_ids, activations, "silu", False)


def _triton_bf16_moe(experts: Experts) -> Call:
    """vLLM's Triton kernels on bf16 weights."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    w13, w2 = (ops.dequantize(weight, BF16) for weight in experts)
    return lambda routed: fused_experts(routed.x, w13, w2, routed.topk_weights, routed.topk_ids)


def _marlin_moe(experts: Experts) -> Call:
    """As vLLM's MarlinExperts has and calls it."""
    import vllm._custom_ops as vllm_ops
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4 as marlin
    from vllm.scalar_type import scalar_types

    E, H, inner = experts.w2.shape
    layer = types.SimpleNamespace(
        num_experts=E, hidden_size=H, intermediate_size_per_partition=inner, params_dtype=BF16
    )
    parts = [part for weight in experts for part in (weight.packed, weight.block_scale, weight.decode_scale)]
    w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2 = marlin.prepare_nvfp4_moe_layer_for_marlin(
        layer, *parts, is_act_and_mul=True
    )

    def call(routed: Routed) -> Tensor:
        out = torch.empty_like(routed.x)
        fused_marlin_moe(
            routed.x,
            w13,
            w2,
            None,
            None,
            w13_scale,
            w2_scale,
            routed.topk_weights,
            routed.topk_ids,
            quant_type_id=scalar_types.float4_e2m1f.id,
            global_num_experts=E,
            global_scale1=w13_scale_2,
            global_scale2=w2_scale_2,
            moe_sum=lambda slots, total, topk_ids, expert_map: vllm_ops.moe_sum(slots, total),
            output=out,
        )
        return out

    return call


def _parameter(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


_quantized = Recipe()


def _by_triton(w: Any, activations: Any) -> Call:
    weight, block_scale = triton_gemm.prepare(w.packed, w.block_scale.view(torch.uint8))
    prepared = ops.PreparedWeight(weight, block_scale, w.row_decode_scale.contiguous())
    return lambda x: ops.linear(x, prepared, activations, None, operators=torch.ops.fouroversix_triton)


DENSE = {
    "w4a16": Peer("ours W4A16", lambda w, tokens: _ours(w, None)),
    "w4a4": Peer("ours W4A4", lambda w, tokens: _ours(w, _quantized), activations=_quantized),
    "w4a4-gemm": Peer(
        "W4A4 GEMM",
        lambda w, tokens: _our_gemm(w),
        lambda x: torch.ops.fouroversix.quantize_values(x, None, _quantized.key),
        activations=_quantized,
    ),
    "triton-w4a16": Peer("Triton W4A16", lambda w, tokens: _by_triton(w, None)),
    "triton-w4a4": Peer(
        "Triton W4A4",
        lambda w, tokens: _by_triton(w, _quantized),
        activations=_quantized,
    ),
    "bf16": Peer("cuBLAS bf16", lambda w, tokens: _cublas(w)),
    "marlin": Peer("Marlin", lambda w, tokens: _marlin(w)),
    "humming": Peer("Humming", _humming),
    "dequantize": Peer("dequantize, cuBLAS", lambda w, tokens: _dequantize(w)),
    "read": Peer("read", lambda w, tokens: _read(w), computes=False),
}

MOE = {
    "w4a16": Peer("ours W4A16", lambda w, tokens: _our_moe(w, None)),
    "w4a4": Peer("ours W4A4", lambda w, tokens: _our_moe(w, _quantized), activations=_quantized),
    "vllm-bf16": Peer("Triton bf16", lambda w, tokens: _triton_bf16_moe(w)),
    "marlin": Peer("Marlin", lambda w, tokens: _marlin_moe(w)),
}
