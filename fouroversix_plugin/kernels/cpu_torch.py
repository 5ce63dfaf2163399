"""The quantizer on a CPU without a compiler: the reference's bytes from whole-array torch operations.

A cache-sized chunk at a time. Blocks lie in columns ([16, B]) so that what a block shares is a contiguous row, and both
candidates go through the same calls ([16, 2, B]). Magnitudes are used throughout: every step is symmetric in the sign
of x.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fouroversix_plugin import reference
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, Granularity, Recipe

_CHUNK_BLOCKS = 8192
"""Blocks at a time: the [16, 2, B] fp32 temporaries of a chunk (1 MiB each, shared by the cores) stay near L2."""

_FLT_MAX = torch.finfo(torch.float32).max
# With dtype and device: this may be imported while an engine builds a model under other defaults.
_SIX = torch.tensor(E2M1_MAX, dtype=torch.float32, device="cpu")
_ONE = torch.tensor(1.0, dtype=torch.float32, device="cpu")


def quantize(x: Tensor, recipe: Recipe, granularity: Granularity = "tensor", amax: Tensor | None = None) -> NVFP4Tensor:
    """:func:`fouroversix_plugin.reference.quantize`, byte for byte."""
    rows, columns = x.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    block_scale = torch.empty(rows, columns // BLOCK_SIZE, dtype=torch.float8_e4m3fn)
    scales = _GlobalScales(x, recipe, granularity, amax)
    for chunk in _chunks(rows, columns):
        blocks, rounded, sf = _round_blocks(x[chunk], recipe, scales.of_blocks(chunk, columns))
        packed[chunk] = _pack(blocks, rounded).view(-1, columns // 2)
        block_scale[chunk] = sf.to(torch.float8_e4m3fn).view(-1, columns // BLOCK_SIZE)
    return NVFP4Tensor(packed, block_scale, scales.decode_scale)


def quantize_values(x: Tensor, recipe: Recipe, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`fouroversix_plugin.reference.quantize_values`, without the detour through packed codes."""
    values = torch.empty_like(x, memory_format=torch.contiguous_format)
    scales = _GlobalScales(x, recipe, "token", None if amax is None else amax.expand(x.shape[0]))
    for chunk in _chunks(*x.shape):
        blocks, rounded, sf = _round_blocks(x[chunk], recipe, scales.of_blocks(chunk, x.shape[1]))
        values[chunk] = rounded.mul_(sf).copysign_(blocks).t().reshape(-1, x.shape[1])
    return values, scales.decode_scale


