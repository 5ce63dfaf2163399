"""Products on Hopper (compute capability 9.0): the compiled kernels of csrc/gemm_sm90.cu under the package's names.

Weights are read in tiles (:func:`prepare`). Activations are bf16 or fp16; products of both kinds run on the same
kernels, as e2m1 * block_scale is exact in either. Nothing waits for the GPU, and no shape depends on values.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple, get_args

import torch
from torch import Tensor

from fouroversix_plugin.kernels import build, native
from fouroversix_plugin.kernels.invariance import is_batch_invariant
from fouroversix_plugin.recipe import Recipe
from fouroversix_plugin.reference import Activation

DTYPES: Final = (torch.bfloat16, torch.float16)
ROWS: Final = 16
"""What N is a multiple of."""

_ACTIVATIONS: Final = get_args(Activation)
_PINNED_SILU: Final = len(_ACTIVATIONS)
"""SiLU to the bit of the specification's, where codes follow."""
_TILE_ROWS: Final = (32, 64, 128)
_LARGE_TILE_ROWS: Final = 192
_FEW_ROWS: Final = 8
"""Tiles of as many rows are the kernel's for few rows, which finds them anywhere in x."""
_TILE_WEIGHT_ROWS: Final = 128
_FULL_CHIP: Final = 96
"""Where both products have as many tiles of 32 rows, these take 3 to 12 % less time than the kernel for few rows on an
H200 of 132 multiprocessors; that kernel spreads over the chip what fewer tiles would leave idle."""

_QUANTIZED: Final = -1
"""How far a row of intermediate results is once it is quantized, as csrc/operands.h says; before, tiles are counted."""


def reason(device: torch.device) -> str | None:
    """Why these kernels cannot run on ``device``, or None. This compiles them, if nobody has."""
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != build.HOPPER:
        return f"compute capability {capability[0]}.{capability[1]}, needed 9.0"
    return build.load("cuda")


