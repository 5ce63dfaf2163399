"""Weights on their way in: full-precision ones are quantized, stored ones are checked.

Every error names the weight, what was got, what was needed and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from fouroversix_plugin.kernels import select
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe
from fouroversix_plugin.reference import row_amax

_FULL_PRECISION: Final = (torch.bfloat16, torch.float16, torch.float32)

UNLOADED_CODES: Final = 0x88
"""A byte of packed weights that were never loaded: -0.0 twice. A quantizer writes it where two small negatives round to
zero, but never for a whole row with a block scale other than 0."""

E4M3_NAN: Final = 0x7F
"""A block scale that was never loaded, too."""

_E4M3_SIGN: Final = 0x80

LARGEST_DECODE_SCALE: Final = 1.0
"""A weight's amax is its decode scale times 1536 or 2688: with 1, far beyond any trained weight. The reciprocal of the
decode scale of a sound weight is larger than this, so a scale stored the wrong way round is seen. (It is also what a
weight of zeros has.)"""

NARROW: Final = Recipe(scale_max=256)
"""The recipe with the narrower of the two ranges; see :func:`looks_narrow`."""

_LAYOUT_ROWS: Final = 512
_LAYOUT_MOST: Final = 24_000
_LAYOUT_LEAST: Final = 1 << 12
_LAYOUT_GAIN: Final = 0.05
"""See :func:`check_row_major`: how many rows and scales of a weight to look at, below how many not to, what gain is
evidence. For more scales, memory would be asked of the system anew for each of a mixture's thousands of weights."""