class _GlobalScales:
    """The fp32 scales of a tensor or of its rows, with the pinned result for an amax that is not finite."""

    def __init__(self, x: Tensor, recipe: Recipe, granularity: Granularity, amax: Tensor | None) -> None:
        if amax is None:
            amax = reference.row_amax(x) if granularity == "token" else reference.row_amax(x.reshape(1, -1))[0]
        self._finite = amax.isfinite()
        self._amax = torch.where(self._finite, amax, 0.0)
        self._encode, self._decode = reference.global_scales(self._amax, recipe)
        self.decode_scale = torch.where(self._finite, self._decode, torch.nan)

    def of_blocks(self, chunk: slice, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(amax, encode scale, decode scale, amax was finite), each [] or one per block of the chunk's rows."""
        scales = (self._amax, self._encode, self._decode, self._finite)
        if self._amax.ndim == 0:
            return scales
        amax, encode, decode, finite = (s[chunk].repeat_interleave(columns // BLOCK_SIZE) for s in scales)
        return amax, encode, decode, finite


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BLOCKS * BLOCK_SIZE // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _round_blocks(x: Tensor, recipe: Recipe, scales: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The winning candidate of every block.

    Returns:
        (x as [16, B] in fp32, the rounded magnitudes [16, B] as e2m1 values, the fp32 block scales [B]).
    """
    amax, encode, decode, finite = scales
    # A copy, whatever the strides of x: it is written to.
    blocks = x.reshape(-1, BLOCK_SIZE).t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    magnitude = blocks.abs()
    largest = magnitude.amax(dim=0)
    if recipe.adaptive:
        b = (largest / _SIX) * encode
        b = torch.stack((b, b * 1.5))
    else:
        b = (largest * (encode * (_ONE / _SIX))).unsqueeze(0)
    sf = b.clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    inverse = (_ONE / (sf * decode)).clamp_(max=_FLT_MAX).masked_fill_(sf == 0, _FLT_MAX)
    candidates = _round_to_e2m1_(magnitude.unsqueeze(1) * inverse)
    if recipe.adaptive:
        error = _errors(candidates, sf, magnitude, amax, encode, decode, recipe)
        four = error[1] < error[0]
        rounded = torch.where(four, candidates[:, 1], candidates[:, 0])
        sf = torch.where(four, sf[1], sf[0])
    else:
        rounded, sf = candidates[:, 0], sf[0]

    blocks.masked_fill_(largest == 0, 0.0)  # -0.0 in a zero block: its codes are all 0
    broken = ~largest.isfinite()
    if bool(broken.any()):
        blocks.masked_fill_(broken, 0.0)
        rounded = rounded.masked_fill(broken, 0.0)
        sf = sf.masked_fill(broken, torch.nan)
    if not bool(finite.all()):
        blocks.masked_fill_(~finite, 0.0)
        rounded = rounded.masked_fill(~finite, 0.0)
        sf = sf.masked_fill(~finite, 0.0)
    return blocks, rounded, sf


def _round_to_e2m1_(magnitude: Tensor) -> Tensor:
    """Round to the e2m1 grid in place, ties to the even code, saturating at 6.

    Adding 2^22 · 2^e to a magnitude in [2^e, 2^(e+1)) leaves one mantissa bit of it: the hardware's own rounding.
    Below 2 the grid is that of [1, 2).
    """
    magnitude.clamp_(max=E2M1_MAX)
    magic = magnitude.clamp(min=1.0).view(torch.int32).bitwise_and_(0x7F800000).add_(22 << 23).view(torch.float32)
    return magnitude.add_(magic).sub_(magic)


def _errors(
    q: Tensor, sf: Tensor, magnitude: Tensor, amax: Tensor, encode: Tensor, decode: Tensor, recipe: Recipe
) -> Tensor:
    """Errors [2, B] of both candidates [16, 2, B], summed from column 0 to 15 in this order."""
    d = q * sf
    if recipe.error == "amax":
        d.mul_(amax).div_(torch.tensor(recipe.encoded_amax, dtype=torch.float32)).sub_(magnitude.unsqueeze(1))
    elif recipe.error == "decode_scale":
        d.mul_(decode).sub_(magnitude.unsqueeze(1))
    else:
        d.sub_((magnitude * encode).unsqueeze(1))
    t = d.square_() if recipe.metric == "mse" else d.abs_()
    if recipe.metric == "abs_max":
        return t.amax(dim=0)
    total = t[0]
    for i in range(1, BLOCK_SIZE):
        total.add_(t[i])
    return total


def _pack(blocks: Tensor, rounded: Tensor) -> Tensor:
    """Bytes [B, 8] of the e2m1 magnitudes [16, B] with the signs of ``blocks``."""
    doubled = (rounded * 2).to(torch.uint8)  # 0 1 2 3 4 6 8 12
    code = (doubled - ((doubled.clamp(min=4) - 4) >> 1)).clamp_(max=7)
    code |= blocks.signbit().to(torch.uint8) << 3
    return (code[0::2] | (code[1::2] << 4)).t().contiguous()


def unscaled(packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e2m1 * block_scale [..., K] in ``dtype``: exact in bf16 and fp32."""
    out = torch.empty(*packed.shape[:-1], packed.shape[-1] * 2, dtype=dtype)
    pairs = reference.e2m1_values(torch.arange(256).unsqueeze(1) >> torch.tensor([0, 4]) & 15)  # [256, 2]
    for target, codes, scale in zip(_rows(out), _rows(packed), _rows(block_scale), strict=True):
        values = F.embedding(codes.int(), pairs).view(*scale.shape, BLOCK_SIZE)
        target.view_as(values).copy_(values.mul_(scale.float().unsqueeze(-1)))
    return out


def _rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor [..., M, C] as matrices of a few hundred rows."""
    return torch.split(tensor.reshape(-1, tensor.shape[-1]), 256)


def dequantize(packed: Tensor, block_scale: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`fouroversix_plugin.reference.dequantize` with a decode scale per row."""
    return unscaled(packed, block_scale, torch.float32).mul_(decode_scale.unsqueeze(-1)).to(dtype)
