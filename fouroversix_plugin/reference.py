"""THE SPECIFICATION: quantize, dequantize, linear and moe in plain fp32 torch, one operation a line.

Every backend reproduces :func:`quantize` byte for byte. Nothing here is written for speed. All arithmetic is fp32,
round to nearest, never fused, in the order written; constants are 0-d tensors on the operand's device because torch
turns a division by a Python number into a multiplication by its reciprocal on GPUs.

Sources: arXiv 2512.02010 (Four Over Six); the Python references of fouroversix, TransformerEngine and FlashInfer,
whose bytes ``tests/test_reference.py`` compares with.

Non-finite input has one pinned result, the same on every backend:

- the amax of a row (or tensor) is not finite: codes and block scales 0, decode scale NaN. The row reads as NaN, as it
  would in bf16, and no other row changes;
- an amax was given and is finite, but a block is not: that block's scale is NaN (0x7F) and its codes are 0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fouroversix_plugin.nvfp4 import (
    E2M1_VALUES,
    NVFP4Tensor,
    ScaleLayout,
    check_columns,
    pack,
    padded_scale_shape,
    scales_to_layout,
    unpack,
)
from fouroversix_plugin.recipe import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, Granularity, Recipe

_FLT_MAX = torch.finfo(torch.float32).max


def quantize(x: Tensor, recipe: Recipe, granularity: Granularity = "tensor", amax: Tensor | None = None) -> NVFP4Tensor:
    """Quantize x [M, K] (fp32, fp16 or bf16; K a multiple of 16).

    Args:
        recipe: what to compute.
        granularity: one decode scale for the tensor, or one per row ("token").
        amax: the largest magnitude to scale for, if not that of ``x``: fp32, [] for "tensor", [M] for "token".

    Returns:
        packed [M, K/2], block_scale [M, K/16], decode_scale [] or [M].
    """
    check_columns("x", x.shape[-1])
    blocks = x.float().unflatten(-1, (-1, BLOCK_SIZE))  # [M, C, 16]
    rows = x.shape[0]
    if amax is None:
        amax = row_amax(x) if granularity == "token" else row_amax(x.reshape(1, -1)).reshape(())
    finite_amax = amax.isfinite()
    A = torch.where(finite_amax, amax, 0.0)

    enc, dec = global_scales(A, recipe)
    # one value per row, shaped to meet [M, C, 16]
    A_, enc_, dec_ = (scale.expand(rows).reshape(-1, 1, 1) for scale in (A, enc, dec))

    v = blocks.abs().amax(dim=-1, keepdim=True)
    six = _constant(E2M1_MAX, x)
    b = (v / six) * enc_ if recipe.adaptive else v * (enc_ * (_constant(1.0, x) / six))
    sf6, inv6 = _block_scale(b, dec_)
    codes = e2m1_codes(blocks * inv6)
    sf = sf6
    if recipe.adaptive:
        sf4, inv4 = _block_scale(b * 1.5, dec_)
        codes4 = e2m1_codes(blocks * inv4)
        error6 = _error(codes, sf6, blocks, A_, enc_, dec_, recipe)
        error4 = _error(codes4, sf4, blocks, A_, enc_, dec_, recipe)
        four = error4 < error6
        codes, sf = torch.where(four, codes4, codes), torch.where(four, sf4, sf6)

    zero = (v == 0) | ~finite_amax.expand(rows).reshape(-1, 1, 1)
    broken = ~v.isfinite() & ~zero
    codes = torch.where(zero | broken, 0, codes).to(torch.uint8)
    sf = torch.where(zero, 0.0, sf).to(torch.float8_e4m3fn)
    sf = torch.where(broken, 0x7F, sf.view(torch.uint8)).view(torch.float8_e4m3fn)
    dec = torch.where(finite_amax, dec, torch.nan)
    return NVFP4Tensor(pack(codes.flatten(-2)), sf.squeeze(-1), dec)


def row_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each row of x [..., K] in fp32; NaN where the row holds one; 0 for an empty row."""
    if x.shape[-1] == 0:
        return torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    return x.abs().amax(dim=-1).float()


