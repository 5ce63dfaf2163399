"""Products held to the specification: how they are asked for, operands, results in fp64, how far off fp32 may be.

**How far off.** A product x W^T of K columns is a sum in fp32 of exact products (of 16-bit and 6-bit numbers; an fp32
x has them rounded once, to 2^-24). In whatever order: K additions, each off by at most 2^-24 of a partial sum where it
is rounded, and by twice that where it is truncated, as Hopper's tensor cores do when they align the 16 products and the
accumulator of an instruction (17 truncations), and once more with the result: 18 for 16 columns, or 9/8 K. Hence

    |sum - exact| <= 2 * 9/8 K * 2^-24 * P,    P = min(6, sqrt(K)) * sqrt(sum of x_i^2 w_i^2),

P being what no partial sum exceeds: the sum of magnitudes is at most sqrt(K) times the root of the squares, and terms
of random signs, whose standard deviation that root is, stay within 6 of those. (One term of 4096 that is lost or
counted twice is 5 times as much.) Scaling and adding the bias are 3 roundings more; then the result is rounded to its
dtype.

Against results that are rounded twice, or summed in bf16, that is no help: their errors look like this one rounding's.
So most results must be the very number that fp64's is rounded to, and the squared error must be that rounding's.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import calc_diff, mean_ratio
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin import reference
from fouroversix_plugin.kernels import build, ops
from fouroversix_plugin.nvfp4 import NVFP4Tensor, pack
from fouroversix_plugin.recipe import Recipe

PLAIN = Recipe("mse", 448, adaptive=False)
"""For an amax of 2688 * 2^n: the decode scale is 2^n, so that nothing is rounded."""

Linear = Callable[..., Tensor]
"""(x, activations=None, bias=None) -> y"""

Experts = Callable[..., Tensor]
"""(x, topk_weights, topk_ids, activations=None, activation="silu", on_input=False) -> y"""


# --- how products are asked for ---


@dataclass(frozen=True)
class Products:
    """Products on a device: of prepared weights, or of stored ones by a backend's name."""

    device: str
    backend: str | None = None

    def linear(self, q: NVFP4Tensor, dtype: torch.dtype) -> Linear:
        held = ops.prepare_weight(q, dtype) if self.backend is None else None

        def run(x: Tensor, activations: Recipe | None = None, bias: Tensor | None = None) -> Tensor:
            poison(x.device, x.shape[0] * q.shape[0], dtype)
            if held is None:
                return fos.linear(x, q, activations, bias, self.backend)
            return ops.linear(x, held, activations, bias)

        return run

    def experts(self, w13: NVFP4Tensor, w2: NVFP4Tensor, dtype: torch.dtype) -> Experts:
        held = ops.prepare_experts(w13, w2, dtype) if self.backend is None else None

        def run(
            x: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            activations: Recipe | None = None,
            activation: str = "silu",
            on_input: bool = False,
        ) -> Tensor:
            poison(x.device, x.numel(), dtype)
            poison(x.device, topk_ids.numel() * w13.shape[-2], dtype)
            if held is None:
                route = (topk_weights, topk_ids, activations, activation)
                return fos.moe(x, w13, w2, *route, self.backend, apply_router_weight_on_input=on_input)
            return ops.moe(x, *held, topk_weights, topk_ids, activations, activation, on_input)

        return run


