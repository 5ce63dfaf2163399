"""The public functions: arguments checked, a backend chosen, any leading dimensions. For inference: no gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fouroversix_plugin.kernels import backends, select
from fouroversix_plugin.nvfp4 import NVFP4Tensor, check_columns
from fouroversix_plugin.recipe import Granularity, Recipe, Scheme

__all__ = ["backends", "dequantize", "linear", "moe", "quantize"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_IDS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@torch.no_grad()
def quantize(
    x: Tensor,
    recipe: Recipe | None = None,
    granularity: Granularity = "tensor",
    amax: Tensor | float | None = None,
    backend: str | None = None,
) -> NVFP4Tensor:
    """Quantize x to NVFP4, choosing for every block of 16 columns between 4 and 6.

    Args:
        x: [M, K] in bf16, fp16 or fp32; K a multiple of 16.
        recipe: default ``Recipe()``.
        granularity: "tensor" for one decode scale, "token" for one per row.
        amax: largest magnitude to scale for instead of that of ``x``: a number for "tensor", float32 [M] for "token".
            A negative one is refused, except where looking would wait for a GPU or break a compiled graph.
        backend: a name of :func:`backends`; default the first that can.

    Returns:
        packed uint8 [M, K/2], block_scale float8_e4m3fn [M, K/16], decode_scale float32 [] or [M]. Non-finite input
        has one pinned result (see :mod:`fouroversix_plugin.reference`).

    Raises:
        ValueError: wrong dtype, shape, amax or backend.
    """
    recipe = Recipe() if recipe is None else recipe
    _check_recipe("recipe", recipe)
    _check_tensor("x", x)
    _check_matrix("x", x)
    if granularity not in ("tensor", "token"):
        raise ValueError(f"granularity: got {granularity!r}, needed 'tensor' or 'token'")
    if amax is not None:
        amax = torch.as_tensor(amax, dtype=torch.float32, device=x.device)
        needed = () if granularity == "tensor" else (x.shape[0],)
        if tuple(amax.shape) != needed:
            raise ValueError(f"amax: got shape {tuple(amax.shape)}, needed {needed} for granularity {granularity!r}")
        if amax.device.type == "cpu" and not torch.compiler.is_compiling() and bool((amax < 0).any()):
            raise ValueError(f"amax: got {amax.min().item()}, needed magnitudes of 0 or more")
    return select("quantize", "", x.shape, x.device, backend).quantize(x, recipe, granularity, amax)


@torch.no_grad()
def dequantize(q: NVFP4Tensor, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Tensor:
    """(e2m1 * block_scale) * decode_scale in fp32, rounded once to ``dtype``: [..., M, K].

    Raises:
        ValueError: another dtype than bf16, fp16 or fp32, or a backend that cannot.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: got {dtype}, needed bfloat16, float16 or float32")
    _check_quantized("q", q)
    return select("dequantize", "", q.shape, q.device, backend).dequantize(q, dtype)