def global_scales(amax: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The encode scale (R * 6) / amax and its reciprocal, the decode scale, of finite fp32 ``amax``."""
    enc = _constant(recipe.encoded_amax, amax) / amax
    enc = enc.clamp(max=_FLT_MAX)
    enc = torch.where((amax == 0) | (enc == 0), 1.0, enc)
    return enc, _constant(1.0, amax) / enc


def e2m1_codes(scaled: Tensor) -> Tensor:
    """int64 codes 0..15 of fp32 values: nearest e2m1, ties to the even code, saturating; the sign of 0 is kept."""
    magnitude = scaled.abs()
    code = torch.zeros_like(scaled, dtype=torch.int64)
    # A midpoint between codes n and n + 1 belongs to the even one: it counts as above only where n is odd.
    for n in range(7):
        midpoint = (E2M1_VALUES[n] + E2M1_VALUES[n + 1]) / 2
        code += magnitude >= midpoint if n % 2 else magnitude > midpoint
    return code + 8 * scaled.signbit()


def e2m1_values(codes: Tensor) -> Tensor:
    """fp32 values of codes 0..15. Computed: a table would be copied to the device, which no CUDA graph captures."""
    n = (codes & 7).float()
    magnitude = torch.where(n < 4, n * 0.5, torch.where(n < 6, n - 2, n * 2 - 8))
    return torch.where(codes > 7, -magnitude, magnitude)


def _block_scale(b: Tensor, dec: Tensor) -> tuple[Tensor, Tensor]:
    """The E4M3 block scale nearest to b (in fp32) and what values are multiplied by to be encoded under it."""
    sf = b.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    inv = _constant(1.0, b) / (sf * dec)
    return sf, torch.where(sf == 0, _FLT_MAX, inv.clamp(max=_FLT_MAX))


def _error(codes: Tensor, sf: Tensor, x: Tensor, A: Tensor, enc: Tensor, dec: Tensor, recipe: Recipe) -> Tensor:
    """Error [M, C, 1] of one candidate, summed from column 0 to 15 in this order."""
    q = e2m1_values(codes)
    if recipe.error == "amax":
        d = ((q * sf) * A) / _constant(recipe.encoded_amax, x) - x
    elif recipe.error == "decode_scale":
        d = (q * sf) * dec - x
    else:
        d = (q * sf) - x * enc
    t = d * d if recipe.metric == "mse" else d.abs()
    if recipe.metric == "abs_max":
        return t.amax(dim=-1, keepdim=True)
    total = torch.zeros_like(t[..., :1])
    for i in range(BLOCK_SIZE):
        total = total + t[..., i : i + 1]
    return total


def unscaled(packed: Tensor, block_scale: Tensor) -> Tensor:
    """e2m1 * block_scale as fp32 [..., M, K]: at most 6 significant bits, so exact in bf16 and fp16 too."""
    return e2m1_values(unpack(packed)) * block_scale.float().repeat_interleave(BLOCK_SIZE, dim=-1)


def dequantize(q: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(e2m1 * block_scale) * decode_scale in fp32, rounded once to ``dtype``; [..., M, K]."""
    return (unscaled(q.packed, q.block_scale) * q.row_decode_scale.unsqueeze(-1)).to(dtype)


def quantize_values(x: Tensor, recipe: Recipe, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize x [M, K] for a GEMM: e2m1 * block_scale in the dtype of x (exact), and token_scale [M].

    ``amax`` None scales each row for its own; fp32 [] (static) or [M] is the largest magnitude to scale for instead.
    """
    q = quantize(x, recipe, "token", None if amax is None else amax.expand(x.shape[0]))
    return unscaled(q.packed, q.block_scale).to(x.dtype), q.decode_scale


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up in fp32, rounded to the dtype of x = [gate, up] [M, 2K]: [M, K]."""
    gate, up = x.float().chunk(2, dim=-1)
    return gated_activation(gate, up, "silu").to(x.dtype)


Activation = Literal["silu", "gelu", "gelu_tanh"]


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up in fp32.

    silu is pinned: e^-gate is spelled out, as every library's differs in the last place, and so would bytes that follow
    from it. For gelu's functions torch's are taken.
    """
    if activation == "silu":
        exponential = torch.where(-gate > 89.0, torch.inf, _exp((-gate).clamp(-104.0, 89.0)))
        return (gate / (exponential + 1.0)) * up
    if activation == "gelu":
        return F.gelu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    raise ValueError(f"activation: got {activation!r}, needed 'silu', 'gelu' or 'gelu_tanh'")


def _exp(x: Tensor) -> Tensor:
    """e^x for -104 <= x <= 89 within 2 units in the last place: 2^n * e^r, |r| <= ln(2) / 2, by the Taylor series."""
    n = (x * float.fromhex("0x1.715476p+0") + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer
    # ln(2) in two parts, the first of so few digits that n times it is exact.
    r = (x - n * float.fromhex("0x1.62ep-1")) - n * float.fromhex("0x1.0bfbe8p-15")
    p = torch.full_like(r, float.fromhex("0x1.a01a02p-13"))
    for coefficient in (
        "0x1.6c16c2p-10",
        "0x1.111112p-7",
        "0x1.555556p-5",
        "0x1.555556p-3",
        "0x1p-1",
        "0x1p0",
        "0x1p0",
    ):
        p = p * r + float.fromhex(coefficient)
    exponent = n.nan_to_num(0.0).int()
    half = exponent >> 1
    return (p * _power_of_two(half)) * _power_of_two(exponent - half)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def expert_amax(x: Tensor, expert_offsets: Tensor, recipe: Recipe, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What rows sorted by expert are scaled for, one decode scale an expert. Nothing is read on the host.

    Args:
        x: [M, K].
        expert_offsets: int32 [E + 1], ascending within 0..M: rows offsets[e] .. offsets[e + 1] - 1 belong to expert e.
        amax: fp32 [E], or None for the largest magnitude of each expert's rows.

    Returns:
        (the amax of each row's expert [M], decode scales [E]). That of a row without an expert is NaN, so that
        :func:`quantize` by "token" gives it codes and block scales of 0.
    """
    E = expert_offsets.shape[0] - 1
    expert = _expert_of_row(x.shape[0], expert_offsets)
    if amax is None:
        # As integers, in whose order NaN comes above infinity.
        largest = torch.zeros(E + 1, dtype=torch.int32, device=x.device)
        amax = largest.scatter_reduce(0, expert, row_amax(x).view(torch.int32), "amax")[:E].view(torch.float32)
    finite = amax.isfinite()
    decode = global_scales(torch.where(finite, amax, 0.0), recipe)[1]
    return torch.cat((amax, _constant(torch.nan, x).view(1)))[expert], torch.where(finite, decode, torch.nan)


def expert_scales_to_layout(block_scale: Tensor, expert_offsets: Tensor, layout: ScaleLayout) -> Tensor:
    """Row-major block scales [M, C] of rows sorted by expert, each expert in tiles of its own.

    Returns:
        ``row_major`` [M, C] as it is, else flat: expert e begins at the tiles that the experts before it fill, and the
        whole has room for any split of M rows over the E experts: M + E * (tile rows - 1) rows, rounded down to tiles.
        Padding is 0; rows of no expert are left out.
    """
    rows, columns = block_scale.shape
    tile = padded_scale_shape(layout, 1, 1)[0]
    if tile == 1:
        return block_scale
    E = expert_offsets.shape[0] - 1
    expert = _expert_of_row(rows, expert_offsets)
    tiles = (expert_offsets.diff() + (tile - 1)) // tile
    start = torch.cat((tiles.cumsum(0) - tiles, tiles.new_zeros(1)))[expert] * tile
    total = (rows + E * (tile - 1)) // tile * tile
    own = torch.arange(rows, device=block_scale.device) - expert_offsets[expert.clamp(max=max(E - 1, 0))]
    spread = torch.zeros(total + 1, columns, dtype=torch.uint8, device=block_scale.device)
    spread[torch.where(expert < E, start + own, total)] = block_scale.view(torch.uint8)
    return scales_to_layout(spread[:total], layout).view(block_scale.dtype)


def _expert_of_row(rows: int, expert_offsets: Tensor) -> Tensor:
    """int64 [rows]: the expert of each row, E where it has none."""
    row = torch.arange(rows, dtype=torch.int32, device=expert_offsets.device)
    expert = torch.bucketize(row, expert_offsets[1:].contiguous(), right=True)
    return torch.where(row < expert_offsets[0], expert_offsets.shape[0] - 1, expert)


def scaled_matmul(x: Tensor, weight: Tensor, token_scale: Tensor | None, decode_scale: Tensor) -> Tensor:
    """((x · weight^T) * token_scale) * decode_scale in fp32, [M, N].

    ``weight`` is e2m1 * block_scale [N, K], ``decode_scale`` [N]. With ``token_scale`` [M] (W4A4), x is
    e2m1 * block_scale too, and every product of the sum is exact in fp32.
    """
    with _without_autocast(x.device):
        y = x.float() @ weight.float().T
    y = y if token_scale is None else y * token_scale.unsqueeze(-1)
    return y * decode_scale


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """It would round the operands of a product to bf16."""
    there = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if there else nullcontext()


def linear(
    x: Tensor,
    w: NVFP4Tensor,
    activations: Recipe | None = None,
    bias: Tensor | None = None,
    input_amax: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias for x [M, K] and w [N, K], in the dtype of x.

    ``activations`` None is W4A16; a recipe quantizes x first (W4A4): per token, or all for ``input_amax`` (fp32 []).
    """
    y = _matmul(x, w, activations, input_amax)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _matmul(x: Tensor, w: NVFP4Tensor, activations: Recipe | None, amax: Tensor | None) -> Tensor:
    values, token_scale = (x, None) if activations is None else quantize_values(x, activations, amax)
    return scaled_matmul(values, unscaled(w.packed, w.block_scale), token_scale, w.row_decode_scale)


def moe(
    x: Tensor,
    w13: NVFP4Tensor,
    w2: NVFP4Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activations: Recipe | None = None,
    activation: str = "silu",
    apply_router_weight_on_input: bool = False,
    input_amax: Tensor | None = None,
    inner_amax: Tensor | None = None,
) -> Tensor:
    """Gated mixture of experts for x [M, H]: w13 [E, 2I, H] (gate rows, then up rows), w2 [E, H, I].

    Gate, up and their product are rounded to the dtype of x, as separate kernels would hold them; with
    ``activations`` both x and the product are quantized per token, or for ``input_amax`` and ``inner_amax`` (fp32 []).
    The top-k sum runs in fp32 over the slots in order.
    ``topk_ids`` [M, top_k] outside 0..E-1 (an expert of another rank is -1) contribute nothing, whatever their weight.

    Every expert sees every token, so that no shape or branch depends on the routing (CUDA graphs).
    """
    M, top_k = topk_ids.shape
    topk_ids = topk_ids.long()  # narrower ones are compared with the number of an expert cut to their width
    topk_weights = weights_of_experts(topk_weights, topk_ids, w13.shape[0])
    half, H = w13.shape[-2] // 2, w2.shape[-2]
    rows = x.unsqueeze(1)  # [M, 1, H]: what an expert sees of a token ...
    if apply_router_weight_on_input:
        rows = (rows.float() * topk_weights.float().unsqueeze(-1)).to(x.dtype)  # ... [M, top_k, H]: or of a slot
    slots = torch.zeros(M, top_k, H, dtype=torch.float32, device=x.device)
    for e in range(w13.shape[0]):
        gate_up = linear(rows.flatten(0, 1), w13[e], activations, None, input_amax).float()
        hidden = gated_activation(gate_up[:, :half], gate_up[:, half:], activation).to(x.dtype)
        y = _matmul(hidden, w2[e], activations, inner_amax).unflatten(0, rows.shape[:2])
        slots = torch.where((topk_ids == e).unsqueeze(-1), y, slots)
    return combine(slots, topk_weights, apply_router_weight_on_input).to(x.dtype)


def weights_of_experts(topk_weights: Tensor, topk_ids: Tensor, experts: int) -> Tensor:
    """Router weights, 0 where there is no such expert: those may be NaN, and 0 times that is no 0."""
    ids = topk_ids.long()
    return torch.where((ids >= 0) & (ids < experts), topk_weights, 0.0)


def combine(slots: Tensor, topk_weights: Tensor, apply_router_weight_on_input: bool) -> Tensor:
    """Sum of the top-k slots [M, top_k, H] in fp32, slot 0 first, weighted unless the input already was."""
    total = torch.zeros(slots.shape[0], slots.shape[2], dtype=torch.float32, device=slots.device)
    for k in range(slots.shape[1]):
        slot = slots[:, k]
        total = total + (slot if apply_router_weight_on_input else slot * topk_weights[:, k, None].float())
    return total


def _constant(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=like.device)
