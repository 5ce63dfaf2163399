"""The operators that a backend does not fuse, from its plain quantizer and torch operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fouroversix_plugin import reference
from fouroversix_plugin.nvfp4 import NVFP4Tensor, ScaleLayout, scales_to_layout
from fouroversix_plugin.recipe import Granularity, Recipe

Quantizer = Callable[[Tensor, Recipe, Granularity, Tensor | None], NVFP4Tensor]


def quantize(
    quantizer: Quantizer,
    x: Tensor,
    recipe: Recipe,
    granularity: Granularity,
    amax: Tensor | None,
    layout: ScaleLayout,
    gated: bool,
    expert_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fouroversix_plugin.kernels.native.quantize` by a quantizer of rows and tensors."""
    x = reference.silu_and_mul(x) if gated else x
    if expert_offsets is None:
        q = quantizer(x, recipe, granularity, amax)
        return q.packed, scales_to_layout(q.block_scale.view(torch.uint8), layout), q.decode_scale
    of_row, decode_scale = reference.expert_amax(x, expert_offsets, recipe, amax)
    q = quantizer(x, recipe, "token", of_row)
    scales = reference.expert_scales_to_layout(q.block_scale.view(torch.uint8), expert_offsets, layout)
    return q.packed, scales, decode_scale
