"""The quantizer for CUDA tensors where the compiled kernels are not to be had: Triton kernels, the same bytes.

The kernels lie in :mod:`fouroversix_plugin.kernels.triton_kernels`, which imports Triton: this module is imported where
there is none. Triton compiles a kernel when it first meets a kind of call, so a CUDA graph needs a call of its kind
outside of the capture; from then on nothing waits for the GPU, and no result's shape depends on values. Sizes of
launches follow from shapes alone: nothing is tuned by timing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from fouroversix_plugin.kernels import build
from fouroversix_plugin.nvfp4 import ScaleLayout, check_columns, padded_scale_shape
from fouroversix_plugin.recipe import BLOCK_SIZE, Granularity, Recipe

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
# Experts a program looks at in one step, together with its rows: 16 numbers a thread.
_ROWS_TIMES_EXPERTS: Final = 4096


@functools.cache
def reason() -> str | None:
    """Why Triton kernels cannot run here, or None. Compiles none of them; Triton's own launcher, the first time."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    least = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if least < build.LEAST_CAPABILITY:
        return build.too_old(least)
    try:
        # What launches kernels is compiled on the machine: without a C compiler, here is where it fails.
        importlib.import_module("triton").runtime.driver.active.get_current_target()
    except Exception as error:  # of any kind: Triton's, a compiler's, an import's
        return f"Triton does not work: {type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    return None