@torch.no_grad()
def linear(
    x: Tensor,
    q: NVFP4Tensor,
    activations: Recipe | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x W^T + bias in the dtype of x.

    Args:
        x: [..., K] in bf16, fp16 or fp32.
        q: the weight W, [N, K].
        activations: None multiplies x as it is (W4A16); a recipe quantizes it per token first (W4A4).
        bias: [N], floating point, or None.
        backend: a name of :func:`backends`; default the first that can.

    Returns:
        [..., N].

    Raises:
        ValueError: dtypes, shapes, devices or a backend that do not fit.
    """
    flat = _flat("x", x)
    _check_matrix("x", flat)
    N = _check_weight("q", q, flat, dims=2)[0]
    _check_recipe("activations", activations)
    if bias is not None:
        _check_tensor("bias", bias)
        if tuple(bias.shape) != (N,):
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, needed ({N},)")
        if not bias.is_floating_point():
            raise ValueError(f"bias: got {bias.dtype}, needed floating point")
    _check_device(x, bias=bias)
    chosen = select("linear", _scheme(activations), q.shape, x.device, backend)
    return chosen.linear(flat, q, activations, bias).reshape(*x.shape[:-1], N)


@torch.no_grad()
def moe(
    x: Tensor,
    w13: NVFP4Tensor,
    w2: NVFP4Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activations: Recipe | None = None,
    activation: str = "silu",
    backend: str | None = None,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """Gated mixture of experts: for each token, the weighted sum over its experts of w2 (act(gate) * up).

    Args:
        x: [..., H] in bf16, fp16 or fp32.
        w13: [E, 2I, H], gate rows first, then up rows.
        w2: [E, H, I].
        topk_weights: [..., top_k], floating point.
        topk_ids: [..., top_k], integers; a slot outside 0..E-1 (-1: another rank's expert) contributes nothing.
        activations: None (W4A16) or the recipe that quantizes x and the intermediate per token (W4A4).
        activation: "silu", "gelu" or "gelu_tanh".
        backend: a name of :func:`backends`; default the first that can.
        apply_router_weight_on_input: scale an expert's input instead of its output.

    Returns:
        [..., H] in the dtype of x; the sum over slots runs in fp32 in order.

    Raises:
        ValueError: dtypes, shapes, devices or a backend that do not fit.
    """
    flat = _flat("x", x)
    _check_matrix("x", flat)
    E, twice_inner, H = _check_weight("w13", w13, flat, dims=3)
    _check_recipe("activations", activations)
    if twice_inner % 2:
        raise ValueError(f"w13: got {twice_inner} rows, needed as many of gate as of up")
    _check_quantized("w2", w2)
    needed = (E, H, twice_inner // 2)
    if tuple(w2.shape) != needed or w2.device != x.device:
        raise ValueError(f"w2: got {tuple(w2.shape)} on {w2.device}, needed {needed} on {x.device} for this w13 and x")
    if activation not in ("silu", "gelu", "gelu_tanh"):
        raise ValueError(f"activation: got {activation!r}, needed 'silu', 'gelu' or 'gelu_tanh'")
    weights, ids = _flat("topk_weights", topk_weights), _flat("topk_ids", topk_ids)
    if weights.shape != ids.shape or ids.shape[0] != flat.shape[0] or ids.dtype not in _IDS:
        raise ValueError(
            f"topk_weights {tuple(topk_weights.shape)} and topk_ids {tuple(topk_ids.shape)} {topk_ids.dtype}: "
            f"needed the same shape, one row per token ({flat.shape[0]}), and integer ids"
        )
    if not weights.is_floating_point():
        raise ValueError(f"topk_weights: got {weights.dtype}, needed floating point")
    _check_device(x, topk_weights=topk_weights, topk_ids=topk_ids)
    chosen = select("moe", _scheme(activations), w13.shape, x.device, backend)
    out = chosen.moe(flat, w13, w2, weights, ids, activations, activation, apply_router_weight_on_input)
    return out.reshape(x.shape)


def _scheme(activations: Recipe | None) -> str:
    return "W4A16" if activations is None else "W4A4"


def _check_recipe(where: str, recipe: object) -> None:
    if not isinstance(recipe, Recipe | None):
        hint = "; a Scheme has two: .weights and .activations" if isinstance(recipe, Scheme) else ""
        raise ValueError(f"{where}: got {type(recipe).__name__}, needed a Recipe{hint}")


def _flat(where: str, x: Tensor) -> Tensor:
    _check_tensor(where, x)
    if x.ndim == 0:
        raise ValueError(f"{where}: got a 0-d tensor, needed [..., columns]")
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # spelled out: -1 is ambiguous when there are no tokens


def _check_tensor(where: str, x: object) -> None:
    """Other kinds would fail somewhere in torch, or have dtypes of the same names."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        got = f"a tensor of layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{where}: got {got}, needed a dense torch.Tensor")


def _check_matrix(where: str, x: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"{where}: got shape {tuple(x.shape)}, needed [M, K]")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{where}: got {x.dtype}, needed bfloat16, float16 or float32")
    check_columns(where, x.shape[1])


def _check_device(x: Tensor, **others: Tensor | None) -> None:
    """Tensors on the meta device would make torch take the kernel that only knows shapes."""
    for where, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{where}: got a tensor on {other.device}, needed one on {x.device}, where x is")


def _check_quantized(where: str, q: object) -> None:
    if not isinstance(q, NVFP4Tensor):
        raise ValueError(f"{where}: got {type(q).__name__}, needed an NVFP4Tensor, as quantize makes it")


def _check_weight(where: str, q: NVFP4Tensor, x: Tensor, dims: int) -> torch.Size:
    _check_quantized(where, q)
    if len(q.shape) != dims or q.shape[-1] != x.shape[-1] or q.device != x.device:
        needed = "[N, K]" if dims == 2 else "[E, 2I, K]"
        raise ValueError(
            f"{where}: got {tuple(q.shape)} on {q.device}, needed {needed} with K = {x.shape[-1]} on {x.device}"
        )
    return q.shape