def prepare(packed: Tensor, block_scale: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """The one-time shuffle of a weight into tiles of 128 rows and 64 columns; see csrc/tiles_sm90.cu.

    Args:
        packed: uint8 [..., N, K/2].
        block_scale: E4M3 bytes, uint8 [..., N, K/16]; none negative, and NaN stays NaN.
        gated: the rows are those of gate, then those of up, for the first product of a mixture of experts.

    Returns:
        uint8 [..., T, S, 4096] and [..., T, S, 512] for T tiles of rows and S steps of columns; padding is 0. Codes
        under a block scale of 0 keep nothing but their sign.
    """
    out: tuple[Tensor, Tensor] = torch.ops.fouroversix_cuda.to_tiles(packed, block_scale, gated)
    return out


def restore(codes: Tensor, block_scale: Tensor, rows: int, columns: int, gated: bool) -> tuple[Tensor, Tensor]:
    """What :func:`prepare` made, back: packed [..., N, K/2] and block scales [..., N, K/16]."""
    out: tuple[Tensor, Tensor] = torch.ops.fouroversix_cuda.from_tiles(codes, block_scale, rows, columns, gated)
    return out


def linear(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """((x W^T) * token_scale) * decode_scale + bias in fp32, rounded to the dtype of x: [M, N]."""
    out: Tensor = torch.ops.fouroversix_cuda.linear(
        x, codes, block_scale, decode_scale, token_scale, bias, is_batch_invariant(), 0, 1, 1
    )
    return out


def moe(
    x: Tensor,
    w13: Tensor,
    w13_block_scale: Tensor,
    w13_decode_scale: Tensor,
    w2: Tensor,
    w2_block_scale: Tensor,
    w2_decode_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activations: Recipe | None,
    activation: Activation,
    apply_router_weight_on_input: bool,
    input_amax: Tensor | None,
    inner_amax: Tensor | None,
) -> Tensor:
    """:func:`fouroversix_plugin.reference.moe` on weights in tiles, those of w13 ``gated``."""
    kernels = torch.ops.fouroversix_cuda
    experts, half, hidden = w13_decode_scale.shape[0], w13_decode_scale.shape[1] // 2, w2_decode_scale.shape[1]
    if topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        shapes = tuple(topk_ids.shape), tuple(topk_weights.shape)
        raise ValueError(f"topk_ids, topk_weights: got shapes {shapes}, needed [{x.shape[0]}, top_k] both")
    if topk_ids.device != x.device or topk_weights.device != x.device:
        devices = f"{topk_ids.device} and {topk_weights.device}"
        raise ValueError(f"topk_ids, topk_weights: got tensors on {devices}, needed them on {x.device}, as x is")
    if w2_decode_scale.shape[0] != experts:
        raise ValueError(f"w2: got {w2_decode_scale.shape[0]} experts, needed the {experts} of w13")
    if x.shape[0] == 0:
        return x.new_empty(0, hidden)
    if topk_ids.dtype not in (torch.int32, torch.int64):
        topk_ids = topk_ids.int()
    topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.float()
    on_input = apply_router_weight_on_input
    tokens = _rows_of_a_tile(topk_ids.numel(), experts, hidden, half)
    on_rows = topk_weights if on_input else None
    row_tiles = _row_tiles_beside(topk_ids, tokens, w13_decode_scale, w2_decode_scale, activations is not None)
    whole = row_tiles if activations is None else _QUANTIZED
    rows = _sort_by_expert(x, topk_ids, on_rows, experts, tokens, activations, input_amax, row_tiles > 0)
    pinned = activations is not None and activation == "silu"
    gating = _PINNED_SILU if pinned else _ACTIVATIONS.index(activation)
    # With `progress` the next three run at once: nothing that one of them reads or writes is freed before the last is
    # launched, or whoever got that memory next would write to it.
    inner = kernels.multiply_gated(
        rows.x, w13, w13_block_scale, w13_decode_scale, rows.token_scale, rows.token_of_row, rows.blocks, rows.in_use,
        rows.progress, whole, half, gating, tokens,
    )  # fmt: skip
    inner_scale = None
    if rows.progress is not None and activations is not None:
        inner_scale = native.quantize_beside(inner, activations, inner_amax, rows.progress, row_tiles)
    elif activations is not None:
        inner, inner_scale = native.quantize_sorted(inner, activations, inner_amax, rows.in_use)
    products = kernels.multiply_experts(
        inner, w2, w2_block_scale, w2_decode_scale, inner_scale, rows.slot_of_row, rows.blocks, rows.in_use,
        rows.progress, whole, hidden, tokens,
    )  # fmt: skip
    out: Tensor = kernels.combine(products, None if on_input else topk_weights, topk_ids, experts, x.dtype)
    return out


class _Rows(NamedTuple):
    """What experts multiply: P rows, sorted by expert."""

    x: Tensor  # [P, K], or [M, K] with token_of_row
    token_scale: Tensor | None  # of the rows of x
    token_of_row: Tensor | None  # [P]: row of x
    slot_of_row: Tensor  # [P]
    blocks: Tensor  # [.., 4], as csrc/gemm.h's Block
    in_use: Tensor  # [2]: blocks, rows
    progress: Tensor | None  # [P]: how far a row's intermediate result is, where both products run at once


def _sort_by_expert(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    experts: int,
    tokens: int,
    activations: Recipe | None,
    input_amax: Tensor | None,
    followed: bool,
) -> _Rows:
    """Rows of x by the expert of each slot, times ``topk_weights`` where given, quantized; in blocks of at most
    ``tokens``. ``followed``: with room for their progress.

    Quantizing x and sorting slots take their time side by side: whichever is launched second begins before the first
    has ended. So nothing that the first reads may be freed, and written to by the second, until both are launched.
    """
    kernels = torch.ops.fouroversix_cuda
    if not _is_readable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    if input_amax is not None:
        input_amax = input_amax.contiguous()
    if tokens <= _FEW_ROWS and topk_weights is None:
        values, scale = (x, None) if activations is None else native.quantize_values(x, activations, input_amax, False)
        beside = activations is not None and not _fills_between()
        _, slot_of_row, token_of_row, blocks, in_use, _ = kernels.route(topk_ids, experts, tokens, beside, False, False)
        return _Rows(values, scale, token_of_row, slot_of_row, blocks, in_use, None)
    row_of_slot, slot_of_row, _, blocks, in_use, progress = kernels.route(
        topk_ids, experts, tokens, False, True, followed
    )
    if activations is not None and topk_weights is None:
        values, scale = native.gather_quantized(x, activations, input_amax, row_of_slot, slot_of_row)
    else:
        values, scale = kernels.gather(x, row_of_slot, slot_of_row, topk_weights), None
        if activations is not None:
            values, scale = native.quantize_sorted(values, activations, input_amax, in_use)
    return _Rows(values, scale, None, slot_of_row, blocks, in_use, progress if followed else None)


def _is_readable(tensor: Tensor) -> bool:
    """Whether kernels read it as it is, without a copy."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _fills_between() -> bool:
    """Whether torch has kernels of its own between ours, to fill new memory: those that run at once would race them."""
    return torch.are_deterministic_algorithms_enabled()


def _row_tiles_beside(
    topk_ids: Tensor, tokens: int, w13_decode_scale: Tensor, w2_decode_scale: Tensor, quantized: bool
) -> int:
    """Into how many tiles rows of intermediate results fall if both products run at once, and their quantizer, or 0."""
    scales = w13_decode_scale, w2_decode_scale
    # A copy of these would be freed while it is read.
    if tokens <= _FEW_ROWS or _fills_between() or not all(map(_is_readable, scales)):
        return 0
    (experts, rows), hidden = w13_decode_scale.shape, w2_decode_scale.shape[1]
    kernels = torch.ops.fouroversix_cuda
    return int(kernels.row_tiles_beside(topk_ids, experts, tokens, rows // 2, hidden, quantized))


def _rows_of_a_tile(slots: int, experts: int, hidden: int, inner: int) -> int:
    """Rows of x that a tile multiplies: about all that an expert has, so that its weights are unpacked once."""
    # The kernel for few rows shares out a sum as suits their number, and holds whole pairs of steps or one piece of x.
    few = not is_batch_invariant() and all(k % 128 == 0 or k <= 2048 for k in (hidden, inner))
    rows = slots / experts
    tiles = min(slots, experts) * -(-min(2 * inner, hidden) // _TILE_WEIGHT_ROWS)
    if few and 1.5 * rows <= _FEW_ROWS and tiles < _FULL_CHIP:
        return _FEW_ROWS
    # With about 128 rows an expert, half of the experts would need a second tile for a few.
    if 112 <= rows <= 160:
        return _LARGE_TILE_ROWS
    # What nearly all experts have, if tokens choose them at random.
    most = rows + 2.3 * math.sqrt(rows)
    return next((tile for tile in _TILE_ROWS if tile >= most), _TILE_ROWS[-1])
