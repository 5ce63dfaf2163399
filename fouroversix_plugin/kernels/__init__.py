"""Backends: one ordered list, one :func:`select`. The first backend that can do what is asked does it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fouroversix_plugin import reference
from fouroversix_plugin.kernels import build, ops, triton, triton_gemm
from fouroversix_plugin.kernels.invariance import batch_invariant, set_batch_invariant
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe

__all__ = ["Backend", "backends", "batch_invariant", "select", "set_batch_invariant"]

logger = logging.getLogger(__name__)

Op = Literal["quantize", "dequantize", "linear", "moe"]

_PLANNED = ("flashinfer",)
"""Backends of the public API that this release does not have."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The four operations, and which of them it can do.

    ``unsupported(op, scheme, shape, device)`` is None where it can, else the reason why not: ``scheme`` is "W4A4",
    "W4A16" or "" (quantize and dequantize), ``shape`` that of the weight or of what is quantized.
    """

    name: str
    unsupported: Callable[[Op, str, Sequence[int], torch.device], str | None]
    quantize: Callable[..., NVFP4Tensor]
    dequantize: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    moe: Callable[..., Tensor]


Reason = Callable[[], str | None]


def _constant_to_compilers(reason: Reason) -> Reason:
    """``torch.compiler.assume_constant_result`` without importing Dynamo, which takes a second of every start."""
    reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return reason


def _cpu_unsupported(op: Op, scheme: str, shape: Sequence[int], device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"tensors are on {device.type}, not on the CPU"


def _reference_unsupported(op: Op, scheme: str, shape: Sequence[int], device: torch.device) -> str | None:
    return None


def _cuda_unsupported(op: Op, scheme: str, shape: Sequence[int], device: torch.device) -> str | None:
    return _cuda_reason() if device.type == "cuda" else f"tensors are on {device.type}, not on a CUDA device"


@_constant_to_compilers
def _cuda_reason() -> str | None:
    """Why there are no CUDA kernels. This compiles them, if nobody has: the call that follows needs them."""
    return build.load("cuda")


def _triton_unsupported(op: Op, scheme: str, shape: Sequence[int], device: torch.device) -> str | None:
    return _triton_reason() if device.type == "cuda" else f"tensors are on {device.type}, not on a CUDA device"


@_constant_to_compilers
def _triton_reason() -> str | None:
    return triton.reason()


def _linear(
    x: Tensor,
    w: NVFP4Tensor,
    activations: Recipe | None,
    bias: Tensor | None,
    operators: Any = torch.ops.fouroversix,
) -> Tensor:
    prepared = _for_triton(w) if operators is torch.ops.fouroversix_triton else ops.as_stored(w)
    return ops.linear(x, prepared, activations, bias, operators=operators)


def _moe(x: Tensor, w13: NVFP4Tensor, w2: NVFP4Tensor, *rest: object) -> Tensor:
    return ops.moe(x, ops.as_stored(w13), ops.as_stored(w2), *rest)  # type: ignore[arg-type]


def _triton_moe(x: Tensor, w13: NVFP4Tensor, w2: NVFP4Tensor, *rest: object) -> Tensor:
    return ops.moe(x, _for_triton(w13), _for_triton(w2), *rest)  # type: ignore[arg-type]


def _for_triton(w: NVFP4Tensor) -> ops.PreparedWeight:
    """Whose kernels then multiply, whatever else the device has."""
    weight, block_scale = triton_gemm.prepare(w.packed, w.block_scale.view(torch.uint8))
    return ops.PreparedWeight(weight, block_scale, w.row_decode_scale.contiguous(), w.shape[-1])


_BACKENDS = (
    Backend("cpu", _cpu_unsupported, ops.quantize, ops.dequantize, _linear, _moe),
    # Its products are compiled for Hopper; elsewhere they are Triton's or torch's.
    Backend("cuda", _cuda_unsupported, ops.quantize, ops.dequantize, _linear, _moe),
    Backend(
        "triton",
        _triton_unsupported,
        functools.partial(ops.quantize, operators=torch.ops.fouroversix_triton),
        functools.partial(ops.dequantize, operators=torch.ops.fouroversix_triton),
        functools.partial(_linear, operators=torch.ops.fouroversix_triton),
        _triton_moe,
    ),
    Backend(
        "reference",
        _reference_unsupported,
        reference.quantize,
        reference.dequantize,
        reference.linear,
        reference.moe,
    ),
)


def select(op: Op, scheme: str, shape: Sequence[int], device: torch.device, backend: str | None = None) -> Backend:
    """The backend for one operation: the one named, or the first that can.

    Raises:
        ValueError: the named backend does not exist or cannot do this; the message has its reason.
    """
    if backend is not None:
        named = {candidate.name: candidate for candidate in _BACKENDS}.get(backend)
        reason = _not_built(backend) if named is None else named.unsupported(op, scheme, shape, device)
        if named is None or reason is not None:
            what = f"{op} {scheme}".rstrip()
            raise ValueError(f"backend {backend!r} cannot do {what} {tuple(shape)} on {device}: {reason}")
        return named
    passed_over: list[str] = []
    for candidate in _BACKENDS:
        reason = candidate.unsupported(op, scheme, shape, device)
        if reason is None:
            if not torch.compiler.is_compiling():  # a log call would break the graph
                _log_choice(op, scheme, device.type, candidate.name, "; ".join(passed_over))
            return candidate
        passed_over.append(f"{candidate.name}: {reason}")
    raise AssertionError("the reference backend does everything")


@functools.cache
def _log_choice(op: Op, scheme: str, device: str, name: str, passed_over: str) -> None:
    why = f" (passed over: {passed_over})" if passed_over else ""
    logger.info("fouroversix: %s on %s by the %s backend%s", f"{op} {scheme}".rstrip(), device, name, why)


def _not_built(backend: str) -> str:
    names = ", ".join(candidate.name for candidate in _BACKENDS)
    return "planned, not in this release" if backend in _PLANNED else f"no such backend; there are {names}"


def backends() -> dict[str, str | None]:
    """Every backend of the public API with None if it can be used on this machine, else the reason why not."""
    available: dict[str, str | None] = {
        "reference": None,
        "cpu": None,
        "cuda": build.reason("cuda"),
        "triton": triton.reason(),
    }
    return available | {name: _not_built(name) for name in _PLANNED}
