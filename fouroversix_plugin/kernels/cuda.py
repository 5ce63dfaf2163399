"""The CUDA backend: compiled kernels where nvcc is, else Triton's, else torch operations; all quantize alike.

Products are compiled for Hopper (:mod:`fouroversix_plugin.kernels.hopper`), torch's FP4 GEMM where Blackwell multiplies
quantized activations (:mod:`fouroversix_plugin.kernels.blackwell`), Triton's elsewhere
(:mod:`fouroversix_plugin.kernels.triton_gemm`), and torch operations without any of these. :func:`prepare` chooses once
for a weight, and the log says what and why.

Nothing waits for the GPU, and no result's shape depends on values: every operator can be captured in a CUDA graph, once
the kernels are loaded (a first call outside of the capture).
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from fouroversix_plugin.kernels import blackwell, build, hopper, native, reference_operators, triton, triton_gemm
from fouroversix_plugin.kernels.invariance import is_batch_invariant
from fouroversix_plugin.nvfp4 import ScaleLayout
from fouroversix_plugin.recipe import Granularity, Recipe

logger = logging.getLogger(__name__)

Products = Literal["hopper", "blackwell", "triton", "torch"]
"""Whose kernels multiply; "blackwell" is torch's FP4 GEMM."""


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


def prepare(
    packed: Tensor, block_scale: Tensor, dtype: torch.dtype, gated: bool, scheme: str = ""
) -> tuple[Tensor, Tensor]:
    """As :func:`linear`, :func:`linear_w4a4` and :func:`moe` want a weight for a model of ``dtype``.

    On Hopper in tiles; for Blackwell's FP4 units, where ``scheme`` is "W4A4", the codes as they are and flat block
    scales; else, for Triton's kernels, in planes of int32; as it is where there is nothing of these.
    """
    match choose(packed, dtype, scheme):
        case "hopper":
            return hopper.prepare(packed, block_scale, gated)
        case "blackwell":
            return blackwell.prepare(packed, block_scale)
        case "triton":
            return triton_gemm.prepare(packed, block_scale)
        case "torch":
            return packed, block_scale


def choose(packed: Tensor, dtype: torch.dtype, scheme: str) -> Products:
    """Whose products multiply a weight: the first that can. The log has a line for each distinct choice, with reasons.

    Args:
        packed: uint8 [N, K/2], or [E, N, K/2] of experts.
        dtype: of the activations.
        scheme: "W4A4", "W4A16", or "" for a weight that both multiply.

    Raises:
        ValueError: results have to be batch-invariant, and there is nothing whose are.
    """
    reasons: dict[Products, str | None] = {"hopper": _no_hopper(packed, dtype)}
    if reasons["hopper"] is not None:
        shape = *packed.shape[:-1], packed.shape[-1] * 2
        reasons["blackwell"] = blackwell.reason(packed.device, scheme, shape)
        if reasons["blackwell"] is not None:
            reasons["triton"] = triton.reason()
    chosen: Products = next((name for name, reason in reasons.items() if reason is None), "torch")
    passed_over = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
    what = "experts" if packed.ndim > 2 else "linear"
    if chosen == "torch" and is_batch_invariant():
        raise ValueError(
            f"products of {what}: got those of torch, whose sums depend on the number of tokens, needed some that are "
            f"batch-invariant ({passed_over}); install Triton, or do without batch invariance"
        )
    _log_choice(what, scheme, chosen, passed_over)
    return chosen


def _no_hopper(packed: Tensor, dtype: torch.dtype) -> str | None:
    if dtype not in hopper.DTYPES:
        return f"activations are {dtype}"
    if packed.shape[-2] % hopper.ROWS:
        return f"{packed.shape[-2]} rows, needed a multiple of {hopper.ROWS}"
    return hopper.reason(packed.device)


@functools.cache
def _log_choice(what: str, scheme: str, chosen: Products, passed_over: str) -> None:
    why = f" (passed over: {passed_over})" if passed_over else ""
    logger.info("fouroversix: products of %s by %s%s", f"{what} {scheme}".rstrip(), chosen, why)


def linear(
    x: Tensor,
    weight: Tensor,
    block_scale: Tensor | None,
    decode_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """((x W^T) * token_scale) * decode_scale + bias in fp32, rounded to ``dtype``: [M, N].

    ``weight`` and ``block_scale`` are as :func:`prepare` left them, or as stored, which is prepared in the call.
    """
    if block_scale is not None and weight.ndim == decode_scale.ndim + 1:
        weight, block_scale = prepare(weight, block_scale, x.dtype, False)
    if block_scale is None or weight.ndim == decode_scale.ndim + 1:
        return reference_operators.linear(x, weight, block_scale, decode_scale, token_scale, bias, dtype)
    if weight.dtype == torch.int32:
        return triton_gemm.linear(x, weight, block_scale, decode_scale, token_scale, bias, dtype)
    return hopper.linear(x, weight, block_scale, decode_scale, token_scale, bias).to(dtype)


def linear_w4a4(
    x: Tensor,
    x_block_scale: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    block_scale: Tensor,
    decode_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`fouroversix_plugin.kernels.blackwell.linear`."""
    return blackwell.linear(x, x_block_scale, token_scale, weight, block_scale, decode_scale, bias, dtype)


def moe(
    x: Tensor,
    w13: Tensor,
    w13_block_scale: Tensor | None,
    w13_decode_scale: Tensor,
    w2: Tensor,
    w2_block_scale: Tensor | None,
    w2_decode_scale: Tensor,
    *rest: Any,
) -> Tensor:
    """:func:`fouroversix_plugin.reference.moe` on weights as :func:`prepare` left them, or as stored."""
    if w13_block_scale is None or w2_block_scale is None:
        raise ValueError(f"moe: got expanded experts on {x.device}, needed packed ones; only the CPU expands them")
    if w13.ndim == w13_decode_scale.ndim + 1:
        w13, w13_block_scale = prepare(w13, w13_block_scale, x.dtype, True)
        w2, w2_block_scale = prepare(w2, w2_block_scale, x.dtype, False)
    weights = (w13, w13_block_scale, w13_decode_scale, w2, w2_block_scale, w2_decode_scale)
    if w13.ndim == w13_decode_scale.ndim + 1:
        return reference_operators.moe(x, *weights, *rest)
    if w13.dtype == torch.int32:
        return triton_gemm.moe(x, *weights, *rest)
    return hopper.moe(x, *weights, *rest)


def _operators() -> ModuleType:
    if build.load("cuda") is None:
        return native
    return triton if triton.reason() is None else reference_operators
