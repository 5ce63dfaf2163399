"""What every engine needs of a quantized layer, without knowing an engine.

A layer's life: its shape is checked when it is created (:func:`check_input_size`); its parameters are filled from a
checkpoint (:class:`WeightShape`, :func:`checked_loader`) and checked, or its full-precision weight is quantized (both:
:mod:`fouroversix_plugin.weights`); the result is prepared for the device once
(:func:`fouroversix_plugin.kernels.ops.prepare_weight`); then it is applied.

Every error names the layer, what was got, what was needed and what to do.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fouroversix_plugin.kernels import ops
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import BLOCK_SIZE, Recipe
from fouroversix_plugin.weights import E4M3_NAN, UNLOADED_CODES

logger = logging.getLogger(__name__)


def check_input_size(layer: str, per_rank: int, full: int) -> None:
    """Refuse a layer whose K on this rank is not a whole number of blocks.

    Raises:
        ValueError: with the tensor-parallel sizes that would do, or that none does.
    """
    if per_rank % BLOCK_SIZE == 0:
        return
    if full % BLOCK_SIZE:
        remedy = f"its full size {full} is not either: add {layer!r} to `ignore`"
    else:
        sizes = [str(tp) for tp in range(1, 65) if full % (tp * BLOCK_SIZE) == 0]
        remedy = f"use a tensor parallel size of {', '.join(sizes)}, or add {layer!r} to `ignore`"
    raise ValueError(f"{layer}: K per rank: got {per_rank}, needed a multiple of {BLOCK_SIZE}; {remedy}")


@dataclass(frozen=True, slots=True)
class WeightShape:
    """A weight [..., N, K] as one rank holds it.

    Args:
        rows: N on this rank.
        columns: K on this rank.
        full_columns: K over all ranks.
        shards: parts of N with a decode scale of their own in a checkpoint (q/k/v; gate/up).
        lead: leading dimensions (experts).
    """

    rows: int
    columns: int
    full_columns: int
    shards: int
    lead: tuple[int, ...] = ()

    def full_precision(self, dtype: torch.dtype) -> Tensor:
        """What a full-precision weight is loaded into, without memory until it arrives."""
        return torch.empty(*self.lead, self.rows, self.columns, dtype=dtype, device="meta")

    def stored(self) -> Iterator[tuple[str, Tensor, int | None]]:
        """Name, empty tensor and last dimension in the checkpoint (None for the decode scales) of each stored part.

        Everything starts as what no checkpoint holds, so that ``stored_weight`` sees what was never loaded.
        """
        half, blocks = self.columns // 2, self.columns // BLOCK_SIZE
        yield "weight", self._filled(half, UNLOADED_CODES), self.full_columns // 2
        block_scale = self._filled(blocks, E4M3_NAN).view(torch.float8_e4m3fn)
        yield "weight_scale", block_scale, self.full_columns // BLOCK_SIZE
        yield "weight_scale_2", torch.full((*self.lead, self.shards), torch.nan, dtype=torch.float32), None

    def _filled(self, columns: int, byte: int) -> Tensor:
        return torch.full((*self.lead, self.rows, columns), byte, dtype=torch.uint8)


def checked_loader(loader: Callable[..., object], layer: str, name: str, columns: int | None) -> Callable[..., object]:
    """An engine's ``weight_loader(param, loaded_weight, …)`` that checks what it is given.

    Engines copy whatever they get: a cast would turn bytes into numbers, a slice would hide a tensor too wide, and an
    assertion of theirs names no layer.

    Args:
        loader: the engine's.
        layer: full name of the layer.
        name: name of its parameter.
        columns: last dimension of the whole tensor in the checkpoint, None for a decode scale.
    """

    @functools.wraps(loader)
    def load(param: Tensor, loaded_weight: Tensor, *args: object, **kwargs: object) -> object:
        where = f"{layer}.{name}"
        if loaded_weight.dtype == torch.uint8 and param.dtype == torch.float8_e4m3fn:
            loaded_weight = loaded_weight.view(torch.float8_e4m3fn)
        if loaded_weight.dtype != param.dtype and not (loaded_weight.is_floating_point() and columns is None):
            raise ValueError(
                f"{where}: got {loaded_weight.dtype}, needed {param.dtype}; the checkpoint's tensor is not NVFP4: "
                f"quantize the checkpoint again, or add {layer!r} to the `ignore` list of its config.json"
            )
        if columns is not None and (loaded_weight.ndim < 2 or loaded_weight.shape[-1] != columns):
            raise ValueError(
                f"{where}: got shape {tuple(loaded_weight.shape)}, needed {columns} columns; config.json and the "
                "tensors disagree: quantize the checkpoint again"
            )
        try:
            return loader(param, loaded_weight, *args, **kwargs)
        except (AssertionError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"{where}: a tensor of shape {tuple(loaded_weight.shape)} does not fit into {tuple(param.shape)} "
                f"on this rank ({str(error) or type(error).__name__}); config.json and the tensors disagree"
            ) from error

    return load


class LoadReport:
    """Counts over the layers of a model on this rank, for one line in the log once all of them are loaded."""

    def __init__(self) -> None:
        self._pending: set[str] = set()
        self._layers = self._values = self._nbytes = self._fours = self._blocks = 0

    def expect(self, layer: str) -> None:
        """A quantized layer was created."""
        self._pending.add(layer)

    def loaded(self, layer: str, weights: Sequence[NVFP4Tensor], prepared: ops.PreparedWeight) -> None:
        """Its weights are ready; a layer that is loaded again (weight reload) does not count twice."""
        if layer not in self._pending:
            return
        self._pending.remove(layer)
        self._layers += 1
        for q in weights:
            fours, blocks = q.block_choices()
            self._values += q.shape.numel()
            self._nbytes += q.nbytes
            self._fours += fours
            self._blocks += blocks
        if self._pending:
            return
        logger.info(
            "fouroversix: loaded %d layers, %d weights, %.3f bits per weight, %.1f %% of blocks chose 4",
            self._layers,
            self._values,
            8 * self._nbytes / self._values,
            100 * self._fours / max(self._blocks, 1),
        )
        if prepared.block_scale is None:
            logger.info(
                "fouroversix: on CPU the weights are held dequantized after loading (%s)", prepared.weight.dtype
            )


def apply_linear(x: Tensor, w: ops.PreparedWeight, activations: Recipe | None, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias for x [..., K] on a prepared weight."""
    y = ops.linear(x.reshape(-1, x.shape[-1]), w, activations, bias)
    return y.view(*x.shape[:-1], w.decode_scale.shape[0])


def local_expert_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Global expert ids to this rank's; -1 for experts of other ranks and for slots that hold none already."""
    if expert_map is None:
        return topk_ids
    return torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0).long()])