def quantize(
    x: Tensor,
    recipe: Recipe,
    granularity: Granularity,
    amax: Tensor | None,
    layout: ScaleLayout,
    gated: bool,
    expert_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fouroversix_plugin.kernels.native.quantize`.

    Raises:
        ValueError: x that is not [M, K] in bf16, fp16 or fp32 with K a multiple of 16 ([M, 2K] if ``gated``); amax or
            offsets of another number, dtype or device.
    """
    rows, columns = _check_input(x, gated)
    row_tile = padded_scale_shape(layout, 1, 1)[0]
    decode_shape: tuple[int, ...] = (rows,) if granularity == "token" else ()
    scale_rows = rows
    if expert_offsets is not None:
        _check_like("expert_offsets", expert_offsets, torch.int32, x)
        if expert_offsets.ndim != 1 or expert_offsets.numel() == 0:
            raise ValueError(f"expert_offsets: got shape {tuple(expert_offsets.shape)}, needed [E + 1]")
        decode_shape = (expert_offsets.shape[0] - 1,)
        scale_rows = (rows + decode_shape[0] * (row_tile - 1)) // row_tile * row_tile
    shape = padded_scale_shape(layout, scale_rows, columns // BLOCK_SIZE)
    packed = x.new_empty(rows, columns // 2, dtype=torch.uint8)
    if layout == "row_major":
        block_scale = x.new_empty(shape, dtype=torch.uint8)
    else:
        block_scale = x.new_zeros(shape[0] * shape[1], dtype=torch.uint8)  # padding is 0
    decode_scale = x.new_empty(decode_shape, dtype=torch.float32)
    _run(x, recipe, granularity, amax, layout, gated, expert_offsets, packed, block_scale, None, decode_scale)
    return packed, block_scale, decode_scale


def quantize_values(x: Tensor, recipe: Recipe, amax: Tensor | None, gated: bool) -> tuple[Tensor, Tensor]:
    """:func:`fouroversix_plugin.kernels.native.quantize_values`; raises as :func:`quantize`."""
    rows, columns = _check_input(x, gated)
    values = x.new_empty(rows, columns)
    token_scale = x.new_empty(rows, dtype=torch.float32)
    _run(x, recipe, "token", amax, "row_major", gated, None, None, None, values, token_scale)
    return values, token_scale


def dequantize(packed: Tensor, block_scale: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`fouroversix_plugin.reference.dequantize` of block scales as bytes, with a decode scale per row.

    Raises:
        ValueError: scales of another number, dtype or device than ``packed`` [..., M, K/2] needs, or another ``dtype``
            than bf16, fp16 or fp32.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, needed bfloat16, float16 or float32")
    columns = packed.shape[-1] * 2
    check_columns("packed", columns)
    rows = packed.shape[:-1].numel()
    for name, tensor, needed_dtype, needed in (
        ("packed", packed, torch.uint8, rows * columns // 2),
        ("block_scale", block_scale, torch.uint8, rows * columns // BLOCK_SIZE),
        ("decode_scale", decode_scale, torch.float32, rows),
    ):
        _check_like(name, tensor, needed_dtype, packed)
        _check_number(name, tensor, needed)
    out = packed.new_empty(*packed.shape[:-1], columns, dtype=dtype)
    kernels = _kernels()
    if rows:
        with device_of(packed):
            ROWS = _rows_a_program(columns, kernels)
            kernels.dequantize_rows[(-(-rows // ROWS),)](
                readable(packed),
                block_scale.contiguous(),
                decode_scale.contiguous(),
                as_stored(out),
                rows,
                columns,
                ROWS=ROWS,
                WIDTH=16 // out.element_size(),
                **_options(kernels),
            )
    return out


def _run(
    x: Tensor,
    recipe: Recipe,
    granularity: Granularity,
    amax: Tensor | None,
    layout: ScaleLayout,
    gated: bool,
    expert_offsets: Tensor | None,
    packed: Tensor | None,
    block_scale: Tensor | None,
    values: Tensor | None,
    decode_scale: Tensor,
) -> None:
    """Fill what is not None of the outputs."""
    kernels = _kernels()
    rows, columns = x.shape[0], x.shape[1] // (2 if gated else 1)
    experts = 0 if expert_offsets is None else expert_offsets.shape[0] - 1
    scope = granularity if expert_offsets is None else "expert"
    shared = scope == "token" and amax is not None and amax.ndim == 0
    if amax is not None:
        _check_like("amax", amax, torch.float32, x)
        _check_number("amax", amax, {"tensor": 1, "token": 1 if shared else rows, "expert": experts}[scope])
        amax = amax.contiguous()
    offsets = None if expert_offsets is None else expert_offsets.contiguous()
    x = as_stored(readable(x))
    ROWS = _rows_a_program(columns, kernels)
    programs = -(-rows // ROWS)
    shapes = {
        "GATED": gated,
        "ROWS": ROWS,
        "WIDTH": 16 // x.element_size(),
        "EXPERTS_AT_ONCE": min(_power_of_two(experts), _ROWS_TIMES_EXPERTS // ROWS),
        **_options(kernels),
    }
    with device_of(x):
        if amax is None and scope != "token":
            found = x.new_zeros(max(experts, 1), dtype=torch.int32)
            if programs:
                kernels.find_largest[(programs,)](x, found, offsets, rows, columns, experts, **shapes)
            amax = found.view(torch.float32)
        kernels.quantize_rows[(max(programs, 1),)](
            x,
            amax,
            offsets,
            packed,
            block_scale,
            None if values is None else as_stored(values),
            decode_scale,
            rows,
            columns,
            experts,
            2,
            SCOPE=scope,
            SHARED_AMAX=shared,
            LAYOUT=layout,
            TILE_ROWS=padded_scale_shape(layout, 1, 1)[0],
            # Plain NVFP4 compares nothing: one kernel for all of its recipes.
            METRIC=recipe.metric if recipe.adaptive else "",
            DOMAIN=recipe.error if recipe.adaptive else "",
            ADAPTIVE=recipe.adaptive,
            ENCODED_AMAX=recipe.encoded_amax,
            **shapes,
        )


def _kernels() -> ModuleType:
    return importlib.import_module("fouroversix_plugin.kernels.triton_kernels")


def _options(kernels: ModuleType) -> dict[str, Any]:
    """Launch options: no product is fused with a sum, which would round once instead of twice."""
    return {"num_warps": kernels.WARPS, "enable_fp_fusion": False}


def readable(tensor: Tensor) -> Tensor:
    """Contiguous, and aligned for pieces of 16 bytes: a view may begin anywhere, and Triton would then read less at a
    time, with a block in several threads."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def as_stored(tensor: Tensor) -> Tensor:
    """bf16 as int16: the kernels take its bits apart themselves."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments' is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _rows_a_program(columns: int, kernels: ModuleType) -> int:
    """As many rows as have a tile of blocks; a power of two, as all sizes in Triton."""
    tile: int = kernels.TILE
    return tile // min(_power_of_two(columns // BLOCK_SIZE), tile)


def _power_of_two(number: int) -> int:
    """The least power of two that is ``number`` or more; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()


def _check_input(x: Tensor, gated: bool) -> tuple[int, int]:
    """(M, K) of what is quantized."""
    if x.ndim != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, needed [M, K]")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: got {x.dtype}, needed bfloat16, float16 or float32")
    if gated and x.shape[1] % 2:
        raise ValueError(f"x: got {x.shape[1]} columns, needed as many for the gate as for what it gates")
    columns = x.shape[1] // (2 if gated else 1)
    check_columns("x", columns)
    return x.shape[0], columns


def _check_like(name: str, tensor: Tensor, dtype: torch.dtype, beside: Tensor) -> None:
    if tensor.dtype != dtype or tensor.device != beside.device:
        raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}, needed {dtype} on {beside.device}")


def _check_number(name: str, tensor: Tensor, needed: int) -> None:
    if tensor.numel() != needed:
        raise ValueError(f"{name}: got {tensor.numel()} numbers, needed {needed}")
