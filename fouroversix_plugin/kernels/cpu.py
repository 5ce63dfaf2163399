"""The CPU backend: compiled kernels where there is a compiler, else torch operations; the same bytes.

Weights are held expanded (:func:`unscaled`): until there is a packed CPU GEMM, unpacking at every call would cost more
than the call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fouroversix_plugin import reference
from fouroversix_plugin.kernels import build, compose, cpu_torch, native
from fouroversix_plugin.nvfp4 import ScaleLayout
from fouroversix_plugin.recipe import Granularity, Recipe


def quantize(
    x: Tensor,
    recipe: Recipe,
    granularity: Granularity = "tensor",
    amax: Tensor | None = None,
    layout: ScaleLayout = "row_major",
    gated: bool = False,
    expert_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fouroversix_plugin.kernels.native.quantize`."""
    if build.load("cpu") is None:
        return native.quantize(x, recipe, granularity, amax, layout, gated, expert_offsets)
    return compose.quantize(cpu_torch.quantize, x, recipe, granularity, amax, layout, gated, expert_offsets)


def quantize_values(
    x: Tensor, recipe: Recipe, amax: Tensor | None = None, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`fouroversix_plugin.kernels.native.quantize_values`."""
    if build.load("cpu") is None:
        return native.quantize_values(x, recipe, amax, gated)
    return cpu_torch.quantize_values(reference.silu_and_mul(x) if gated else x, recipe, amax)


def dequantize(packed: Tensor, block_scale: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`fouroversix_plugin.reference.dequantize` with a decode scale per row; block scales as bytes."""
    if build.load("cpu") is None:
        return native.dequantize(packed, block_scale, decode_scale, dtype)
    return cpu_torch.dequantize(packed, block_scale.view(torch.float8_e4m3fn), decode_scale, dtype)


def unscaled(packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e2m1 * block_scale [..., K] in ``dtype`` (exact) from block scales as bytes."""
    if build.load("cpu") is None:
        return native.dequantize(packed, block_scale, None, dtype)
    return cpu_torch.unscaled(packed, block_scale.view(torch.float8_e4m3fn), dtype)


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """What expanded weights are held in for a model of ``dtype``: fp16 sums of products up to 2688² would overflow."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def scaled_matmul(x: Tensor, weight: Tensor, token_scale: Tensor | None, decode_scale: Tensor) -> Tensor:
    """:func:`fouroversix_plugin.reference.scaled_matmul`; with bf16 operands the sum, accumulated in fp32, is rounded
    to bf16 before it is scaled."""
    y = F.linear(x.to(weight.dtype), weight).float()
    if token_scale is not None:
        y.mul_(token_scale.unsqueeze(-1))
    return y.mul_(decode_scale)


def moe(
    x: Tensor,
    w13: Tensor,
    w13_decode_scale: Tensor,
    w2: Tensor,
    w2_decode_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activations: Recipe | None,
    activation: str,
    apply_router_weight_on_input: bool,
    input_amax: Tensor | None = None,
    inner_amax: Tensor | None = None,
) -> Tensor:
    """:func:`fouroversix_plugin.reference.moe` on expanded weights: an expert sees only the tokens routed to it."""
    half = w13.shape[-2] // 2
    slots = torch.zeros(*topk_ids.shape, w2.shape[-2], dtype=torch.float32)
    quantized = None
    if activations is not None and not apply_router_weight_on_input:
        quantized = quantize_values(x, activations, input_amax)
    for e in topk_ids.unique().tolist():
        if not 0 <= e < w13.shape[0]:
            continue  # another rank's expert
        token, slot = (topk_ids == e).nonzero(as_tuple=True)
        expert_in, token_scale = x[token], None
        if quantized is not None:
            expert_in, token_scale = quantized[0][token], quantized[1][token]
        elif apply_router_weight_on_input:
            expert_in = (expert_in.float() * topk_weights[token, slot].float().unsqueeze(-1)).to(x.dtype)
            if activations is not None:
                expert_in, token_scale = quantize_values(expert_in, activations, input_amax)
        gate_up = scaled_matmul(expert_in, w13[e], token_scale, w13_decode_scale[e]).to(x.dtype).float()
        hidden = reference.gated_activation(gate_up[:, :half], gate_up[:, half:], activation).to(x.dtype)
        token_scale = None
        if activations is not None:
            hidden, token_scale = quantize_values(hidden, activations, inner_amax)
        slots[token, slot] = scaled_matmul(hidden, w2[e], token_scale, w2_decode_scale[e])
    return reference.combine(slots, topk_weights, apply_router_weight_on_input).to(x.dtype)
