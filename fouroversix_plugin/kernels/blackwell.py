"""W4A4 products on Blackwell (compute capability 10.x and 12.x): packed activations by packed weights, unpacking none.

Activations are quantized per token by our own kernels; the product is torch's block-scaled FP4 GEMM
(``torch._scaled_mm``: cuBLASLt), which both engines have. Of the FP4 GEMMs that engines bring it is the one that gives
its sums in fp32. So the scales of tokens and rows and the bias come after the sum and before the one rounding, as in
:func:`fouroversix_plugin.reference.scaled_matmul`: only the order of the sum's additions is the GEMM's own. The others
(vLLM's ``cutlass_scaled_fp4_mm``, FlashInfer's ``mm_fp4``) round alpha times the sum to bf16 or fp16: with a scale per
token and one per row of the weight, or a bias, results would be rounded twice, and bare sums leave the range of fp16.

A device is used only after it has multiplied a few tokens right (:func:`reason`). Experts are multiplied elsewhere
(:data:`NO_EXPERTS`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fouroversix_plugin import reference
from fouroversix_plugin.kernels import triton, triton_gemm
from fouroversix_plugin.kernels.invariance import is_batch_invariant
from fouroversix_plugin.nvfp4 import ScaleLayout, padded_scale_shape, scales_from_layout, scales_to_layout
from fouroversix_plugin.recipe import BLOCK_SIZE

LAYOUT: Final[ScaleLayout] = "128x4"
"""Of both operands' block scales: ``SWIZZLE_32_4_4`` in torch, and cuBLASLt's for 16-element blocks."""

NO_EXPERTS: Final = (
    "FlashInfer's per-token experts round every expert's result to bf16 before they are summed, and take one alpha for "
    "gate and up"
)
"""Why no FP4 GEMM multiplies experts, as of FlashInfer 0.7.1.

It is the one path there that takes a recipe as an argument (``nvfp4_4over6``); its other experts read theirs from the
environment (``FLASHINFER_NVFP4_4OVER6*``), which no result of ours may depend on.
"""

_MAJORS: Final = (10, 12)
_ROWS: Final = 16
_COLUMNS: Final = 32


def reason(device: torch.device, scheme: str, shape: Sequence[int]) -> str | None:
    """Why a weight cannot be multiplied here on ``device``, or None. Waits for the GPU, once a device.

    Args:
        device: of the weight.
        scheme: "W4A4", "W4A16", or "" for a weight that both multiply.
        shape: [N, K], or [E, N, K] of experts. torch takes N in multiples of 16, and packed rows in multiples of 16
            bytes.
    """
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in _MAJORS:
        return f"compute capability {capability[0]}.{capability[1]}, needed 10.x or 12.x"
    if scheme != "W4A4":
        return "activations are not quantized" if scheme else "activations need not be quantized"
    if len(shape) > 2:
        return NO_EXPERTS
    if is_batch_invariant():
        return "the order of its sums may depend on the number of tokens, and results have to be batch-invariant"
    rows, columns = shape
    if rows % _ROWS or columns % _COLUMNS:
        return f"weight [{rows}, {columns}], needed multiples of {_ROWS} and {_COLUMNS}"
    return _fault(device)


def prepare(packed: Tensor, block_scale: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as :func:`linear` reads it.

    Args:
        packed: uint8 [N, K/2].
        block_scale: E4M3 bytes, uint8 [N, K/16].

    Returns:
        The codes as they are, and the bytes of the block scales in :data:`LAYOUT`: uint8, flat, padding is 0.
    """
    return packed.contiguous(), scales_to_layout(block_scale, LAYOUT)


