"""The specification as operators: what runs where nothing faster can be had."""

from __future__ import annotations

import torch
from torch import Tensor

from fouroversix_plugin import reference
from fouroversix_plugin.kernels import compose
from fouroversix_plugin.nvfp4 import NVFP4Tensor, ScaleLayout
from fouroversix_plugin.recipe import Granularity, Recipe


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
