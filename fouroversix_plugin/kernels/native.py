"""The compiled operators (``torch.ops.fouroversix_cpu`` and ``_cuda``) by the names and types of this package.

Both devices have the same three quantizers, CUDA devices three more for experts, and the CPU products;
:mod:`fouroversix_plugin.kernels.build` compiles and loads them.
"""

from __future__ import annotations

from typing import Any, Final, get_args

import torch
from torch import Tensor

from fouroversix_plugin.nvfp4 import ScaleLayout
from fouroversix_plugin.recipe import ErrorDomain, Granularity, Metric, Recipe

_METRICS: Final = get_args(Metric)
_DOMAINS: Final = get_args(ErrorDomain)
_LAYOUTS: Final = get_args(ScaleLayout)
_SCOPES: Final = (*get_args(Granularity), "expert")


def quantize(
    x: Tensor,
    recipe: Recipe,
    granularity: Granularity,
    amax: Tensor | None,
    layout: ScaleLayout,
    gated: bool,
    expert_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """packed uint8 [M, K/2], block scales as bytes in ``layout``, decode scales [], [M] or [E].

    ``gated``: x is [M, 2K] and silu(gate) * up is quantized. ``expert_offsets`` makes the scope the expert, whatever
    ``granularity`` says.
    """
    scope = _SCOPES.index(granularity if expert_offsets is None else "expert")
    out: tuple[Tensor, Tensor, Tensor] = _of(x).quantize(
        x, amax, expert_offsets, gated, scope, *_taken_apart(recipe), _LAYOUTS.index(layout)
    )
    return out


def quantize_values(x: Tensor, recipe: Recipe, amax: Tensor | None, gated: bool) -> tuple[Tensor, Tensor]:
    """e2m1 * block_scale [M, K] in the dtype of x, and token_scale [M]; ``amax`` None, [] for all rows, or [M]."""
    out: tuple[Tensor, Tensor] = _of(x).quantize_values(
        x, amax, None, gated, _SCOPES.index("token"), *_taken_apart(recipe)
    )
    return out


def gather_quantized(
    x: Tensor, recipe: Recipe, amax: Tensor | None, row_of_slot: Tensor, slot_of_row: Tensor
) -> tuple[Tensor, Tensor]:
    """What :func:`quantize_values` makes of row m, in rows row_of_slot[m] (int32 [M, top_k]; -1: nowhere).

    On CUDA devices. x, contiguous and at a multiple of 16 bytes, is read before the kernel before has ended: that one
    writes row_of_slot, and let this one start when x was there. Whose rows they are goes to slot_of_row, int32
    [M * top_k].
    """
    out: tuple[Tensor, Tensor] = torch.ops.fouroversix_cuda.gather_quantized(
        x, amax, row_of_slot, slot_of_row, *_taken_apart(recipe)
    )
    return out


def quantize_sorted(x: Tensor, recipe: Recipe, amax: Tensor | None, in_use: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`quantize_values` makes of rows of x [P, K] that are sorted by expert.

    On CUDA devices. Of ``in_use``, int32 [2], the second number says how many rows there are: what is made of the
    others means nothing.
    """
    out: tuple[Tensor, Tensor] = torch.ops.fouroversix_cuda.quantize_sorted(x, amax, in_use, *_taken_apart(recipe))
    return out


def quantize_beside(x: Tensor, recipe: Recipe, amax: Tensor | None, progress: Tensor, row_tiles: int) -> Tensor:
    """What :func:`quantize_values` makes of x [P, K], in its place: token_scale [P].

    On Hopper, of intermediate results of experts that are still being made: ``multiply_gated`` was called with the same
    ``progress`` just before. No memory that this or that call had may be freed before ``multiply_experts`` was called
    with ``progress``: all three run at once.
    """
    out: Tensor = torch.ops.fouroversix_cuda.quantize_beside(x, amax, progress, row_tiles, *_taken_apart(recipe))
    return out


def dequantize(packed: Tensor, block_scale: Tensor, decode_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[..., M, K] from block scales as bytes and a decode scale per row, or none for e2m1 * block_scale."""
    out: Tensor = _of(packed).dequantize(packed, block_scale, decode_scale, dtype)
    return out


def linear(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y [M, N] on the CPU, from weights in strips (:func:`fouroversix_plugin.kernels.cpu.to_strips`)."""
    fp32_bias = None if bias is None else bias.float()
    out: Tensor = torch.ops.fouroversix_cpu.linear(x, codes, block_scale, decode_scale, token_scale, fp32_bias, dtype)
    return out


def linear_experts(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    topk_ids: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The same by the expert of each slot; see :func:`fouroversix_plugin.kernels.cpu.linear_experts`."""
    out: Tensor = torch.ops.fouroversix_cpu.linear_experts(
        x, codes, block_scale, decode_scale, token_scale, topk_ids, dtype
    )
    return out


def combine(slots: Tensor, topk_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum over top_k of fp32 slots [M, top_k, N], each times its weight (fp32), rounded to ``dtype``."""
    out: Tensor = torch.ops.fouroversix_cpu.combine(slots, topk_weights, dtype)
    return out


def _of(tensor: Tensor) -> Any:
    return torch.ops.fouroversix_cpu if tensor.device.type == "cpu" else torch.ops.fouroversix_cuda


def _taken_apart(recipe: Recipe) -> tuple[int, int, bool, float]:
    """As csrc/nvfp4.cuh numbers them."""
    return _METRICS.index(recipe.metric), _DOMAINS.index(recipe.error), recipe.adaptive, recipe.encoded_amax