def restore(block_scale: Tensor, rows: int, columns: int) -> Tensor:
    """Row-major bytes [rows, columns / 16] of the block scales that :func:`prepare` made."""
    return scales_from_layout(block_scale, LAYOUT, rows, columns // BLOCK_SIZE)


def linear(
    x: Tensor,
    x_block_scale: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    block_scale: Tensor,
    decode_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """((x W^T) * token_scale) * decode_scale + bias in fp32, rounded once to ``dtype``: [M, N].

    Args:
        x: packed uint8 [M, K/2].
        x_block_scale: its block scales, E4M3 bytes in :data:`LAYOUT`.
        token_scale: fp32 [M].
        weight, block_scale: of W [N, K], from :func:`prepare`.
        decode_scale: fp32 [N].
        bias: [N] of any float type, or None.
        dtype: bf16, fp16 or fp32.

    Raises:
        ValueError: a number, dtype or device of one that does not fit the others'; results that have to be
            batch-invariant.
    """
    if is_batch_invariant():
        raise ValueError(
            "weight: got one for FP4 units, whose sums may depend on the number of tokens, needed one prepared when "
            "results already had to be batch-invariant; call set_batch_invariant before weights are loaded"
        )
    rows = decode_scale.shape[0]
    _check_operand("x", x, x_block_scale, token_scale, x)
    _check_operand("weight", weight, block_scale, decode_scale, x)
    if x.shape[0] == 0:
        return torch.empty(0, rows, dtype=dtype, device=x.device)
    sums = _sums(x, x_block_scale, weight, block_scale)
    if triton.reason() is None:
        return triton_gemm.scale_sums(sums, decode_scale, token_scale, bias, dtype)
    y = sums.mul_(token_scale.unsqueeze(-1)).mul_(decode_scale)
    return (y if bias is None else y.add_(bias.float())).to(dtype)


def _sums(x: Tensor, x_block_scale: Tensor, weight: Tensor, block_scale: Tensor) -> Tensor:
    """fp32 [M, N]: sums of e2m1 * block_scale of x by those of W."""
    sums: Tensor = torch._scaled_mm(
        x.view(torch.float4_e2m1fn_x2),
        weight.view(torch.float4_e2m1fn_x2).t(),
        scale_a=x_block_scale.view(torch.float8_e4m3fn),
        scale_b=block_scale.view(torch.float8_e4m3fn),
        out_dtype=torch.float32,
    )
    return sums


def _check_operand(name: str, packed: Tensor, block_scale: Tensor, decode_scale: Tensor, beside: Tensor) -> None:
    rows, columns = decode_scale.shape[0], beside.shape[-1]
    scales = math.prod(padded_scale_shape(LAYOUT, rows, columns * 2 // BLOCK_SIZE))
    for what, tensor, dtype, shape in (
        (name, packed, torch.uint8, (rows, columns)),
        (f"{name}'s block scales", block_scale, torch.uint8, (scales,)),
        (f"{name}'s decode scales", decode_scale, torch.float32, (rows,)),
    ):
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, beside.device):
            raise ValueError(
                f"{what}: got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                f"needed {shape} {dtype} on {beside.device}"
            )


# --- whether a device multiplies right ---

# Sums of 256 products of codes by these are multiples of 1/16 below 2^17: fp32 holds them and all their partial sums,
# so that no order of additions is an excuse. With more than one tile of scales in both directions and rows that do not
# fill the last, scales in other places make other sums.
_BLOCK_SCALES: Final = (0x30, 0x38, 0x3C, 0x40, 0x44)  # 0.5, 1, 1.5, 2 and 3 in E4M3
_TRIAL_ROWS: Final = 144
_TRIAL_COLUMNS: Final = 256
_TRIAL_TOKENS: Final = (1, 130)


@functools.cache
def _fault(device: torch.device) -> str | None:
    """What torch's FP4 GEMM gets wrong on ``device``, by products that have one right result, or None."""
    generator = torch.Generator().manual_seed(0)
    codes, scales = _trial_operand(_TRIAL_ROWS, generator)
    values, decode_scale = reference.unscaled(codes, scales.view(torch.float8_e4m3fn)), _powers_of_two(_TRIAL_ROWS, 5)
    weight = (*prepare(codes, scales), decode_scale)
    for tokens in _TRIAL_TOKENS:
        codes, scales = _trial_operand(tokens, generator)
        x, token_scale = reference.unscaled(codes, scales.view(torch.float8_e4m3fn)), _powers_of_two(tokens, 3)
        expected = reference.scaled_matmul(x, values, token_scale, decode_scale)
        operands = (part.to(device) for part in (codes, scales_to_layout(scales, LAYOUT), token_scale, *weight))
        x, x_scale, token_scale, w, w_scale, w_decode_scale = operands
        try:
            got = linear(x, x_scale, token_scale, w, w_scale, w_decode_scale, None, torch.float32).cpu()
        except (RuntimeError, ValueError, AttributeError) as error:  # torch's refusals, and a torch without FP4
            first = str(error).strip().splitlines() or [""]
            return f"torch._scaled_mm does not multiply FP4 here: {type(error).__name__}: {first[0]}"
        if not torch.equal(got, expected):
            wrong = int((got != expected).sum())
            return f"torch._scaled_mm got {wrong} of {expected.numel()} FP4 products wrong in a trial"
    return None


def _trial_operand(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes uint8 [rows, K/2] of every kind and bytes of block scales [rows, K/16], on the CPU."""
    shape = rows, _TRIAL_COLUMNS // 2
    codes = torch.randint(256, shape, dtype=torch.uint8, generator=generator, device="cpu")
    chosen = torch.randint(len(_BLOCK_SCALES), (rows, _TRIAL_COLUMNS // BLOCK_SIZE), generator=generator, device="cpu")
    return codes, torch.tensor(_BLOCK_SCALES, dtype=torch.uint8, device="cpu")[chosen]


def _powers_of_two(count: int, different: int) -> Tensor:
    """fp32 [count], in turn: scales that round nothing."""
    exponent = torch.arange(count, device="cpu") % different - 2
    return torch.ldexp(torch.ones(count, dtype=torch.float32, device="cpu"), exponent)
