"""The quantizer as Triton kernels: what runs on the device. :mod:`fouroversix_plugin.kernels.triton` launches it.

Semantics: reference.py, byte for byte, and operation by operation wherever one could change a byte. As in
csrc/quantize.cu, the choice between 4 and 6 mostly needs less than the specification's errors (:func:`_filter`); the
rest of its shortcuts, which are instructions of certain chips, have no place here.

What would change a byte, and what is done about it:

- A product and a sum become one operation, rounded once. Launches pass ``enable_fp_fusion=False``.
- Subnormal numbers become 0. Triton flushes them only in operations that are not used here; a test reads the PTX.
- ``/`` is a division that may be off in the last place. Every division here is ``div_rn``, the IEEE one.
- A reduction adds in the order of a tree, another one for every layout. The 16 terms of an error are taken apart and
  added in the order of the columns (:func:`_sum_in_order`).
- A cast to E4M3 is a different instruction, or none, on different chips. Numbers are rounded by adding and subtracting
  a power of two (:func:`_round_to_mantissa`), and their bytes are put together as integers.
- A maximum of floats drops NaN or keeps it, as the chip likes. Magnitudes are compared as the integers that hold them,
  in whose order infinity comes after every number and NaN after infinity; elsewhere, what NaN becomes is overwritten.
- Every library's exponential is another. :func:`_exp` has the reference's operations.
- A conversion to or from bf16 is another instruction, or code of Triton's interpreter. bf16 travels as int16, and is
  widened and rounded as integers.

A thread holds a block of 16 values, so that taking its columns apart moves nothing between threads: a tile [B, 16] is
loaded as pieces of 16 bytes a row, which the compiler gives whole to a thread, and the pieces are put side by side in
registers (:func:`_beside`). Loaded at once, a row would be spread over several threads, and every split would go
through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fouroversix_plugin.recipe import BLOCK_SIZE, E2M1_MAX, E4M3_MAX

TILE = 256
"""Blocks of 16 values that a program works on at a time, one a thread."""
WARPS = TILE // 32

_BLOCK = tl.constexpr(BLOCK_SIZE)
_E2M1_MAX = tl.constexpr(E2M1_MAX)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_FLT_MAX = tl.constexpr(float.fromhex("0x1.fffffep+127"))
_SIXTH = tl.constexpr(float.fromhex("0x1.555556p-3"))  # 1 / 6 in fp32
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # of a float's bits, all but the sign
_EXPONENT = tl.constexpr(0x7F800000)
_E4M3_NAN = tl.constexpr(0x7F)
_TILE = tl.constexpr(TILE)

# e^x, as in reference.py: the Taylor series' coefficients, and ln(2) in two parts.
_LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))
_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62ep-1"))
_LN2_LOW = tl.constexpr(float.fromhex("0x1.0bfbe8p-15"))
_EXP_7 = tl.constexpr(float.fromhex("0x1.a01a02p-13"))
_EXP_6 = tl.constexpr(float.fromhex("0x1.6c16c2p-10"))
_EXP_5 = tl.constexpr(float.fromhex("0x1.111112p-7"))
_EXP_4 = tl.constexpr(float.fromhex("0x1.555556p-5"))
_EXP_3 = tl.constexpr(float.fromhex("0x1.555556p-3"))
_TO_INTEGER = tl.constexpr(float.fromhex("0x1.8p23"))  # added, it leaves an integer in the last bits
_TO_INTEGER_BITS = tl.constexpr(0x4B400000)


# --- tiles ---


@triton.jit
def _beside(a, b):
    """[B, W] and [B, W] as [B, 2W]."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _apart(a):
    """[B, 2W] as [B, W] and [B, W]: the inverse of :func:`_beside`."""
    return tl.split(tl.permute(tl.reshape(a, (a.shape[0], 2, a.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _load(x, at, mask, WIDTH: tl.constexpr):
    """[B, 16] from the 16 values at each of ``at`` [B]; ``WIDTH`` values are 16 bytes."""
    pointers = x + at[:, None] + tl.arange(0, WIDTH)[None, :]
    mask = mask[:, None]
    a = _beside(tl.load(pointers, mask, other=0), tl.load(pointers + WIDTH, mask, other=0))
    if WIDTH == 4:
        pointers += 2 * WIDTH
        b = _beside(tl.load(pointers, mask, other=0), tl.load(pointers + WIDTH, mask, other=0))
        a = _beside(a, b)
    return a


@triton.jit
def _store(x, at, values, mask, WIDTH: tl.constexpr):
    """The inverse of :func:`_load`."""
    pointers = x + at[:, None] + tl.arange(0, WIDTH)[None, :]
    mask = mask[:, None]
    a, b = _apart(values)
    if WIDTH == 4:
        a0, a1 = _apart(a)
        b0, b1 = _apart(b)
        tl.store(pointers, a0, mask)
        tl.store(pointers + WIDTH, a1, mask)
        tl.store(pointers + 2 * WIDTH, b0, mask)
        tl.store(pointers + 3 * WIDTH, b1, mask)
    else:
        tl.store(pointers, a, mask)
        tl.store(pointers + WIDTH, b, mask)


@triton.jit
def _sum_in_order(t):
    """((t[:, 0] + t[:, 1]) + t[:, 2]) + … of [B, 16]."""
    # Every split takes the last bit of the column's number.
    even, odd = tl.split(tl.reshape(t, (t.shape[0], 2, 2, 2, 2)))
    c048c, c26ae = tl.split(even)
    c159d, c37bf = tl.split(odd)
    c08, c4c = tl.split(c048c)
    c2a, c6e = tl.split(c26ae)
    c19, c5d = tl.split(c159d)
    c3b, c7f = tl.split(c37bf)
    c0, c8 = tl.split(c08)
    c1, c9 = tl.split(c19)
    c2, ca = tl.split(c2a)
    c3, cb = tl.split(c3b)
    c4, cc = tl.split(c4c)
    c5, cd = tl.split(c5d)
    c6, ce = tl.split(c6e)
    c7, cf = tl.split(c7f)
    first = ((((((c0 + c1) + c2) + c3) + c4) + c5) + c6) + c7
    return (((((((first + c8) + c9) + ca) + cb) + cc) + cd) + ce) + cf


# --- number formats ---


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _is_finite(x):
    return (_bits(x) & _EXPONENT) != _EXPONENT


@triton.jit
def _round_to_mantissa(a, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr):
    """a >= 0 to the nearest number of ``MANTISSA`` bits, ties to even; below ``SMALLEST`` to the grid just above it.

    In fp32 the numbers from 2^(23 - MANTISSA) times the power of two below a are that far apart: adding it is the
    hardware's own rounding, and subtracting it is exact.
    """
    magic = _float((_bits(tl.maximum(a, SMALLEST)) & _EXPONENT) + ((23 - MANTISSA) << 23))
    return (a + magic) - magic


@triton.jit
def _round_e2m1(a):
    return _round_to_mantissa(tl.minimum(a, _E2M1_MAX), 1, 1.0)


@triton.jit
def _round_e4m3(b):
    return _round_to_mantissa(tl.minimum(b, _E4M3_MAX), 3, 0.015625)


@triton.jit
def _e2m1_code(r):
    """Code 0..7 of an e2m1 magnitude: from 1 on its exponent and mantissa bit, below them 0 and 0.5."""
    return tl.where(r < 1.0, (r > 0.0).to(tl.int32), (_bits(r) >> 22) - 252)


@triton.jit
def _e2m1_value(code):
    """Signed value of code 0..15."""
    n = code & 7
    magnitude = tl.where(n < 2, n * 0x3F000000, (n + 252) << 22)  # 0x3F000000 is 0.5
    return _float(magnitude | (code & 8) << 28)


@triton.jit
def _e4m3_byte(sf):
    """The byte of an E4M3 number sf >= 0: below 2^-6 it counts units of 2^-9, which a sum leaves in the last bits."""
    return tl.where(sf < 0.015625, _bits(sf * 512.0 + 8388608.0) & 7, (_bits(sf) >> 20) - 960)


@triton.jit
def _e4m3_value(byte):
    m = byte & 0x7F
    value = tl.where(m < 8, m.to(tl.float32) * 0.001953125, _float((m << 20) + (120 << 23)))
    value = tl.where(m == _E4M3_NAN, float("nan"), value)
    return _float(_bits(value) | (byte & 0x80) << 24)


@triton.jit
def _widen(x):
    """fp32 of what was loaded: fp32, fp16, or bf16 as int16."""
    return _float(x.to(tl.int32) << 16) if x.dtype == tl.int16 else x.to(tl.float32)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """x rounded to nearest as what is stored: the inverse of :func:`_widen`."""
    if dtype == tl.int16:
        u = _bits(x)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        return tl.where((u & _MAGNITUDE) > _EXPONENT, (u >> 16) | 0x40, rounded).to(tl.int16)
    return x.to(dtype)


# --- the gated activation ---


@triton.jit
def _exp(x):
    """e^x for -104 <= x <= 89, as :func:`fouroversix_plugin.reference._exp`."""
    shifted = x * _LOG2_E + _TO_INTEGER
    n = shifted - _TO_INTEGER
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = r * _EXP_7 + _EXP_6
    p = p * r + _EXP_5
    p = p * r + _EXP_4
    p = p * r + _EXP_3
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    # 2^n in two factors: n reaches -150, and 2^128 is no float.
    exponent = _bits(shifted) - _TO_INTEGER_BITS
    half = exponent >> 1
    return (p * _float((half + 127) << 23)) * _float((exponent - half + 127) << 23)


@triton.jit
def _silu_and_mul(gate, up):
    t = -gate
    e = _exp(tl.where(t < -104.0, -104.0, tl.where(t > 89.0, 89.0, t)))
    e = tl.where(t > 89.0, float("inf"), e)
    return tl.math.div_rn(gate, e + 1.0) * up


# --- what is quantized ---


@triton.jit
def _input(x, row, block, columns, mask, WIDTH: tl.constexpr, GATED: tl.constexpr):
    """fp32 [B, 16]: blocks of x, or of silu(gate) * up rounded to the type of x."""
    if GATED:
        at = row.to(tl.int64) * (2 * columns) + block * _BLOCK
        gate, up = _load(x, at, mask, WIDTH), _load(x, at + columns, mask, WIDTH)
        return _widen(_narrow(_silu_and_mul(_widen(gate), _widen(up)), x.dtype.element_ty))
    return _widen(_load(x, row.to(tl.int64) * columns + block * _BLOCK, mask, WIDTH))


@triton.jit
def _row_amax(x, row, rows, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr):
    """Bits of the largest magnitude of each of ``row`` [ROWS]."""
    PER_ROW: tl.constexpr = _TILE // ROWS
    row_of_block = _spread(row, PER_ROW)
    largest = tl.zeros((ROWS,), tl.int32)
    for first in range(0, columns // _BLOCK, PER_ROW):
        block = first + tl.arange(0, _TILE) % PER_ROW
        mask = (row_of_block < rows) & (block < columns // _BLOCK)
        u = _bits(_input(x, row_of_block, block, columns, mask, WIDTH, GATED)) & _MAGNITUDE
        found = tl.max(tl.reshape(tl.max(u, axis=1), (ROWS, PER_ROW)), axis=1)
        largest = tl.maximum(largest, found)
    return largest


@triton.jit
def _spread(of_row, PER_ROW: tl.constexpr):
    """[ROWS] as [ROWS * PER_ROW]: what each row has, for each of its blocks."""
    ROWS: tl.constexpr = of_row.shape[0]
    return tl.reshape(tl.broadcast_to(of_row[:, None], (ROWS, PER_ROW)), (ROWS * PER_ROW,))


@triton.jit
def _find_expert(row, offsets, experts, TILE_ROWS: tl.constexpr, AT_ONCE: tl.constexpr):
    """(expert of each row, the row that its scales go to in tiles of each expert's own), -1 for a row of no expert.

    As offsets ascend, a row's expert is the number of those that end at or before it.
    """
    expert = tl.zeros_like(row)
    start = tl.zeros_like(row)
    for first in range(0, experts, AT_ONCE):
        e = first + tl.arange(0, AT_ONCE)
        begin = tl.load(offsets + e, e < experts, other=0)
        end = tl.load(offsets + e + 1, e < experts, other=0)
        ended = (end[None, :] <= row[:, None]) & (e < experts)[None, :]
        tiles = (end - begin + (TILE_ROWS - 1)) // TILE_ROWS
        expert += tl.sum(ended.to(tl.int32), axis=1)
        start += tl.sum(tl.where(ended, tiles[None, :], 0), axis=1)
    begin = tl.load(offsets + tl.minimum(expert, experts))
    nobodys = (expert == experts) | (row < begin)
    return tl.where(nobodys, -1, expert), tl.where(nobodys, -1, start * TILE_ROWS + row - begin)


# --- scales ---


@triton.jit
def _global_scales(amax, ENCODED_AMAX: tl.constexpr):
    """(amax or 0, encode scale, decode scale, whether the amax is finite)."""
    finite = _is_finite(amax)
    amax = tl.where(finite, amax, 0.0)
    encode = tl.minimum(tl.math.div_rn(tl.full(amax.shape, ENCODED_AMAX, tl.float32), amax), _FLT_MAX)
    encode = tl.where((amax == 0.0) | (encode == 0.0), 1.0, encode)
    return amax, encode, tl.math.div_rn(tl.full(amax.shape, 1.0, tl.float32), encode), finite


@triton.jit
def _stored_decode_scale(amax, ENCODED_AMAX: tl.constexpr):
    _, _, decode, finite = _global_scales(amax, ENCODED_AMAX)
    return tl.where(finite, decode, float("nan"))


@triton.jit
def _scale_offset(row, block, blocks, LAYOUT: tl.constexpr):
    """Where the byte of a block scale lies; see :func:`fouroversix_plugin.nvfp4.scales_to_layout`."""
    if LAYOUT == "row_major":
        return row.to(tl.int64) * blocks + block
    tiles = (blocks + 3) // 4
    if LAYOUT == "128x4":
        tile = (row // 128).to(tl.int64) * tiles + block // 4
        return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4
    return ((row // 8).to(tl.int64) * tiles + block // 4) * 32 + (row % 8) * 4 + block % 4


# --- the choice ---


@triton.jit
def _candidate(a, b, decode):
    """The E4M3 block scale [B] nearest to b, and the e2m1 magnitudes [B, 16] of a under it."""
    sf = _round_e4m3(b)
    # For a block scale of 0 too: 1 / 0 is infinite.
    inverse = tl.minimum(tl.math.div_rn(tl.full(sf.shape, 1.0, tl.float32), sf * decode), _FLT_MAX)
    return sf, _round_e2m1(a * inverse[:, None])


@triton.jit
def _error(r, sf, a, amax, encode, decode, METRIC: tl.constexpr, DOMAIN: tl.constexpr, ENCODED_AMAX: tl.constexpr):
    """A candidate's error [B]."""
    d = r * sf[:, None]
    if DOMAIN == "amax":
        d = tl.math.div_rn(d * amax[:, None], tl.full(d.shape, ENCODED_AMAX, tl.float32)) - a
    elif DOMAIN == "decode_scale":
        d = d * decode[:, None] - a
    else:
        d = d - a * encode[:, None]
    if METRIC == "mse":
        return _sum_in_order(d * d)
    t = _bits(d) & _MAGNITUDE
    if METRIC == "mae":
        return _sum_in_order(_float(t))
    return _float(tl.max(t, axis=1))


@triton.jit
def _filter(v, r6, sf6, r4, sf4, a, decode, METRIC: tl.constexpr):
    """Whether 4 wins in blocks [B], and whether that is certain; ``decode`` is 0 for an amax of 0.

    Errors only decide a comparison. Here they are computed in one domain for all three, without divisions, and added in
    any order; where they differ by more than both these and the specification's can be off, the answer is the same.

    How far off: let v, a block's largest magnitude, be in 2^-50 .. 2^50, so that nothing overflows and what is lost to
    subnormal numbers does not count. A decoded value is at most 4/3 v. It has four roundings here and at most three in
    the specification, each within 2^-24 of it, and the subtractions round within 2^-24 v: 12 * 2^-24 v in all, less
    than delta = 2^-20 v. ("scaled" errors are these times the encode scale, a common factor.) For both candidates
    together, with e their errors' sum:

    - abs_max: 2 delta.
    - mae: 2 * 16 delta, and 30 * 2^-24 e for the roundings of both sums.
    - mse: |d'^2 - d^2| <= delta (2 |d| + delta), which sums up to 8 delta sqrt(e) + 16 delta^2 for a candidate, at most
      2^-15 e + 2^-21 v^2; and 32 * 2^-24 e for roundings.

    The margins below are a quarter or more above that. An amax of 0 makes both errors equal here, which is not certain.
    """
    d6 = tl.abs(r6 * (sf6 * decode)[:, None] - a)
    d4 = tl.abs(r4 * (sf4 * decode)[:, None] - a)
    if METRIC == "mse":
        error6, error4 = tl.sum(d6 * d6, axis=1), tl.sum(d4 * d4, axis=1)
        margin = (error6 + error4) * 6.103515625e-05 + (v * v) * 1.1920928955078125e-06  # 2^-14, 1.25 * 2^-20
    elif METRIC == "mae":
        error6, error4 = tl.sum(d6, axis=1), tl.sum(d4, axis=1)
        margin = (error6 + error4) * 3.814697265625e-06 + v * 3.814697265625e-05  # 2^-18, 1.25 * 2^-15
    else:
        error6, error4 = tl.max(d6, axis=1), tl.max(d4, axis=1)
        margin = v * 2.384185791015625e-06  # 1.25 * 2^-19
    in_range = (v >= 8.881784197001252e-16) & (v <= 1125899906842624.0)  # 2^-50, 2^50
    # Where both scales saturate the candidates are one, and 6 wins.
    return error4 < error6, (in_range & (tl.abs(error4 - error6) > margin)) | (sf4 == sf6)


@triton.jit
def _quantize_blocks(
    a, amax, candidates, METRIC: tl.constexpr, DOMAIN: tl.constexpr, ADAPTIVE: tl.constexpr, ENCODED_AMAX: tl.constexpr
):
    """What wins in blocks of magnitudes a [B, 16], scaled for ``amax`` [B]; ``candidates`` is 2.

    Returns:
        (e2m1 magnitudes [B, 16], block scales [B], whether a block is finite [B], and whether it keeps its signs [B]).
    """
    amax, encode, decode, row_is_finite = _global_scales(amax, ENCODED_AMAX)
    v = _float(tl.max(_bits(a), axis=1))
    if ADAPTIVE:
        b = tl.math.div_rn(v, tl.full(v.shape, _E2M1_MAX, tl.float32)) * encode
        sf, r = _candidate(a, b, decode)
        sf4, r4 = _candidate(a, b * 1.5, decode)
        four, decided = _filter(v, r, sf, r4, sf4, a, tl.where(amax == 0.0, 0.0, decode), METRIC)
        # Where a block is open, the specification settles all of the program's: 6 first, then 4 against it. In a loop
        # of a length that no compiler knows: unrolled, the divisions of both want more registers than there are.
        is_open = ~decided & (v != 0.0) & row_is_finite & _is_finite(v)
        other = tl.zeros_like(v)
        for candidate in range(candidates * tl.max(is_open.to(tl.int32), axis=0)):
            six = candidate == 0
            error = _error(
                tl.where(six, r, r4), tl.where(six, sf, sf4), a, amax, encode, decode, METRIC, DOMAIN, ENCODED_AMAX
            )
            four = error < other
            other = error
        sf = tl.where(four, sf4, sf)
        r = tl.where(four[:, None], r4, r)
    else:
        sf, r = _candidate(a, v * (encode * _SIXTH), decode)
    whole = _is_finite(v) | ~row_is_finite
    nonzero = (v != 0.0) & row_is_finite
    kept = whole & nonzero
    return tl.where(kept[:, None], r, 0.0), tl.where(nonzero, sf, 0.0), whole, kept


# --- kernels ---


@triton.jit(do_not_specialize=["rows", "experts", "candidates"])
def quantize_rows(
    x,
    amax,
    offsets,
    packed,
    block_scale,
    values,
    decode_scale,
    rows,
    columns,
    experts,
    candidates,
    SCOPE: tl.constexpr,
    SHARED_AMAX: tl.constexpr,
    GATED: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    METRIC: tl.constexpr,
    DOMAIN: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ENCODED_AMAX: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS_AT_ONCE: tl.constexpr,
):
    """``ROWS`` rows of x [rows, columns] a program, as ``packed`` with ``block_scale``, or as ``values``.

    ``amax`` is None to find each row's own (SCOPE "token" only), else fp32 [] ("tensor", or SHARED_AMAX), [rows] or
    [experts]. Without rows, one program still writes the decode scales. ``candidates`` is 2.
    """
    PER_ROW: tl.constexpr = _TILE // ROWS
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    scale_row = row
    if SCOPE == "expert":
        expert, scale_row = _find_expert(row, offsets, experts, TILE_ROWS, EXPERTS_AT_ONCE)
        row_amax = tl.load(amax + expert, expert >= 0, other=float("nan"))
        if LAYOUT == "row_major":
            scale_row = row
        if program == 0:
            for first in range(0, experts, _TILE):
                e = first + tl.arange(0, _TILE)
                decode = _stored_decode_scale(tl.load(amax + e, e < experts, other=0.0), ENCODED_AMAX)
                tl.store(decode_scale + e, decode, e < experts)
    elif SCOPE == "token":
        if amax is None:
            row_amax = _float(_row_amax(x, row, rows, columns, ROWS, WIDTH, GATED))
        elif SHARED_AMAX:
            row_amax = tl.load(amax + tl.zeros_like(row))
        else:
            row_amax = tl.load(amax + row, row < rows, other=0.0)
        tl.store(decode_scale + row, _stored_decode_scale(row_amax, ENCODED_AMAX), row < rows)
    else:
        row_amax = tl.load(amax + tl.zeros_like(row))
        tl.store(decode_scale + row, _stored_decode_scale(row_amax, ENCODED_AMAX), row == 0)

    blocks = columns // _BLOCK
    row_of_block = _spread(row, PER_ROW)
    amax_of_block = _spread(row_amax, PER_ROW)
    scale_row_of_block = _spread(scale_row, PER_ROW)
    for first in range(0, blocks, PER_ROW):
        block = first + tl.arange(0, _TILE) % PER_ROW
        mask = (row_of_block < rows) & (block < blocks)
        u = _bits(_input(x, row_of_block, block, columns, mask, WIDTH, GATED))
        r, sf, whole, kept = _quantize_blocks(
            _float(u & _MAGNITUDE), amax_of_block, candidates, METRIC, DOMAIN, ADAPTIVE, ENCODED_AMAX
        )
        sign = tl.where(kept[:, None], u & ~_MAGNITUDE, 0)
        at = row_of_block.to(tl.int64) * blocks + block
        if values is not None:
            value = _float(_bits(r * sf[:, None]) | sign)
            value = tl.where(whole[:, None], value, float("nan"))
            _store(values, at * _BLOCK, _narrow(value, values.dtype.element_ty), mask, WIDTH)
        else:
            codes = _e2m1_code(r) | ((sign >> 28) & 8)
            even, odd = tl.split(tl.reshape(codes, (_TILE, _BLOCK // 2, 2)))
            codes = (even | (odd << 4)).to(tl.uint8)
            tl.store(packed + at[:, None] * 8 + tl.arange(0, 8)[None, :], codes, mask[:, None])
            byte = tl.where(whole, _e4m3_byte(sf), _E4M3_NAN).to(tl.uint8)
            offset = _scale_offset(scale_row_of_block, block, blocks, LAYOUT)
            tl.store(block_scale + offset, byte, mask & (scale_row_of_block >= 0))


@triton.jit(do_not_specialize=["rows", "experts"])
def find_largest(
    x,
    amax,
    offsets,
    rows,
    columns,
    experts,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS_AT_ONCE: tl.constexpr,
):
    """Bits of the largest magnitude into zeroed int32 ``amax``: of the tensor [1], or with offsets of experts [E]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest = _row_amax(x, row, rows, columns, ROWS, WIDTH, GATED)
    if offsets is None:
        tl.atomic_max(amax, tl.max(largest, axis=0), sem="relaxed")
    else:
        expert, _ = _find_expert(row, offsets, experts, 1, EXPERTS_AT_ONCE)
        tl.atomic_max(amax + expert, largest, (row < rows) & (expert >= 0), sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def dequantize_rows(packed, block_scale, decode_scale, out, rows, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """``out`` [rows, columns] = (e2m1 * block_scale) * decode_scale [rows], ``ROWS`` rows a program."""
    PER_ROW: tl.constexpr = _TILE // ROWS
    blocks = columns // _BLOCK
    row = tl.program_id(0) * ROWS + tl.arange(0, _TILE) // PER_ROW
    decode = tl.load(decode_scale + row, row < rows, other=0.0)
    for first in range(0, blocks, PER_ROW):
        block = first + tl.arange(0, _TILE) % PER_ROW
        mask = (row < rows) & (block < blocks)
        at = row.to(tl.int64) * blocks + block
        codes = tl.load(packed + at[:, None] * 8 + tl.arange(0, 8)[None, :], mask[:, None], other=0).to(tl.int32)
        codes = tl.reshape(tl.join(codes & 15, codes >> 4), (_TILE, _BLOCK))
        sf = _e4m3_value(tl.load(block_scale + at, mask, other=0).to(tl.int32))
        value = (_e2m1_value(codes) * sf[:, None]) * decode[:, None]
        _store(out, at * _BLOCK, _narrow(value, out.dtype.element_ty), mask, WIDTH)
