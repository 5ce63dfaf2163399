"""Products of packed weights as Triton kernels: what runs on the device. :mod:`triton_gemm` launches it.

A product is Y^T = W X^T, so that the weight is the operand that matrix instructions take from registers: codes become
numbers there and are never written anywhere. X comes from shared memory.

A word of 32 bits has, for one row of the weight and one j of 0..15, element j of the eight blocks of 16 columns among
128: a plane of the words (four bits of each) is a block, with one scale a row. Sixteen bits of a word hold four planes,
a code as its sign s and magnitude bits m2 m1 m0::

    bit     15  14  13  12  11  10   9   8   7   6   5   4   3   2   1   0
    plane    0   3   3   1   3   3   2   0   0   0   1   1   1   2   2   2
    of it    s   s  m0   s  m2  m1   s  m2  m1  m0  m2  m1  m0  m2  m1  m0

Planes 0, 1 and 2 become numbers by a shift and a mask: with the sign in bit 15 and the magnitude in bits 8..6 they are
the bf16 number e2m1 * 2^-126, subnormals included. A block scale s = 2^e (1 + m/8) is stored as the byte
(e + 21) << 3 | m: a shift and a sum make it s * 2^118 in bf16, a shift s * 2^6 in fp16, where codes are e2m1 * 2^-14.
Either way the product e2m1 * s * 2^-8 is exact. The byte of the scale 0 is 0, that of NaN 0xFF.

Launches pass ``enable_fp_fusion=False``: the epilogues' products and sums are rounded one by one, as the reference's.
"""

from __future__ import annotations

import functools
from typing import Final

import triton
import triton.language as tl

from fouroversix_plugin.kernels.triton_kernels import _beside, _exp, _narrow, _silu_and_mul, _widen
from fouroversix_plugin.recipe import BLOCK_SIZE

STRIP_ROWS: Final = 64
"""Rows whose words lie together, those of 128 columns at a time."""
PLANES: Final = 8
"""Blocks in a word."""

