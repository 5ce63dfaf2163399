"""The CPU backend: compiled kernels where there is a compiler, else torch operations that quantize to the same bytes.

Compiled products read packed weights (:func:`to_strips`). Torch alone would spend more on unpacking than on
multiplying, so without a compiler weights are held expanded (:func:`unscaled`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fouroversix_plugin import reference
from fouroversix_plugin.kernels import build, compose, cpu_torch, native
from fouroversix_plugin.nvfp4 import ScaleLayout
from fouroversix_plugin.recipe import BLOCK_SIZE, Granularity, Recipe


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


def to_strips(packed: Tensor, block_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The one-time shuffle of a weight: strips of 16 rows, a SIMD lane each; see csrc/cpu_strips.h.

    Args:
        packed: uint8 [..., N, K/2].
        block_scale: E4M3 bytes, uint8 [..., N, K/16].

    Returns:
        uint8 [..., S, K/16, 8, 16] and [..., S, K/16, 16] with S = N / 16 rounded up; rows that fill up are 0.
    """
    codes, scales = (F.pad(t, (0, 0, 0, -t.shape[-2] % BLOCK_SIZE)) for t in (packed, block_scale))
    codes = codes.unflatten(-1, (-1, BLOCK_SIZE // 2)).unflatten(-3, (-1, BLOCK_SIZE))  # [..., S, 16, K/16, 8]
    scales = scales.unflatten(-2, (-1, BLOCK_SIZE))  # [..., S, 16, K/16]
    return codes.movedim(-3, -1).contiguous(), scales.movedim(-2, -1).contiguous()


def from_strips(codes: Tensor, scales: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """What :func:`to_strips` made, back: packed [..., N, K/2] and block scales [..., N, K/16] for N = ``rows``."""
    packed = codes.movedim(-1, -3).flatten(-4, -3).flatten(-2)
    block_scale = scales.movedim(-1, -2).flatten(-3, -2)
    return packed[..., :rows, :].contiguous(), block_scale[..., :rows, :].contiguous()


def prepare(packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight as :func:`linear` wants it for a model of ``dtype``: in strips, or expanded without a compiler."""
    if build.load("cpu") is None:
        return to_strips(packed, block_scale)
    return unscaled(packed, block_scale, _held_dtype(dtype)), None


def linear(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """((x W^T) * token_scale) * decode_scale + bias in fp32, rounded to ``dtype``: [M, N].

    ``weight`` and ``block_scale`` are as :func:`prepare` left them, or as stored (2-D), which is prepared in the call.
    """
    if weight.ndim == 2 and block_scale is not None:
        weight, block_scale = prepare(weight, block_scale, x.dtype)
    if block_scale is not None:
        return native.linear(x, weight, block_scale, decode_scale, token_scale, bias, dtype)
    # Without a compiler. With bf16 operands the sum, accumulated in fp32, is rounded to bf16 before it is scaled.
    y = F.linear(x.to(weight.dtype), weight).float()
    if token_scale is not None:
        y.mul_(token_scale.unsqueeze(-1))
    y.mul_(decode_scale)
    return (y if bias is None else y.add_(bias)).to(dtype)


def _held_dtype(dtype: torch.dtype) -> torch.dtype:
    """What expanded weights are held in for a model of ``dtype``: fp16 sums of products up to 2688² would overflow."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def moe(
    x: Tensor,
    w13: Tensor,
    w13_block_scale: Tensor | None,
    w13_decode_scale: Tensor,
    w2: Tensor,
    w2_block_scale: Tensor | None,
    w2_decode_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activations: Recipe | None,
    activation: str,
    apply_router_weight_on_input: bool,
    input_amax: Tensor | None = None,
    inner_amax: Tensor | None = None,
) -> Tensor:
    """:func:`fouroversix_plugin.reference.moe` on prepared weights: an expert sees only the tokens routed to it."""
    dtype, token_scale = x.dtype, None
    topk_weights = reference.weights_of_experts(topk_weights, topk_ids, w13_decode_scale.shape[0])
    if apply_router_weight_on_input:
        x = (x.float().unsqueeze(1) * topk_weights.float().unsqueeze(-1)).to(dtype).flatten(0, 1)
    if activations is not None:
        x, token_scale = quantize_values(x, activations, input_amax)
    gate_up = linear_experts(x, w13, w13_block_scale, w13_decode_scale, token_scale, topk_ids, dtype)
    token_scale = None
    if activations is not None and activation == "silu":
        inner, token_scale = quantize_values(gate_up, activations, inner_amax, gated=True)
    else:
        inner = _gated_activation(gate_up, activation)
        if activations is not None:
            inner, token_scale = quantize_values(inner, activations, inner_amax)
    slots = linear_experts(inner, w2, w2_block_scale, w2_decode_scale, token_scale, topk_ids, torch.float32)
    return combine(
        slots.view(*topk_ids.shape, w2_decode_scale.shape[1]), topk_weights, apply_router_weight_on_input, dtype
    )


def linear_experts(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    topk_ids: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`linear` by the expert of each slot of ``topk_ids`` [M, top_k]: [M * top_k, N].

    Args:
        x: [M, K], a row for each token, or [M * top_k, K], one for each slot.
        weight, block_scale, decode_scale: of all experts [E, ...], as :func:`linear` wants them of one.
        token_scale: None, or one for each row of x.

    Slots of experts that there are not (other ranks') are 0.
    """
    if block_scale is not None and weight.ndim > 3:
        ids = topk_ids if topk_ids.dtype == torch.int64 else topk_ids.int()
        return native.linear_experts(x, weight, block_scale, decode_scale, token_scale, ids, dtype)
    out = torch.zeros(topk_ids.numel(), decode_scale.shape[1], dtype=dtype)
    expert_of = topk_ids.flatten()
    slots_of_row = expert_of.numel() // max(x.shape[0], 1)
    for e in expert_of.unique().tolist():
        if not 0 <= e < decode_scale.shape[0]:
            continue
        slot = (expert_of == e).nonzero().squeeze(-1)
        row = slot // slots_of_row
        scales = None if block_scale is None else block_scale[e]
        of_row = None if token_scale is None else token_scale[row]
        out[slot] = linear(x[row], weight[e], scales, decode_scale[e], of_row, None, dtype)
    return out


def combine(slots: Tensor, topk_weights: Tensor, apply_router_weight_on_input: bool, dtype: torch.dtype) -> Tensor:
    """:func:`fouroversix_plugin.reference.combine`, rounded to ``dtype``."""
    if build.load("cpu") is None:
        return native.combine(slots, None if apply_router_weight_on_input else topk_weights.float(), dtype)
    return reference.combine(slots, topk_weights, apply_router_weight_on_input).to(dtype)


def _gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of [gate, up] in fp32, rounded to its dtype.

    silu is torch's: the reference's pinned one is thirty operations, which a token waits for. They differ in the last
    place of fp32; where codes follow, :func:`quantize_values` has the pinned one built in.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    product = F.silu(gate) * up if activation == "silu" else reference.gated_activation(gate, up, activation)
    return product.to(gate_up.dtype)