def poison(device: torch.device, elements: int, dtype: torch.dtype) -> None:
    """Leave NaN in the memory handed out next for a result or a fp32 workspace: what is not written shows."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    held = [torch.full((elements,), torch.nan, dtype=d, device=device) for d in (dtype, torch.float32) * 3]
    del held


ON_CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
)
_COMPILED = pytest.mark.skipif(build.load("cpu") is not None, reason=str(build.reason("cpu")))

CPU: Sequence[Any] = (
    pytest.param(Products("cpu"), id="cpu", marks=_COMPILED),
    pytest.param(Products("cpu", "cpu"), id="cpu-by-name", marks=_COMPILED),
    pytest.param(Products("cpu", "reference"), id="reference"),
)
CUDA: Sequence[Any] = (
    pytest.param(Products("cuda"), id="cuda", marks=ON_CUDA),
    pytest.param(Products("cuda", "cuda"), id="cuda-by-name", marks=ON_CUDA),
    pytest.param(Products("cuda", "triton"), id="triton-by-name", marks=ON_CUDA),
)
everywhere = pytest.mark.parametrize("products", [*CPU, *CUDA])
on_cuda = pytest.mark.parametrize("products", CUDA)


def over(
    name: str, cpu: Sequence[Any], cuda: Sequence[Any], by_name: Sequence[Any] | None = None
) -> pytest.MarkDecorator:
    """Everywhere, with values of ``name`` that may be larger on a GPU; ``by_name``: there for backends by name."""
    values = {"cpu": (cpu, cpu), "cuda": (cuda, cuda if by_name is None else by_name)}
    return pytest.mark.parametrize(
        ("products", name),
        [
            pytest.param(route.values[0], value, id=f"{route.id}-{value}", marks=route.marks)
            for route in (*CPU, *CUDA)
            for value in values[route.values[0].device][route.values[0].backend is not None]
        ],
    )


# --- operands ---


def generator(device: str, *case: object) -> torch.Generator:
    """The same numbers for the same case in every run, and others for another."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(case).encode()))


def randint(low: int, high: int, shape: Sequence[int], g: torch.Generator) -> Tensor:
    """int64, low <= value < high."""
    return torch.randint(low, high, tuple(shape), generator=g, device=g.device)


