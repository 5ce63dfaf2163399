"""What every engine needs of a quantized layer, without knowing an engine.

A layer's life: its shape is checked when it is created (:func:`check_input_size`); its parameters are filled from a
checkpoint (:class:`WeightShape`, :class:`StoredParameter`) and checked, or its full-precision weight is quantized
(both: :mod:`fouroversix_plugin.weights`); the result is prepared for the device once (:func:`prepare_linear`,
:func:`prepare_experts`); then it is applied.

Every error names the layer, what was got, what was needed and what to do.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fouroversix_plugin.formats import INPUT_SCALE_RANGE, Format, Part
from fouroversix_plugin.kernels import ops, select, set_batch_invariant
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import BLOCK_SIZE, Recipe, Scheme
from fouroversix_plugin.weights import (
    E4M3_NAN,
    NARROW,
    UNLOADED_CODES,
    check_row_major,
    e4m3_value,
    looks_narrow,
    missing,
    to_ignore,
)

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


def check_loading_order(layer: str, ranks: int, load_format: str, extra: object) -> None:
    """Refuse loaders of which each rank may finish another layer first: ranks find the amax of a layer together.

    Args:
        extra: the loader's own options.

    Raises:
        ValueError: with the option that decides it.
    """
    threads = isinstance(extra, Mapping) and bool(extra.get("enable_multithread_load"))
    if ranks == 1 or not (threads or load_format == "runai_streamer"):
        return
    got = "enable_multithread_load" if threads else f"--load-format {load_format}"
    raise ValueError(
        f"{layer}: got {got} with {ranks} ranks that quantize weights while loading, needed tensors in the same order "
        "on all of them; leave it out, or serve a checkpoint that `fouroversix quantize` wrote"
    )


def refuse_offloading(where: str, given: Mapping[str, float]) -> None:
    """Engines move weights away before they are loaded, when those that are quantized while loading have no memory yet.

    Args:
        given: values of the flags that ask for it.

    Raises:
        ValueError: one is not 0.
    """
    for flag, got in given.items():
        if got > 0:
            raise ValueError(
                f"{where}: got {flag} {got:g}, needed none with weights that are quantized while loading; leave the "
                "flag out, or serve a checkpoint that `fouroversix quantize` wrote"
            )


def follow_batch_invariance(asked: bool, switch: str) -> None:
    """Make products of this process batch-invariant where an engine's ``switch`` asks for it: before they are chosen.

    By ours alone, the answers of an engine whose other layers are would still depend on the batch. Where it does not
    ask, whoever has set it otherwise is not overruled.
    """
    if asked:
        set_batch_invariant(True)
        _log_batch_invariance(switch)


@functools.cache
def _log_batch_invariance(switch: str) -> None:
    logger.info("fouroversix: products are batch-invariant, as %s asks", switch)


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

    def stored(self, form: Format) -> Iterator[StoredParameter]:
        """What the parts of a stored weight are loaded into; see :meth:`Format.canonical` for their shapes.

        Everything starts as what no checkpoint holds, so that ``stored_weight`` sees what was never loaded.
        """
        shards = (*self.lead, self.shards)
        empty: dict[Part, Tensor] = {
            "packed": self._filled(self.columns // 2, UNLOADED_CODES),
            "block_scale": self._filled(self.columns // BLOCK_SIZE, E4M3_NAN).view(torch.float8_e4m3fn),
            "decode_scale": torch.full(shards, torch.nan, dtype=torch.float32),
            "input_scale": torch.full(shards, torch.nan, dtype=torch.float32),
            "metadata": torch.zeros(shards, dtype=torch.int64),
        }
        return (StoredParameter(form, part, name, empty[part], self.full_columns) for part, name in form.names.items())

    def _filled(self, columns: int, byte: int) -> Tensor:
        return torch.full((*self.lead, self.rows, columns), byte, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """One tensor of a stored weight as an engine creates and fills it.

    Args:
        form: how the checkpoint spells its weights.
        part: which part of the weight.
        name: of the tensor, after the module's.
        empty: what it is loaded into: the canonical part as this rank holds it.
        full_columns: K over all ranks.
    """

    form: Format
    part: Part
    name: str
    empty: Tensor
    full_columns: int

    def loader(
        self,
        loader: Callable[..., object],
        layer: str,
        recipe: Recipe,
        rows: Callable[..., int | None] = lambda *shard, **named: None,
    ) -> Callable[..., object]:
        """An engine's ``weight_loader(param, loaded_weight, …)`` that checks what it is given and makes it canonical.

        Engines copy whatever they get: a cast would turn bytes into numbers, a slice would hide a tensor too wide, and
        an assertion of theirs names no layer.

        Args:
            loader: the engine's.
            layer: full name of the layer.
            recipe: of the weights, as the checkpoint claims it.
            rows: given what the engine says of the shard, its N over all ranks, or None where that is not known. Some
                engines fill up a tensor that is too small, and all cut one that is too large.
        """
        # Engines hand a parameter's loader on to what takes its place: holding `empty` too, it would keep the memory.
        form, kind, full_columns, where = self.form, self.part, self.full_columns, f"{layer}.{self.name}"

        @functools.wraps(loader)
        def load(param: Tensor, loaded_weight: Tensor, *shard: Any, **named: Any) -> object:
            try:
                part = form.canonical(kind, where, loaded_weight, rows(*shard, **named), full_columns, recipe)
                if kind == "block_scale" and not form.padded:
                    check_row_major(where, part)
            except ValueError as error:
                raise ValueError(
                    f"{error}; config.json and the tensors disagree: quantize the checkpoint again, or add "
                    f"{to_ignore(layer)!r} to the `ignore` list of its config.json"
                ) from error
            if kind == "metadata":  # there to be checked: the shapes are known
                return True if named.get("return_success") else None
            try:
                return loader(param, part, *shard, **named)
            except (AssertionError, RuntimeError, IndexError) as error:
                raise ValueError(
                    f"{where}: a tensor of shape {tuple(part.shape)} does not fit into {tuple(param.shape)} on this "
                    f"rank ({str(error) or type(error).__name__}); config.json and the tensors disagree"
                ) from error

        return load


def static_amax(name: str, input_scale: Tensor) -> Tensor:
    """float32 []: what all activations of a layer are scaled for, from the calibrated scales of its shards and experts.

    They see the same input, so calibration should have given them one amax; the largest serves all.

    Raises:
        ValueError: a scale the checkpoint did not hold, or one that is not positive and finite.
    """
    if not bool((input_scale.isfinite() & (input_scale > 0)).all()):
        if bool(input_scale.isnan().any()):
            raise ValueError(missing(name, "input_scale"))
        raise ValueError(f"{name}.input_scale: got {input_scale.min().item()}, needed finite and above 0")
    return input_scale.max() * INPUT_SCALE_RANGE


class LoadReport:
    """Counts over the layers of a model on this rank, for one line in the log once all of them are loaded.

    Args:
        claimed: what a checkpoint says its weights were quantized with, or None where it says nothing.
    """

    def __init__(self, claimed: Recipe | None = None) -> None:
        self.claimed = claimed
        self._largest = 0
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
            self._largest = max(self._largest, int(q.block_scale.view(torch.uint8).max()))
        if self._pending:
            return
        logger.info(
            "fouroversix: loaded %d layers, %d weights, %.3f bits per weight, %.1f %% of blocks chose 4",
            self._layers,
            self._values,
            8 * self._nbytes / self._values,
            100 * self._fours / max(self._blocks, 1),
        )
        if self.claimed is not None and looks_narrow(self.claimed, e4m3_value(self._largest)):
            logger.warning(
                "fouroversix: the checkpoint says scale_max %d, but no block scale exceeds %g, as with scale_max %d: "
                "the weights are read right either way, but activations would be scaled unlike those of their producer",
                self.claimed.scale_max,
                NARROW.largest_block_scale,
                NARROW.scale_max,
            )
        if prepared.block_scale is None:
            logger.info(
                "fouroversix: on CPU the weights are held dequantized after loading (%s)", prepared.weight.dtype
            )


def prepare_linear(
    name: str, q: NVFP4Tensor, scheme: Scheme, report: LoadReport, dtype: torch.dtype
) -> ops.PreparedWeight:
    """The weight [N, K] of the layer ``name`` as its device wants it for inputs of ``dtype``, counted in the log."""
    select("linear", scheme.name, q.shape, q.device)
    prepared = ops.prepare_weight(q, dtype, scheme=scheme.name)
    report.loaded(name, [q], prepared)
    return prepared


def prepare_experts(
    name: str, w13: NVFP4Tensor, w2: NVFP4Tensor, scheme: Scheme, report: LoadReport, dtype: torch.dtype
) -> tuple[ops.PreparedWeight, ops.PreparedWeight]:
    """As :func:`prepare_linear`, of experts: w13 [E, 2I, H] and w2 [E, H, I]."""
    select("moe", scheme.name, w13.shape, w13.device)
    prepared = ops.prepare_experts(w13, w2, dtype, scheme.name)
    report.loaded(name, [w13, w2], prepared[0])
    return prepared


def apply_linear(
    x: Tensor, w: ops.PreparedWeight, activations: Recipe | None, bias: Tensor | None, input_amax: Tensor | None
) -> Tensor:
    """y = x W^T + bias for x [..., K] on a prepared weight; ``input_amax`` as :func:`static_amax` has it."""
    y = ops.linear(x.reshape(-1, x.shape[-1]), w, activations, bias, input_amax)
    return y.view(*x.shape[:-1], w.decode_scale.shape[0])


def local_expert_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Global expert ids to this rank's; -1 for experts of other ranks and for slots that hold none already."""
    if expert_map is None:
        return topk_ids
    return torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0).long()])