def check_full_precision(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless the tensor ``name`` is bf16, fp16 or fp32: codes are no weights to be quantized."""
    if dtype not in _FULL_PRECISION:
        needed = ", ".join(str(accepted) for accepted in _FULL_PRECISION)
        raise ValueError(f"{name}: got {dtype}, needed one of {needed}; it is quantized already")


def nonfinite(x: Tensor) -> Tensor:
    """Indices of the values of x that are NaN or infinite."""
    return (~torch.isfinite(x)).nonzero()


def quantize_weight(
    name: str, weight: Tensor, recipe: Recipe, reduce_max: Callable[[Tensor], Tensor] | None = None
) -> NVFP4Tensor:
    """Quantize a full-precision weight [N, K] or [E, N, K]: one amax for a matrix, merged projections included.

    Args:
        name: full name of the layer.
        weight: bf16, fp16 or fp32.
        recipe: the scheme's weight recipe.
        reduce_max: largest amax over the ranks that hold parts of this weight, or None. With it the bytes do not
            depend on the number of ranks.

    Raises:
        ValueError: another dtype, or NaN or infinity in the weight; the message counts them and names the first.
    """
    check_full_precision(f"{name}.weight", weight.dtype)
    own = row_amax(weight.flatten(-2))
    # Before the check: a rank that stopped here would leave the others waiting for it.
    amax = own if reduce_max is None else reduce_max(own.clone())
    if not bool(own.isfinite().all()):
        bad = nonfinite(weight)
        raise ValueError(
            f"{name}.weight: got {len(bad)} NaN or infinite values, the first at {tuple(bad[0].tolist())}, needed "
            "finite weights; the checkpoint is damaged, or its values do not fit its dtype"
        )
    matrices = weight.reshape(-1, *weight.shape[-2:])
    parts = [_quantize_matrix(matrix, recipe, a) for matrix, a in zip(matrices, amax.reshape(-1), strict=True)]
    return parts[0] if weight.ndim == 2 else NVFP4Tensor.stack(parts)


def _quantize_matrix(matrix: Tensor, recipe: Recipe, amax: Tensor) -> NVFP4Tensor:
    return select("quantize", "", matrix.shape, matrix.device).quantize(matrix, recipe, "tensor", amax)


def check_row_major(name: str, block_scale: Tensor) -> None:
    """Refuse block scales [N, K/16] of a whole weight that lie in the 128x4 layout of a GEMM but are called row-major.

    The bytes are the same, so only their order can tell: the scales of a trained weight follow its rows and columns
    (outputs and inputs that are large or small), which the wrong order takes apart. Read both ways, the share of their
    variance that row and column means explain is larger in the right order: by 0.12 in the median of SmolLM2's 60
    weights that are large enough, and by 0.009 at least. Weights without such structure, random ones, pass either way.
    Before one is refused, means over 128 rows and 4 columns count as well: a weight of large and small parts (block
    diagonal, sparse in blocks) is explained better in the wrong order, where such parts can pass for rows.
    """
    rows, blocks = block_scale.shape
    rows = min(rows, _LAYOUT_ROWS, max(_LAYOUT_MOST // blocks, 128)) // 128 * 128
    if block_scale.shape[0] % 128 or blocks % 4 or rows * blocks < _LAYOUT_LEAST:
        return  # padding would give the 128x4 layout another number of scales, or there are too few to tell
    # E4M3's bytes grow by 8 an octave: near enough to a logarithm.
    x = block_scale[:rows].contiguous().view(torch.uint8).float()
    x -= x.mean()
    tiles = x.view(rows // 128, blocks // 4, 128, 4)  # 128x4 ones, by row (in another order) and column
    as_tiles = _variance(tiles.sum(1).sum(2) / blocks) + _variance(tiles.sum(2).sum(0) / rows)
    as_stored = _variance(x.mean(1)) + _variance(x.mean(0))
    gain, variance = as_tiles - as_stored, _variance(x)
    if gain > _LAYOUT_GAIN * variance:
        stored = x.view(rows // 128, 128, blocks // 4, 4)
        gain += _of_blocks(tiles.mean((2, 3))) - _of_blocks(stored.mean((1, 3)))
    if gain > _LAYOUT_GAIN * variance:
        raise ValueError(
            f"{name}: the block scales lie in the 128x4 layout of a GEMM (read so, rows and columns explain "
            f"{gain / variance:.0%} more of their variance), needed row-major ones; write the checkpoint without "
            "swizzling"
        )


def _of_blocks(means: Tensor) -> float:
    """Variance of means over 128 rows and 4 columns, [rows / 128, columns / 4], less that of their columns."""
    return _variance(means) - _variance(means.mean(0))


def _variance(x: Tensor) -> float:
    """Of numbers whose mean is 0."""
    return float(torch.linalg.vecdot(x.flatten(), x.flatten())) / x.numel()


def stored_weight(
    name: str, packed: Tensor, block_scale: Tensor, decode_scale: Tensor, widths: Sequence[int], recipe: Recipe
) -> NVFP4Tensor:
    """Check a loaded weight and put its parts together.

    Args:
        name: full name of the layer.
        packed: uint8 [..., N, K/2].
        block_scale: float8_e4m3fn [..., N, K/16].
        decode_scale: float32 [..., shards].
        widths: rows of each shard; together N.
        recipe: what the checkpoint says its weights were quantized with.

    Returns:
        A tensor with one decode scale per matrix where its shards agree, else one per row: never one shard's for all.

    Raises:
        ValueError: a tensor the checkpoint did not hold, a scale that no quantizer writes, or one out of range.
    """
    bytes_ = block_scale.view(torch.uint8)
    if bool((bytes_ == E4M3_NAN).any() | decode_scale.isnan().any()):
        part = "weight_scale" if bool((bytes_ == E4M3_NAN).any()) else "weight_scale_2"
        raise ValueError(missing(name, part))
    unloaded = (packed == UNLOADED_CODES).all(dim=-1) & (bytes_ != 0).any(dim=-1)
    if bool(unloaded.any()):
        raise ValueError(missing(name, "weight"))
    if bool((bytes_ >= _E4M3_SIGN).any()):
        raise ValueError(f"{name}.weight_scale: got negative or NaN block scales, needed 0 or more; corrupt checkpoint")
    sound = (decode_scale >= torch.finfo(torch.float32).tiny) & decode_scale.isfinite()
    if not bool(sound.all()):
        bad = decode_scale[~sound][0].item()
        raise ValueError(f"{name}.weight_scale_2: got {bad}, needed finite, normal and above 0; corrupt checkpoint")
    if bool((decode_scale > LARGEST_DECODE_SCALE).any()):
        bad = decode_scale.max().item()
        raise ValueError(
            f"{name}.weight_scale_2: got {bad:g}, needed at most {LARGEST_DECODE_SCALE:g}: weights would reach "
            f"{bad * recipe.encoded_amax:.3g}; it looks like an encode scale (the reciprocal, as compressed-tensors "
            "stores it)"
        )
    largest = e4m3_value(int(bytes_.max()))  # bytes of positive E4M3 numbers are in their order
    if largest > recipe.largest_block_scale:
        raise ValueError(
            f"{name}.weight_scale: block scale {largest:g} is impossible for scale_max {recipe.scale_max} "
            f"(largest {recipe.largest_block_scale:g}); the checkpoint's `quantization_config.weights` does not say "
            "what its weights were quantized with"
        )
    if bool((decode_scale == decode_scale[..., :1]).all()):
        return NVFP4Tensor(packed, block_scale, decode_scale[..., 0])
    per_row = decode_scale.repeat_interleave(torch.tensor(widths, device=decode_scale.device), dim=-1)
    return NVFP4Tensor(packed, block_scale, per_row)


def e4m3_value(byte: int) -> float:
    """The E4M3 number whose byte this is."""
    return torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn).item()


def looks_narrow(claimed: Recipe, largest_block_scale: float) -> bool:
    """Whether a model that claims ``scale_max`` 448 has weights that were quantized with 256.

    A tensor scaled for its own amax at 448 has a block at 448, so a whole model without any is no accident.

    Args:
        claimed: the recipe its config names.
        largest_block_scale: of all its weights.
    """
    limit = NARROW.largest_block_scale
    return claimed.largest_block_scale > limit and 0 < largest_block_scale <= limit


def missing(name: str, part: str) -> str:
    """What to say of a weight that the checkpoint does not hold, or not all of."""
    return (
        f"{name}.{part}: got nothing (or NaN) for at least a part of it, needed the whole tensor in the checkpoint; "
        f"either the checkpoint is incomplete or its config.json should list {to_ignore(name)!r} in `ignore`"
    )


def of_experts(layer: str, stem: str) -> str:
    """What errors call some of the weights of a layer's experts: ``layer (w13_*)``."""
    return f"{layer} ({stem}*)"


def to_ignore(name: str) -> str:
    """What `ignore` needs to leave out the layer that errors call ``name``: experts are left out together."""
    layer, _, stem = name.partition(" (")
    return f"{layer}*" if stem else name