_BLOCK = tl.constexpr(BLOCK_SIZE)
_PLANES = tl.constexpr(PLANES)
_COLUMNS = tl.constexpr(PLANES * BLOCK_SIZE)  # of a word
_STRIP_ROWS = tl.constexpr(STRIP_ROWS)
_STRIP_WORDS = tl.constexpr(STRIP_ROWS * BLOCK_SIZE)
_STRIP_SCALES = tl.constexpr(STRIP_ROWS * PLANES // 4)  # words of four scales
_UNSCALE = tl.constexpr(256.0)  # what is summed is e2m1 * s * 2^-8


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that a program on a CUDA device can have."""
    room: int = triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
    return room


# --- unpacking ---


def _assembly(dtype: str) -> str:
    """PTX that makes eight planes ($0..$7) of two words ($8, $9) and their eight scales ($10..$17).

    A register of a plane has the number of the first word in its low half and that of the second in its high half, as
    have those of the scales. Which elements meet in a register is the compiler's choice; nothing here depends on it.
    """
    if dtype == "bf16":
        planes = """
        and.b32 {0}, q, 0x81C081C0;
        shl.b32 t, q, 3;
        and.b32 {1}, t, 0x81C081C0;
        shl.b32 t, q, 6;
        and.b32 {2}, t, 0x81C081C0;
        shl.b32 t, q, 1;
        and.b32 u, t, 0x80008000;
        shr.u32 t, q, 3;
        lop3.b32 u, t, 0x01800180, u, 0xEA;
        shr.u32 t, q, 7;
        lop3.b32 {3}, t, 0x00400040, u, 0xEA;
        """
    else:
        planes = """
        and.b32 u, q, 0x80008000;
        shl.b32 t, q, 3;
        lop3.b32 {0}, t, 0x0E000E00, u, 0xEA;
        and.b32 u, t, 0x80008000;
        shl.b32 t, q, 6;
        lop3.b32 {1}, t, 0x0E000E00, u, 0xEA;
        and.b32 u, t, 0x80008000;
        shl.b32 t, q, 9;
        lop3.b32 {2}, t, 0x0E000E00, u, 0xEA;
        shl.b32 t, q, 1;
        and.b32 u, t, 0x80008000;
        lop3.b32 u, q, 0x0C000C00, u, 0xEA;
        shr.u32 t, q, 4;
        lop3.b32 {3}, t, 0x02000200, u, 0xEA;
        """
    # A product alone of two bf16 begins with sm_90; a sum with -0 changes no product.
    scaled = "\n".join(f"fma.rn.{dtype}x2 ${p}, p{p}, ${p + 10}, minus_zero;" for p in range(8))
    return f"""{{
        .reg .b32 q, t, u, minus_zero, p<8>;
        mov.b32 minus_zero, 0x80008000;
        prmt.b32 q, $8, $9, 0x5410;
        {planes.format("p0", "p1", "p2", "p3")}
        prmt.b32 q, $8, $9, 0x7632;
        {planes.format("p4", "p5", "p6", "p7")}
        {scaled}
    }}"""


# An output is written while inputs are still to be read.
_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 10))
_BF16_ASSEMBLY = tl.constexpr(_assembly("bf16"))
_FP16_ASSEMBLY = tl.constexpr(_assembly("f16"))
_BF16_PLANES = tl.constexpr((tl.bfloat16,) * PLANES)
_FP16_PLANES = tl.constexpr((tl.float16,) * PLANES)


@triton.jit
def _scale(words, INDEX: tl.constexpr, dtype: tl.constexpr):
    """The scale in byte ``INDEX`` of words [ROWS], as the number that codes are multiplied by: [ROWS, 1]."""
    byte = (words >> (8 * INDEX)) & 0xFF
    # A scale of 0 may come with any codes.
    bits = tl.where(byte == 0, 0, byte * 16 + 0x7000)
    if dtype == tl.float16:
        scale = (byte << 7).to(tl.int16).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16:
        scale = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        scale = (bits << 16).to(tl.float32, bitcast=True)
    return scale[:, None]


@triton.jit
def _plane(words, scales, INDEX: tl.constexpr):
    """Plane ``INDEX`` in fp32, for X in fp32 and for Triton's interpreter, which knows neither PTX nor bf16."""
    q = words >> (16 * (INDEX // 4))
    number = (q << (3 * (INDEX % 4))) & 0x81C0
    if INDEX % 4 == 3:
        number = ((q << 1) & 0x8000) | ((q >> 3) & 0x0180) | ((q >> 7) & 0x0040)
    return (number << 16).to(tl.float32, bitcast=True) * scales


@triton.jit
def _unpack(words, low_scales, high_scales, dtype: tl.constexpr):
    """e2m1 * block_scale * 2^-8 of words [ROWS, 16] and words of four scales [ROWS]: columns 0..63 and 64..127."""
    s0, s1, s2, s3 = (
        _scale(low_scales, 0, dtype),
        _scale(low_scales, 1, dtype),
        _scale(low_scales, 2, dtype),
        _scale(low_scales, 3, dtype),
    )
    s4, s5, s6, s7 = (
        _scale(high_scales, 0, dtype),
        _scale(high_scales, 1, dtype),
        _scale(high_scales, 2, dtype),
        _scale(high_scales, 3, dtype),
    )
    if dtype == tl.float32:
        p0, p1, p2, p3 = _plane(words, s0, 0), _plane(words, s1, 1), _plane(words, s2, 2), _plane(words, s3, 3)
        p4, p5, p6, p7 = _plane(words, s4, 4), _plane(words, s5, 5), _plane(words, s6, 6), _plane(words, s7, 7)
    else:
        p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
            _BF16_ASSEMBLY if dtype == tl.bfloat16 else _FP16_ASSEMBLY,
            _CONSTRAINTS,
            [words, s0, s1, s2, s3, s4, s5, s6, s7],
            _BF16_PLANES if dtype == tl.bfloat16 else _FP16_PLANES,
            is_pure=True,
            pack=2,
        )
    # Planes are put side by side in registers: nothing moves between threads.
    return _beside(_beside(p0, p1), _beside(p2, p3)), _beside(_beside(p4, p5), _beside(p6, p7))


# --- sums ---


@triton.jit
def _load_numbers(weight, block_scale, row, word, words, dtype: tl.constexpr):
    """What word ``word`` of ``words`` has of rows [ROWS] of the weight: see :func:`_unpack`."""
    strip = (row // _STRIP_ROWS) * words + word
    at = strip * _STRIP_WORDS + (row % _STRIP_ROWS) * _BLOCK
    codes = tl.load(weight + at[:, None] + tl.arange(0, _BLOCK)[None, :])
    at = strip * _STRIP_SCALES + row % _STRIP_ROWS
    return _unpack(codes, tl.load(block_scale + at), tl.load(block_scale + at + _STRIP_ROWS), dtype)


@triton.jit
def _load_tokens(x, present, column, columns, WIDTH: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr):
    """[WIDTH, TOKENS]: columns ``column`` and on of the rows at ``x`` [TOKENS], 0 for those that are not present."""
    k = column + tl.arange(0, WIDTH)[:, None]
    mask = present[None, :] if WHOLE else present[None, :] & (k < columns)
    return tl.load(x[None, :] + k, mask, other=0.0).to(dtype)


@triton.jit
def _add(sums, low, high, low_tokens, high_tokens, CHAINED: tl.constexpr):
    if CHAINED:
        sums = tl.dot(low, low_tokens, sums, input_precision="ieee")
        sums = tl.dot(high, high_tokens, sums, input_precision="ieee")
    else:
        sums = tl.dot(_beside(low, high), low_tokens, sums, input_precision="ieee")
    return sums


@triton.jit
def _sums(
    x,
    present,
    weight,
    block_scale,
    row,
    other_row,
    begin,
    end,
    columns,
    words,
    GATED: tl.constexpr,
    WHOLE: tl.constexpr,
    CHAINED: tl.constexpr,
    dtype: tl.constexpr,
):
    """fp32 [ROWS, TOKENS] twice: rows ``row`` and, if GATED, ``other_row`` [ROWS] by the tokens at ``x`` [TOKENS].

    What is summed are words ``begin`` .. ``end`` - 1 of a row. ``WHOLE``: columns are a multiple of 128. ``CHAINED``:
    two products a word, of which one is the other's sum. That makes Triton give every warp rows of its own where warps
    multiply by themselves (up to sm_89, and sm_120); else it would have two unpack the same rows. Where four multiply
    together (sm_90), it overlaps the parts of one product with the unpacking, but waits between two.
    """
    HALF: tl.constexpr = _COLUMNS // 2
    sums = tl.zeros((row.shape[0], x.shape[0]), tl.float32)
    other_sums = sums
    for word in range(begin, end):
        column = word * _COLUMNS
        if CHAINED:
            low_tokens = _load_tokens(x, present, column, columns, HALF, WHOLE, dtype)
            high_tokens = _load_tokens(x, present, column + HALF, columns, HALF, WHOLE, dtype)
        else:
            low_tokens = _load_tokens(x, present, column, columns, _COLUMNS, WHOLE, dtype)
            high_tokens = low_tokens
        low, high = _load_numbers(weight, block_scale, row, word, words, dtype)
        sums = _add(sums, low, high, low_tokens, high_tokens, CHAINED)
        if GATED:
            low, high = _load_numbers(weight, block_scale, other_row, word, words, dtype)
            other_sums = _add(other_sums, low, high, low_tokens, high_tokens, CHAINED)
    return sums, other_sums


@triton.jit
def _scaled(sums, token_scale, decode_scale, OWN: tl.constexpr = True):
    """(sums * token_scale [TOKENS]) * decode_scale [ROWS]; token_scale may be None.

    OWN sums are those of stored scales, others' of e2m1 * block_scale.
    """
    if OWN:
        sums *= _UNSCALE
    if token_scale is not None:
        sums *= token_scale[None, :]
    return sums * decode_scale[:, None]


# --- kernels ---


@triton.jit(do_not_specialize=["tokens", "words_of_split"])
def multiply(
    x,
    weight,
    block_scale,
    decode_scale,
    token_scale,
    bias,
    out,
    tokens,
    rows,
    columns,
    words,
    words_of_split,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    CHAINED: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """A tile of ``out`` [tokens, rows] from x [tokens, columns]; if SPLIT, of the bare sums of a split.

    ``out`` then is fp32 [splits, tokens, rows], for :func:`add_splits`.
    """
    dtype: tl.constexpr = x.dtype.element_ty if COMPILED else tl.float32
    # Programs that run at a time share rows of the weight and tokens, not just one of them: what they read stays in L2.
    row_tiles = tl.cdiv(rows, ROWS)
    together = TILES_TOGETHER * tl.cdiv(tokens, TOKENS)
    first = tl.program_id(0) // together * TILES_TOGETHER
    wide = tl.minimum(row_tiles - first, TILES_TOGETHER)
    row = (first + tl.program_id(0) % together % wide) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) % together // wide * TOKENS + tl.arange(0, TOKENS)

    # Rows and tokens past the end are the last one again: nothing in the loop is masked for them.
    existing_row, existing = tl.minimum(row, rows - 1), tl.minimum(token, tokens - 1)
    begin = tl.program_id(1) * words_of_split
    end = tl.minimum(begin + words_of_split, words)
    sums, _ = _sums(
        x + existing.to(tl.int64) * columns,
        token < tokens,
        weight,
        block_scale,
        existing_row,
        existing_row,
        begin,
        end,
        columns,
        words,
        False,
        WHOLE,
        CHAINED,
        dtype,
    )

    at = token.to(tl.int64)[None, :] * rows + row[:, None]
    mask = (row < rows)[:, None] & (token < tokens)[None, :]
    if SPLIT:
        tl.store(out + tl.program_id(1).to(tl.int64) * tokens * rows + at, sums, mask)
    else:
        y = _scaled(
            sums,
            None if token_scale is None else tl.load(token_scale + existing),
            tl.load(decode_scale + existing_row),
        )
        if bias is not None:
            y += _widen(tl.load(bias + existing_row))[:, None]
        tl.store(out + at, _narrow(y, out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tokens", "splits"])
def add_splits(
    sums,
    decode_scale,
    token_scale,
    bias,
    out,
    tokens,
    rows,
    splits,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    OWN: tl.constexpr,
):
    """What :func:`multiply` does after its sum, with that of the splits [splits, tokens, rows], the first one first.

    OWN as :func:`_scaled` has it.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    existing_row, existing = tl.minimum(row, rows - 1), tl.minimum(token, tokens - 1)
    at = existing.to(tl.int64)[None, :] * rows + existing_row[:, None]
    total = tl.load(sums + at)
    for _ in range(1, splits):
        sums += tl.cast(tokens, tl.int64) * rows
        total += tl.load(sums + at)
    y = _scaled(
        total,
        None if token_scale is None else tl.load(token_scale + existing),
        tl.load(decode_scale + existing_row),
        OWN,
    )
    if bias is not None:
        y += _widen(tl.load(bias + existing_row))[:, None]
    tl.store(out + at, _narrow(y, out.dtype.element_ty), (row < rows)[:, None] & (token < tokens)[None, :])


@triton.jit
def _activated(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up, as :func:`fouroversix_plugin.reference.gated_activation`; gelu within fp32's rounding."""
    if ACTIVATION == "silu":
        y = _silu_and_mul(gate, up)
    elif ACTIVATION == "gelu":
        y = (gate * 0.5) * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        # 0.5 * (1 + tanh(u)) = 1 / (1 + e^-2u), u = sqrt(2 / pi) * (gate + 0.044715 gate^3)
        t = -1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        e = _exp(tl.where(t < -104.0, -104.0, tl.where(t > 89.0, 89.0, t)))
        e = tl.where(t > 89.0, float("inf"), e)
        y = tl.math.div_rn(gate, e + 1.0) * up
    return y


@triton.jit(do_not_specialize=["experts", "slots_of_row"])
def multiply_experts(
    x,
    weight,
    block_scale,
    decode_scale,
    token_scale,
    slots,
    offsets,
    out,
    experts,
    slots_of_row,
    rows,
    columns,
    words,
    strips,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,
    CHAINED: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """A tile of one expert's product: ``TOKENS`` of its slots by ``ROWS`` rows of ``out``.

    With an ACTIVATION the weight has 2 * ``rows`` rows, gate and up; slot s reads row s // slots_of_row of x, and out
    [slots, rows] is in the order of experts, in the dtype of x. Without, x is in that order, and row s of fp32 ``out``
    is slot s. TOGETHER: gate and up are summed in one loop. ``slots`` and ``offsets`` are
    :func:`fouroversix_plugin.kernels.routing.sort_by_expert`'s.
    """
    dtype: tl.constexpr = x.dtype.element_ty if COMPILED else tl.float32
    GATED: tl.constexpr = ACTIVATION != ""
    # Tiles are numbered expert by expert.
    tile, row_tile = tl.program_id(0) // tl.cdiv(rows, ROWS), tl.program_id(0) % tl.cdiv(rows, ROWS)
    e = tl.arange(0, EXPERTS)
    begins = tl.load(offsets + e, e < experts, other=0)
    ends = tl.load(offsets + e + 1, e < experts, other=0)
    tiles = (ends - begins + (TOKENS - 1)) // TOKENS
    before = tl.cumsum(tiles, 0) <= tile
    expert = tl.sum(before.to(tl.int32), axis=0)
    if expert >= experts:
        return  # there could have been so many tiles
    tile -= tl.sum(tl.where(before, tiles, 0), axis=0)
    end = tl.load(offsets + expert + 1)
    place = tl.load(offsets + expert) + tile * TOKENS + tl.arange(0, TOKENS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    existing_row, existing = tl.minimum(row, rows - 1), tl.minimum(place, end - 1)

    slot = tl.load(slots + existing)
    of_row = slot // slots_of_row if GATED else existing
    strips_before = expert.to(tl.int64) * strips * words
    x += of_row.to(tl.int64) * columns
    weight += strips_before * _STRIP_WORDS
    block_scale += strips_before * _STRIP_SCALES
    up_row = existing_row + rows
    sums, up_sums = _sums(
        x,
        place < end,
        weight,
        block_scale,
        existing_row,
        up_row,
        0,
        words,
        columns,
        words,
        GATED and TOGETHER,
        WHOLE,
        CHAINED,
        dtype,
    )
    if GATED and not TOGETHER:
        up_sums, _ = _sums(
            x, place < end, weight, block_scale, up_row, up_row, 0, words, columns, words, False, WHOLE, CHAINED, dtype
        )

    of_token = None if token_scale is None else tl.load(token_scale + of_row)
    decode_scale += expert * (2 * rows if GATED else rows)
    y = _scaled(sums, of_token, tl.load(decode_scale + existing_row))
    to_row = slot
    if GATED:
        up = _scaled(up_sums, of_token, tl.load(decode_scale + up_row))
        held: tl.constexpr = out.dtype.element_ty
        y = _activated(_widen(_narrow(y, held)), _widen(_narrow(up, held)), ACTIVATION)
        to_row = place
    at = to_row.to(tl.int64)[None, :] * rows + row[:, None]
    mask = (row < rows)[:, None] & (place < end)[None, :]
    tl.store(out + at, _narrow(y, out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["top_k", "experts"])
def combine(slots, topk_weights, topk_ids, out, top_k, experts, columns, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr):
    """Row of ``out`` [M, columns]: the sum of its slots [M * top_k, columns], slot 0 first; nobody's are left out."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in range(top_k):
        expert = tl.load(topk_ids + token * top_k + k)
        ours = (expert >= 0) & (expert < experts)
        y = tl.load(slots + (token * top_k + k) * columns + column, column < tl.where(ours, columns, 0), other=0.0)
        if WEIGHTED:
            y *= _widen(tl.load(topk_weights + token * top_k + k, ours, other=0.0))
        total += y
    tl.store(out + token * columns + column, _narrow(total, out.dtype.element_ty), column < columns)
