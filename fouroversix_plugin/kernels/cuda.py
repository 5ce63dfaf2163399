"""The quantizer for CUDA tensors: compiled kernels where nvcc is, else Triton's, else torch operations; the same bytes.

Nothing waits for the GPU, and no result's shape depends on values: every operator can be captured in a CUDA graph, once
the kernels are loaded (a first call outside of the capture).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fouroversix_plugin.kernels import build, native, reference_operators, triton
from fouroversix_plugin.nvfp4 import ScaleLayout
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
    out: tuple[Tensor, Tensor, Tensor] = _operators().quantize(
        x, recipe, granularity, amax, layout, gated, expert_offsets
    )
    return out


def quantize_values(x: Tensor, recipe: Recipe, amax: Tensor | None, gated: bool) -> tuple[Tensor, Tensor]:
    """:func:`fouroversix_plugin.kernels.native.quantize_values`."""
    out: tuple[Tensor, Tensor] = _operators().quantize_values(x, recipe, amax, gated)
    return out


def dequantize(packed: Tensor, block_scale: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`fouroversix_plugin.reference.dequantize` of block scales as bytes, with a decode scale per row."""
    out: Tensor = _operators().dequantize(packed, block_scale, decode_scale, dtype)
    return out


def _operators() -> ModuleType:
    if build.load("cuda") is None:
        return native
    return triton if triton.reason() is None else reference_operators