def random_x(rows: int, columns: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Normal values, rows of unlike magnitudes."""
    x = torch.randn(rows, columns, generator=g, device=g.device)
    return (x * torch.exp2(randint(-2, 2, (rows, 1), g))).to(dtype)


def random_weight(*shape: int, g: torch.Generator) -> NVFP4Tensor:
    """[..., N, K] of any code and block scales from 1/4 to 4, with decode scales per row that bring products near 1."""
    *rows, columns = shape
    packed = randint(0, 256, (*rows, columns // 2), g).to(torch.uint8)
    block_scale = randint(0x28, 0x49, (*rows, columns // 16), g).to(torch.uint8)
    decode_scale = (torch.rand(rows, generator=g, device=g.device) + 0.5) / (4 * math.sqrt(columns))
    return NVFP4Tensor(packed, block_scale.view(torch.float8_e4m3fn), decode_scale)


def random_experts(E: int, H: int, inner: int, g: torch.Generator) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    return random_weight(E, 2 * inner, H, g=g), random_weight(E, H, inner, g=g)


def routing(tokens: int, E: int, top_k: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights [tokens, top_k], and as ids the experts of the largest of random numbers: each at most once a token."""
    scores = torch.rand(tokens, E, generator=g, device=g.device)
    weights = torch.rand(tokens, top_k, generator=g, device=g.device) + 0.1
    return weights, scores.topk(top_k, dim=-1).indices.int()


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent of integers in fp64, put together from bits: not every library's exp2 is exact."""
    return (exponent.long() + 1023 << 52).view(torch.float64)


@dataclass(frozen=True)
class Whole:
    """A weight whose rows are whole numbers, of at most 48, times ``unit`` [..., N], a power of two."""

    q: NVFP4Tensor
    unit: Tensor


def whole_weight(*shape: int, g: torch.Generator) -> Whole:
    """Any code, every power of two as block scale, decode scales over 5 orders of magnitude; products near 1."""
    *rows, columns = shape
    packed = randint(0, 256, (*rows, columns // 2), g).to(torch.uint8)
    lowest = randint(-9, 7, (*rows, 1), g)
    block_scale = power_of_two(lowest + randint(0, 3, (*rows, columns // 16), g)).float().to(torch.float8_e4m3fn)
    magnitude = -round(math.log2(36 * math.sqrt(columns)))  # 36: 2.6 of x times 14 of the weight
    unit = power_of_two(magnitude + randint(-1, 2, rows, g)).float()
    decode_scale = unit * power_of_two(1 - lowest.squeeze(-1)).float()
    return Whole(NVFP4Tensor(packed, block_scale, decode_scale), unit)


def whole_x(rows: int, columns: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Whole numbers -4 to 4."""
    return randint(-4, 5, (rows, columns), g).to(dtype)


def quantized_x(rows: int, columns: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """x that :data:`PLAIN` quantizes to itself: x, and the powers of two [rows, 1] that are the token scales.

    x / token_scale are multiples of 1/2 up to 12, but for one block of a row, which has the block scale 448.
    """
    codes = randint(0, 16, (rows, columns // 16, 16), g)
    codes[..., 3] |= 7  # the largest magnitude of a block is 6
    scale = power_of_two(randint(0, 2, (rows, columns // 16, 1), g)).float()
    scale[torch.arange(rows, device=g.device), randint(0, columns // 16, (rows,), g)] = 448.0
    token_scale = power_of_two(randint(-9, -6, (rows, 1), g)).float()
    values = (reference.e2m1_values(codes) * scale).flatten(1)
    return (values * token_scale).to(dtype), token_scale


def every_code_and_scale(device: str) -> NVFP4Tensor:
    """A weight [4032, 512]: each of 16 codes under each of 126 block scales, at each place of 16 rows x 64 columns."""
    group = torch.arange(2016).view(252, 1, 8, 1)  # of 16 rows and 64 columns
    row = torch.arange(16).view(1, 16, 1, 1)
    scale = (group + 13 * row + 31 * torch.arange(4)) % 126 + 1
    codes = (group // 126 + group + 5 * row + 3 * torch.arange(64)) % 16
    packed = pack(codes.to(torch.uint8).reshape(4032, 512))
    block_scale = scale.to(torch.uint8).reshape(4032, 32).view(torch.float8_e4m3fn)
    return NVFP4Tensor(packed, block_scale, power_of_two(torch.arange(4032) % 3 - 1).float()).to(device)


# --- what comes out ---


@dataclass(frozen=True)
class Expected:
    """Results in fp64, how far off they may be before they are rounded, and the columns summed over."""

    y: Tensor
    error: Tensor
    columns: int

    def __getitem__(self, rows: Any) -> "Expected":
        return Expected(self.y[rows], self.error[rows], self.columns)


def expected_linear(
    x: Tensor,
    q: NVFP4Tensor,
    activations: Recipe | None = None,
    bias: Tensor | None = None,
    input_amax: Tensor | None = None,
    exact: bool = False,
) -> Expected:
    """``exact``: no partial sum is rounded, :func:`assert_exact` says why."""
    values, token_scale = x, torch.ones(x.shape[0], device=x.device)
    if activations is not None:
        values, token_scale = reference.quantize_values(x, activations, input_amax)
    weight, columns = reference.unscaled(q.packed, q.block_scale).double(), x.shape[1]
    scales = token_scale.double().unsqueeze(-1) * q.row_decode_scale.double()
    y = values.double() @ weight.T * scales
    if exact:
        assert_exact(values, weight)
        error = torch.zeros_like(y)
    else:
        root = (values.double().square() @ weight.square().T).sqrt() * scales
        error = 2.25 * columns * 2.0**-24 * min(6.0, math.sqrt(columns)) * root + 2.0**-23 * y.abs()
    if bias is not None:
        y = y + bias.double()
        error = error if exact else error + 2.0**-24 * y.abs()
    return Expected(y, error, columns)


def assert_exact(values: Tensor, weight: Tensor) -> None:
    """All numbers of a row are multiples of one power of two, and their magnitudes sum to less than 2^22 of it."""

    def unit(numbers: Tensor) -> Tensor:
        bits = numbers.double().view(torch.int64)
        mantissa = bits & ((1 << 52) - 1) | 1 << 52
        lowest = (mantissa & -mantissa).double() * power_of_two((bits >> 52 & 0x7FF) - 1075)
        return torch.where(numbers == 0, torch.inf, lowest).amin(dim=-1)

    if values.shape[0]:
        units = unit(values).unsqueeze(-1) * unit(weight)
        assert (values.double().abs() @ weight.abs().T / units).max() < 2**22, "the test's numbers are too large"


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


def expected_experts(
    x: Tensor,
    w13: NVFP4Tensor,
    w2: NVFP4Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activations: Recipe | None = None,
    activation: str = "silu",
    on_input: bool = False,
    exact: bool = False,
) -> tuple[Expected, Tensor]:
    """:func:`fouroversix_plugin.reference.moe` in fp64, but for the roundings it spells out; the experts' tokens only.

    A number that lies nearer to a midpoint than it may be off is rounded one way or the other. ``error`` covers both
    without ``activations``. With them, the product of gate and up is quantized next, and a code more or less is no
    small error: nothing is said of tokens where that may be.

    Returns:
        The result, and those tokens as booleans [M]. ``exact``: gate and up are exact sums.
    """
    M, top_k = topk_ids.shape
    half, H = w13.shape[-2] // 2, w2.shape[-2]
    y = torch.zeros(M, H, dtype=torch.float64, device=x.device)
    error, magnitude = torch.zeros_like(y), torch.zeros_like(y)
    unsettled = torch.zeros(M, dtype=torch.bool, device=x.device)
    for e in topk_ids.unique().tolist():
        if not 0 <= e < w13.shape[0]:
            continue
        token, slot = (topk_ids == e).nonzero(as_tuple=True)
        router_weight = topk_weights[token, slot].unsqueeze(-1)
        rows = x[token]
        if on_input:
            rows, router_weight = (rows.float() * router_weight.float()).to(x.dtype), torch.ones_like(router_weight)
        gate_up, off = _rounded(expected_linear(rows, w13[e], activations, exact=exact), x.dtype)
        gate, up = gate_up[:, :half], gate_up[:, half:]
        activated = ACTIVATIONS[activation](gate)
        # No activation is steeper than 1.13. What is left is for the functions in fp32: e^x by the hardware's 2^x for
        # silu, and for the others, which cancel for negative gates, what that leaves.
        off = 1.13 * off[:, :half] * (up.abs() + off[:, half:]) + activated.abs() * off[:, half:]
        silu = (4 + gate.abs()) * (activated * up).abs()
        off = off + 2.0**-23 * (silu if activation == "silu" else 8 * (gate * up).abs())
        product = Expected(activated * up, off, half)
        hidden, off = _rounded(product, x.dtype)
        out = expected_linear(hidden.to(x.dtype), w2[e], activations)
        out_error = out.error
        if activations is None:
            out_error = out_error + off @ reference.dequantize(w2[e]).double().abs().T
        else:
            unsettled[token[_quantized_otherwise(product, activations, x.dtype)]] = True
        weight = router_weight.double()
        y.index_add_(0, token, weight * out.y)
        error.index_add_(0, token, weight.abs() * out_error)
        magnitude.index_add_(0, token, (weight * out.y).abs())
    return Expected(y, error + (top_k + 1) * 2.0**-24 * magnitude, half), unsettled


def _rounded(value: Expected, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounded to ``dtype``, in fp64, and how far from that a number lies that is rounded from within the error."""
    middle = value.y.to(dtype).double()
    above, below = (value.y + value.error).to(dtype).double(), (value.y - value.error).to(dtype).double()
    return middle, torch.maximum(above - middle, middle - below)


def _quantized_otherwise(value: Expected, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """Rows [M] that become other codes or scales at one end of the error than at the other."""
    low, high = (reference.quantize_values(y.to(dtype), recipe) for y in (value.y - value.error, value.y + value.error))
    return (low[0] != high[0]).any(dim=-1) | (low[1] != high[1])


# --- how results are held to it ---


def half_unit(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of fp64 magnitudes in ``dtype``: how far rounding moves them."""
    info = torch.finfo(dtype)
    bits = magnitude.clamp(min=info.smallest_normal).view(torch.int64)
    return power_of_two((bits >> 52) - 1023) * (info.eps / 2)


def assert_within(what: str, y: Tensor, expected: Expected) -> None:
    """Every number is as near as :class:`Expected` says, and rounded once."""
    assert y.shape == expected.y.shape, what
    off = (y.double() - expected.y).abs()
    limit = expected.error + half_unit(expected.y.abs() + expected.error, y.dtype)
    wrong = ~(off <= limit)  # NaN is wrong
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        pytest.fail(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} further off than they may be, first at {first}: "
            f"{y[first].item()!r}, not {expected.y[first].item()!r} within {limit[first].item():.3g}"
        )


def assert_rounded_once(what: str, y: Tensor, expected: Expected, more: float = 0.1) -> None:
    """The squared error is that of one rounding, and ``more`` of it; and no scale is off."""
    if y.numel() == 0:
        return
    once = expected.y.to(y.dtype)
    # Of fp32 sums: K roundings of 2^-24 that do not add up, which only show where the result is fp32.
    limit = (1 + more) * calc_diff(once, expected.y) + 4 * expected.columns * 2.0**-48
    assert calc_diff(y, expected.y) <= limit, f"{what}: calc_diff {calc_diff(y, expected.y):.3g}, limit {limit:.3g}"
    # A number rounded the other way moves the mean by its share of a unit in the last place.
    off = abs(mean_ratio(y, once) - 1)
    limit = expected.columns * 2.0**-24 + torch.finfo(y.dtype).eps * (more / 10 + 2 / y.numel())
    assert off <= limit, f"{what}: mean ratio off by {off:.3g}, limit {limit:.3g}"


def assert_mostly_nearest(what: str, y: Tensor, expected: Expected) -> None:
    """Nearly all results are what fp64's are rounded to.

    A sum that is off by r of itself is rounded elsewhere as often as a midpoint lies within: r over the spacing, in the
    mean. r is taken for a truncation of 2^-23 every 16 columns, and 1 in 100 added for sums near 0, where it is larger.
    """
    if y.dtype == torch.float32 or y.numel() == 0:
        return
    elsewhere = int((y != expected.y.to(y.dtype)).sum())
    share = 0.01 + expected.columns * 2.0**-27 / torch.finfo(y.dtype).eps
    assert elsewhere <= 2 + share * y.numel(), f"{what}: {elsewhere} of {y.numel()} are not the nearest numbers"


def prepared_bytes(w: ops.PreparedWeight) -> int:
    parts = (getattr(w, field.name) for field in dataclasses.fields(w))
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def most_bytes(q: NVFP4Tensor) -> int:
    """4.5 bits a weight and 4 bytes a row, for whole tiles of 128 rows and 64 columns."""
    *lead, rows, columns = q.shape
    rows, columns = -(-rows // 128) * 128, -(-columns // 64) * 64
    return math.prod(lead) * rows * (columns * 9 // 16 + 4)


def assert_taken_back(back: NVFP4Tensor, q: NVFP4Tensor) -> None:
    """The stored bytes; codes under a block scale of 0 may have lost their magnitudes."""
    assert torch.equal(back.decode_scale, q.row_decode_scale)
    scales = q.block_scale.view(torch.uint8)
    assert torch.equal(back.block_scale.view(torch.uint8), scales)
    without = (scales & 0x7F == 0).repeat_interleave(8, dim=-1)
    assert torch.equal(back.packed.masked_fill(without, 0), q.packed.masked_fill(without, 0))
    assert bool(((back.packed == q.packed) | (back.packed & 0x77 == 0))[without].all())
