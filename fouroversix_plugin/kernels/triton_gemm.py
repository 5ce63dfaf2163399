"""Products of packed weights on GPUs by Triton kernels: for chips, and where, no other kernels of ours can run.

The kernels lie in :mod:`fouroversix_plugin.kernels.triton_gemm_kernels`, which imports Triton: this module is imported
where there is none. As with the quantizer (:mod:`fouroversix_plugin.kernels.triton`), a CUDA graph needs one call of
its kind outside of the capture; then nothing waits for the GPU, and no result's shape depends on values.

Sizes of launches follow from shapes alone (:func:`choose`), so that the order in which a sum is added does too: nothing
is tuned by timing, and a row's result does not depend on the rows beside it, nor on the GPU's number of processors.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fouroversix_plugin.kernels import routing, triton
from fouroversix_plugin.kernels.invariance import is_batch_invariant
from fouroversix_plugin.nvfp4 import check_columns
from fouroversix_plugin.recipe import BLOCK_SIZE, Recipe

_STRIP_ROWS: Final = 64
_PLANES: Final = 8
_WORD_COLUMNS: Final = _PLANES * BLOCK_SIZE


# --- weights ---


def _stored_scales(device: torch.device) -> Tensor:
    """uint8 [256]: the byte that each E4M3 byte is stored as.

    2^e (1 + m/8) is (e + 21) << 3 | m; see :mod:`fouroversix_plugin.kernels.triton_gemm_kernels`. Negative scales are
    refused when weights are loaded; here they only get bytes that are left, to be told apart.

    Made on the device: a table copied from the host would have to wait for it, which no graph can hold.
    """
    byte = torch.arange(0x7F, dtype=torch.int32, device=device)
    # A subnormal scale is byte * 2^-9. Bits 30 to 20 of a byte in fp32: exponent, biased by 127, and three of mantissa.
    subnormal = (byte.float().view(torch.int32) >> 20) - ((127 + 9 - 21) << 3)
    stored = torch.where(byte < 8, subnormal.clamp(min=0), byte + ((21 - 7) << 3))
    is_left = torch.ones(256, dtype=torch.uint8, device=device).index_fill(0, stored.long(), 0)
    left = is_left.argsort(descending=True, stable=True)[: 256 - 0x7F].int()
    return torch.cat((stored, left[-1:], left[:-1])).byte()  # of NaN 0xFF


def prepare(packed: Tensor, block_scale: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as :func:`linear` and :func:`moe` read it.

    Args:
        packed: uint8 [..., N, K/2], the even column in the low nibble.
        block_scale: E4M3 bytes, uint8 [..., N, K/16].

    Returns:
        int32 [..., S, C, 64, 16] and, four scales a word, int32 [..., S, C, 2, 64]: strips of 64 rows, S = N / 64
        rounded up, by 128 columns, C = K / 128 rounded up. What fills up is 0.
    """
    *_, N, K = *packed.shape[:-1], packed.shape[-1] * 2
    check_columns("packed", K)
    rows, columns = -N % _STRIP_ROWS, -K % _WORD_COLUMNS
    codes = F.pad(packed, (0, columns // 2, 0, rows))
    codes = codes.unflatten(-1, (-1, _PLANES, BLOCK_SIZE // 2))  # [..., N, C, 8, 8]
    words = torch.zeros(*codes.shape[:-2], BLOCK_SIZE, dtype=torch.int32, device=packed.device)
    # Plane by plane: as much memory again as the weight takes, not eight times as much.
    for plane in range(_PLANES):
        pairs = codes[..., plane, :]
        words |= _to_plane(torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2).int(), plane)
    scales = _stored_scales(packed.device)[block_scale.int()]
    scales = F.pad(scales, (0, columns // BLOCK_SIZE, 0, rows)).unflatten(-1, (-1, 2, 4))  # [..., N, C, 2, 4]
    scales = scales.contiguous().view(torch.int32).squeeze(-1)  # [..., N, C, 2]
    words, scales = (t.unflatten(-3, (-1, _STRIP_ROWS)) for t in (words, scales))  # [..., S, 64, C, 16 or 2]
    return words.transpose(-2, -3).contiguous(), scales.movedim(-3, -1).contiguous()


def restore(weight: Tensor, block_scale: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """What :func:`prepare` was given: packed uint8 [..., N, K/2] and E4M3 bytes uint8 [..., N, K/16].

    Args:
        weight, block_scale: what it returned.
        rows: N.
        columns: K.
    """
    words = weight.transpose(-2, -3).flatten(-4, -3)[..., :rows, :, :]  # [..., N, C, 16]
    planes = [_from_plane(words, plane).byte() for plane in range(_PLANES)]
    codes = torch.stack(planes, dim=-2).flatten(-3)[..., :columns]
    scales = block_scale.movedim(-1, -3).flatten(-4, -3)[..., :rows, :, :]  # [..., N, C, 2]
    scales = scales.contiguous().view(torch.uint8).flatten(-2)[..., : columns // BLOCK_SIZE]
    e4m3 = _stored_scales(weight.device).argsort().byte()[scales.int()]
    return (codes[..., ::2] | (codes[..., 1::2] << 4)).contiguous(), e4m3.contiguous()


def _to_plane(codes: Tensor, plane: int) -> Tensor:
    """int32 codes 0..15 where plane ``plane`` of a word has their bits."""
    sign, magnitude = codes >> 3, codes & 7
    match plane % 4:
        case 3:
            bits = (sign << 14) | ((magnitude & 6) << 9) | ((magnitude & 1) << 13)
        case quarter:
            bits = (sign << (15 - 3 * quarter)) | (magnitude << (6 - 3 * quarter))
    return bits << (16 * (plane // 4))


def _from_plane(words: Tensor, plane: int) -> Tensor:
    """The inverse of :func:`_to_plane`."""
    bits = words >> (16 * (plane // 4))
    match plane % 4:
        case 3:
            return ((bits >> 11) & 8) | ((bits >> 9) & 6) | ((bits >> 13) & 1)
        case quarter:
            return ((bits >> (12 - 3 * quarter)) & 8) | ((bits >> (6 - 3 * quarter)) & 7)


# --- launches ---


@dataclass(frozen=True, slots=True)
class Launch:
    """A tile of ``rows`` of the weight by ``tokens``, and over how many programs its sum is split."""

    rows: int
    tokens: int
    splits: int
    warps: int

    def for_two_weights(self) -> Launch:
        """The launch of two products with the same tokens at once: as many sums in registers as one has."""
        return Launch(self.rows // 2, self.tokens, self.splits, 4)


# Without matrix units a program's products are as many instructions, all written out: a tile of a few thousand.
_FP32_TILE: Final = Launch(64, 16, 1, 4)


# Two programs for each of the 132 processors of an H100 or H200: fewer leave memory idle. A constant, as another
# number of splits is another order of the sum.
_PROGRAMS: Final = 264
# Of every tile where results have to be batch-invariant, whose sums are not split: those of splits of many tokens would
# take gigabytes.
_INVARIANT_TOKENS: Final = 64
# A program that sums less than 512 columns is over before its loads are under way.
_LEAST_WORDS: Final = 4
_ROWS: Final = 128
# With more, sums and unpacked weights want more registers than there are.
_MOST_TOKENS: Final = 128
_TILES_TOGETHER: Final = 8
_MOST_STAGES: Final = 5


def choose(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> Launch:
    """The launch of a product with x of ``dtype``.

    The same for all numbers of tokens between two powers of two, and for all where results have to be batch-invariant.
    """
    if is_batch_invariant():
        return _tile(_INVARIANT_TOKENS, _MOST_TOKENS, dtype)
    bucket = _bucket(tokens)
    tile = _tile(bucket, _MOST_TOKENS, dtype)
    tiles = -(-rows // tile.rows) * -(-bucket // tile.tokens)
    words = _words(columns)
    splits = max(1, min(_PROGRAMS // tiles, words // _LEAST_WORDS))
    # As many as have something to do, where words do not divide evenly.
    return dataclasses.replace(tile, splits=-(-words // -(-words // splits)))


def choose_for_experts(slots: int, experts: int, dtype: torch.dtype, groups: bool) -> Launch:
    """The launch of the experts' products: tiles of as many tokens as an expert has on average, or batch-invariant.

    Where warps do not multiply in ``groups``, tokens are operands in registers too, and two weights leave few for them.
    """
    tokens = _INVARIANT_TOKENS if is_batch_invariant() else _bucket(-(-slots // experts))
    return _tile(tokens, _MOST_TOKENS if groups else _MOST_TOKENS // 2, dtype)


def _tile(tokens: int, most: int, dtype: torch.dtype) -> Launch:
    if dtype == torch.float32:
        return _FP32_TILE
    tokens = min(tokens, most)
    return Launch(_ROWS, tokens, 1, 4 if tokens <= 32 else 8)


def _bucket(tokens: int) -> int:
    return max(16, 1 << max(tokens - 1, 0).bit_length())


def _words(columns: int) -> int:
    return -(-columns // _WORD_COLUMNS)


def _in_groups(x: Tensor) -> bool:
    """Whether groups of four warps multiply together on the device of x, with tokens in shared memory."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def _options(launch: Launch, x: Tensor, weights: int = 1) -> dict[str, Any]:
    """What a launch of so many weights at a time is compiled for on the device of x."""
    stages = 1
    if x.is_cuda:
        room = _kernels().shared_memory(x.device.index)
        if launch.tokens < _MOST_TOKENS:
            room //= 2  # for two programs a processor; more tokens' sums take the registers of both
        step = weights * launch.rows * (4 * BLOCK_SIZE + _PLANES) + launch.tokens * _WORD_COLUMNS * x.element_size()
        # Loads are under way for as many steps ahead as there is room for.
        stages = max(2, min(_MOST_STAGES, room // step))
    return {
        "ROWS": launch.rows,
        "TOKENS": launch.tokens,
        "CHAINED": not _in_groups(x),
        "COMPILED": x.is_cuda,
        "num_warps": launch.warps,
        "num_stages": stages,
        "enable_fp_fusion": False,
    }


def _kernels() -> ModuleType:
    return importlib.import_module("fouroversix_plugin.kernels.triton_gemm_kernels")


# --- products ---


def linear(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """((x W^T) * token_scale) * decode_scale + bias in fp32, rounded to ``dtype``: [M, N].

    Args:
        x: [M, K] in bf16, fp16 or fp32, whose products run on the matrix units, the same, and without them.
        weight, block_scale: of W [N, K], from :func:`prepare`.
        decode_scale: fp32 [N].
        token_scale: fp32 [M], or None.
        bias: [N], or None.
        dtype: bf16, fp16 or fp32.

    Raises:
        ValueError: a number, dtype or device of one that does not fit the others'.
    """
    tokens, columns = _check_input(x)
    rows = decode_scale.shape[-1]
    _check_dtype(dtype)
    _check_weight("weight", weight, block_scale, decode_scale, (), columns, x)
    if token_scale is not None:
        _check("token_scale", token_scale, torch.float32, (tokens,), x)
        token_scale = token_scale.contiguous()
    bias = _checked_bias(bias, rows, x)
    out = x.new_empty(tokens, rows, dtype=dtype)
    if tokens == 0 or rows == 0:
        return out
    kernels, launch, words = _kernels(), choose(tokens, rows, columns, x.dtype), _words(columns)
    split = launch.splits > 1
    sums = x.new_empty(launch.splits, tokens, rows, dtype=torch.float32) if split else triton.as_stored(out)
    scales = decode_scale.contiguous(), token_scale, bias
    with triton.device_of(x):
        kernels.multiply[(-(-rows // launch.rows) * -(-tokens // launch.tokens), launch.splits)](
            triton.readable(x),
            weight,
            block_scale,
            *scales,
            sums,
            tokens,
            rows,
            columns,
            words,
            -(-words // launch.splits),
            TILES_TOGETHER=_TILES_TOGETHER,
            SPLIT=split,
            WHOLE=columns % _WORD_COLUMNS == 0,
            **_options(launch, x),
        )
    if split:
        _add_splits(sums, *scales, out, own=True)
    return out


def scale_sums(
    sums: Tensor, decode_scale: Tensor, token_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(sums * token_scale) * decode_scale + bias in fp32, rounded once to ``dtype``: what :func:`linear` ends with.

    Args:
        sums: fp32 [M, N], of e2m1 * block_scale, by whatever product.
        decode_scale: fp32 [N].
        token_scale: fp32 [M].
        bias: [N], or None.
        dtype: bf16, fp16 or fp32.

    Raises:
        ValueError: a number, dtype or device of one that does not fit the others'.
    """
    tokens, rows = sums.shape
    _check_dtype(dtype)
    _check("sums", sums, torch.float32, (tokens, rows), sums)
    _check("decode_scale", decode_scale, torch.float32, (rows,), sums)
    _check("token_scale", token_scale, torch.float32, (tokens,), sums)
    bias = _checked_bias(bias, rows, sums)
    out = sums.new_empty(tokens, rows, dtype=dtype)
    if out.numel():
        scales = decode_scale.contiguous(), token_scale.contiguous()
        _add_splits(sums.contiguous().unsqueeze(0), *scales, bias, out, own=False)
    return out


def _add_splits(
    sums: Tensor,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    own: bool,
) -> None:
    """Write ``out`` [M, N] from the sums [S, M, N] of S splits, the first one first; ``own``: of our kernels."""
    splits, tokens, rows = sums.shape
    with triton.device_of(out):
        _kernels().add_splits[(-(-tokens // 4), -(-rows // 256))](  # a grid's second axis ends at 65535
            sums,
            decode_scale,
            token_scale,
            bias,
            triton.as_stored(out),
            tokens,
            rows,
            splits,
            ROWS=256,
            TOKENS=4,
            OWN=own,
            num_warps=4,
            enable_fp_fusion=False,
        )


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
    activation: str,
    apply_router_weight_on_input: bool,
    input_amax: Tensor | None = None,
    inner_amax: Tensor | None = None,
) -> Tensor:
    """:func:`fouroversix_plugin.reference.moe` on weights from :func:`prepare`; only what is routed is computed.

    Args:
        x: [M, H] in bf16, fp16 or fp32.
        w13, w13_block_scale: of gate and up [E, 2I, H]; its decode scale fp32 [E, 2I].
        w2, w2_block_scale: [E, H, I]; its decode scale fp32 [E, H].
        topk_weights: [M, top_k] of any of these float types.
        topk_ids: [M, top_k] of any integer type.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        [M, H] in the dtype of x.

    Raises:
        ValueError: a number, dtype or device of one that does not fit the others'; another activation.
    """
    tokens, columns = _check_input(x)
    experts, inner = w13_decode_scale.shape[0], w13_decode_scale.shape[1] // 2
    top_k = topk_ids.shape[1]
    check_columns("w2", inner)
    _check_weight("w13", w13, w13_block_scale, w13_decode_scale, (experts,), columns, x)
    _check_weight("w2", w2, w2_block_scale, w2_decode_scale, (experts,), inner, x)
    _check("topk_ids", topk_ids, topk_ids.dtype, (tokens, top_k), x)
    _check("topk_weights", topk_weights, topk_weights.dtype, (tokens, top_k), x)
    _check_dtype(topk_weights.dtype)
    if activation not in ("silu", "gelu", "gelu_tanh"):
        raise ValueError(f"activation: got {activation!r}, needed 'silu', 'gelu' or 'gelu_tanh'")
    H = w2_decode_scale.shape[1]
    if topk_ids.numel() == 0 or experts == 0:
        return x.new_zeros(tokens, H)
    slots, offsets = routing.sort_by_expert(topk_ids, experts)
    launch = choose_for_experts(slots.shape[0], experts, x.dtype, _in_groups(x))
    tiles = routing.most_tiles(slots.shape[0], experts, launch.tokens)
    kernels, together = _kernels(), x.dtype != torch.float32

    def product(rows_of: Tensor, weight: tuple[Tensor, Tensor, Tensor], out: Tensor, chosen: Launch, act: str) -> None:
        values, token_scale = rows_of, None
        if activations is not None:
            amax = input_amax if act else inner_amax
            values, token_scale = triton.quantize_values(rows_of, activations, amax, False)
        codes, scales, decode_scale = weight
        rows = out.shape[1]
        with triton.device_of(x):
            kernels.multiply_experts[(-(-rows // chosen.rows) * tiles,)](
                triton.readable(values),
                codes,
                scales,
                decode_scale.contiguous(),
                token_scale,
                slots,
                offsets,
                triton.as_stored(out),
                experts,
                slots.shape[0] // rows_of.shape[0],
                rows,
                rows_of.shape[1],
                codes.shape[-3],
                codes.shape[-4],
                EXPERTS=1 << (experts - 1).bit_length(),
                ACTIVATION=act,
                TOGETHER=together,
                WHOLE=rows_of.shape[1] % _WORD_COLUMNS == 0,
                **_options(chosen, values, 2 if act and together else 1),
            )

    if apply_router_weight_on_input:
        x = (x.unsqueeze(1).float() * topk_weights.unsqueeze(-1).float()).to(x.dtype).flatten(0, 1)
    hidden = x.new_empty(slots.shape[0], inner)
    # In fp32 the gates come before what they multiply: with both, registers are short.
    first = launch.for_two_weights() if together else launch
    product(x, (w13, w13_block_scale, w13_decode_scale), hidden, first, activation)
    of_slot = x.new_empty(slots.shape[0], H, dtype=torch.float32)
    product(hidden, (w2, w2_block_scale, w2_decode_scale), of_slot, launch, "")
    out = x.new_empty(tokens, H)
    with triton.device_of(x):
        kernels.combine[(tokens, -(-H // 1024))](
            of_slot,
            triton.as_stored(topk_weights.contiguous()),
            topk_ids.contiguous(),
            triton.as_stored(out),
            top_k,
            experts,
            H,
            COLUMNS=1024,
            WEIGHTED=not apply_router_weight_on_input,
            enable_fp_fusion=False,
        )
    return out


def _check_input(x: Tensor) -> tuple[int, int]:
    if x.ndim != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, needed [M, K]")
    if x.dtype not in triton.DTYPES:
        raise ValueError(f"x: got {x.dtype}, needed bfloat16, float16 or float32")
    check_columns("x", x.shape[1])
    return x.shape[0], x.shape[1]


def _checked_bias(bias: Tensor | None, rows: int, beside: Tensor) -> Tensor | None:
    """A bias [rows] as the kernels read it."""
    if bias is None:
        return None
    _check("bias", bias, bias.dtype, (rows,), beside)
    _check_dtype(bias.dtype)
    return triton.as_stored(bias.contiguous())


def _check_weight(
    name: str, codes: Tensor, scales: Tensor, decode_scale: Tensor, leading: tuple[int, ...], columns: int, x: Tensor
) -> None:
    rows = decode_scale.shape[-1]
    _check(f"{name}'s decode scale", decode_scale, torch.float32, (*leading, rows), x)
    strips = (*leading, -(-rows // _STRIP_ROWS), _words(columns))
    _check(name, codes, torch.int32, (*strips, _STRIP_ROWS, BLOCK_SIZE), x)
    _check(f"{name}'s block scales", scales, torch.int32, (*strips, 2, _STRIP_ROWS), x)
    if not (codes.is_contiguous() and scales.is_contiguous()):
        raise ValueError(f"{name}: got a view, needed contiguous words and block scales")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], beside: Tensor) -> None:
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, beside.device):
        raise ValueError(
            f"{name}: got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
            f"needed {shape} {dtype} on {beside.device}"
        )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in triton.DTYPES:
        raise ValueError(f"dtype: got {dtype}, needed bfloat16, float16 or float32")
