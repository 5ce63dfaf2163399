"""The specification as operators: what runs where nothing faster can be had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fouroversix_plugin import reference
from fouroversix_plugin.kernels import compose
from fouroversix_plugin.nvfp4 import NVFP4Tensor, ScaleLayout, scales_from_layout
from fouroversix_plugin.recipe import BLOCK_SIZE, Granularity, Recipe


def quantize(
    x: Tensor,
    recipe: Recipe,
    granularity: Granularity,
    amax: Tensor | None,
    layout: ScaleLayout,
    gated: bool,
    expert_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fouroversix_plugin.kernels.native.quantize`."""
    return compose.quantize(reference.quantize, x, recipe, granularity, amax, layout, gated, expert_offsets)


def quantize_values(x: Tensor, recipe: Recipe, amax: Tensor | None, gated: bool) -> tuple[Tensor, Tensor]:
    """:func:`fouroversix_plugin.kernels.native.quantize_values`."""
    return reference.quantize_values(reference.silu_and_mul(x) if gated else x, recipe, amax)


def dequantize(packed: Tensor, block_scale: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`fouroversix_plugin.reference.dequantize` of block scales as bytes."""
    return reference.dequantize(NVFP4Tensor(packed, block_scale.view(torch.float8_e4m3fn), decode_scale), dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`fouroversix_plugin.reference.scaled_matmul` plus bias, rounded to ``dtype``; weights as stored."""
    values = weight if block_scale is None else reference.unscaled(weight, block_scale.view(torch.float8_e4m3fn))
    y = reference.scaled_matmul(x, values, token_scale, decode_scale)
    return (y if bias is None else y + bias.float()).to(dtype)


def linear_w4a4(
    x: Tensor,
    x_block_scale: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    block_scale: Tensor,
    decode_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`linear` of two packed operands whose block scales are in the layout 128x4."""
    scales = scales_from_layout(x_block_scale, "128x4", x.shape[0], x.shape[1] * 2 // BLOCK_SIZE)
    values = reference.unscaled(x, scales.view(torch.float8_e4m3fn))
    scales = scales_from_layout(block_scale, "128x4", weight.shape[0], weight.shape[1] * 2 // BLOCK_SIZE)
    return linear(values, weight, scales, decode_scale, token_scale, bias, dtype)


def moe(
    x: Tensor,
    w13: Tensor,
    w13_block_scale: Tensor,
    w13_decode_scale: Tensor,
    w2: Tensor,
    w2_block_scale: Tensor,
    w2_decode_scale: Tensor,
    *rest: Any,
) -> Tensor:
    """:func:`fouroversix_plugin.reference.moe` on weights as stored."""
    first = NVFP4Tensor(w13, w13_block_scale.view(torch.float8_e4m3fn), w13_decode_scale)
    second = NVFP4Tensor(w2, w2_block_scale.view(torch.float8_e4m3fn), w2_decode_scale)
    return reference.moe(x, first, second, *rest)
