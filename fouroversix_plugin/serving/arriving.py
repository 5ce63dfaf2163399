"""A full-precision weight that is quantized as soon as all of it has arrived, for engines that load whole models first.

Memory for it exists from its first tensor to its last. Ranks need not talk: an engine's loader is handed whole tensors
and copies the rank's part of them, so each rank sees the amax of all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fouroversix_plugin.formats import check_arriving
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe
from fouroversix_plugin.weights import missing, quantize_weight


class _Copies(TorchDispatchMode):
    """Where in a storage tensors are copied to: (offset, how many values) of each copy.

    Args:
        storage: to watch.
        closed: whether copying there is a RuntimeError, as touching a tensor without memory is.
    """

    def __init__(self, storage: torch.UntypedStorage, closed: bool) -> None:
        super().__init__()
        self.made: list[tuple[int, int]] = []
        # The storage itself, not its memory: without any, all of them lie at 0.
        self._storage, self._closed = storage._cdata, closed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].untyped_storage()._cdata == self._storage:
            if self._closed:
                raise RuntimeError("a copy into a weight that is quantized already")
            self.made.append((args[0].storage_offset(), args[0].numel()))
        return func(*args, **(kwargs or {}))


class ArrivingWeight:
    """The weight [N, K] or [E, N, K] of one layer on this rank.

    Args:
        name: full name of the layer, for errors.
        data: what an engine's loader copies into; its memory is given back until the first tensor comes.
        full_columns: K over all ranks.
        recipe: of the weights.
    """

    def __init__(self, name: str, data: Tensor, full_columns: int, recipe: Recipe) -> None:
        self._name, self._data, self._full_columns, self._recipe = name, data, full_columns, recipe
        self._nbytes = data.untyped_storage().nbytes()
        self._missing = data.numel()
        self._filled: set[tuple[int, int]] = set()
        self._amax: Tensor | None = None
        self._quantized: NVFP4Tensor | None = None
        # Some models load from several threads.
        self._lock = threading.Lock()
        data.untyped_storage().resize_(0)

    def loader(self, loader: Callable[..., object], rows: Callable[..., int | None]) -> Callable[..., object]:
        """An engine's ``weight_loader(param, loaded_weight, …)`` that sees what it copies, and quantizes at the end.

        Args:
            loader: the engine's.
            rows: given what the engine says of the shard, its N over all ranks, or None where that is not known.
        """

        def load(param: Tensor, loaded_weight: Tensor, *shard: Any, **named: Any) -> object:
            # Engines pad what is too small.
            check_arriving(self._name, loaded_weight, rows(*shard, **named), self._full_columns)
            with self._lock:
                complete, storage = self._missing == 0, self._data.untyped_storage()
                if not complete and storage.nbytes() == 0:
                    storage.resize_(self._nbytes)
                copies = _Copies(storage, complete)
                try:
                    # Experts of other ranks are handed over, too, and copied nowhere.
                    with copies:
                        result = loader(param, loaded_weight, *shard, **named)
                except RuntimeError as error:
                    if not complete:
                        raise
                    raise ValueError(
                        f"{self._name}.weight: got a tensor after all of its {self._data.numel()} values had come; "
                        "weights that are quantized while loading cannot be loaded again: restart the server"
                    ) from error
                self._note(loaded_weight, copies.made)
                if self._missing == 0 and not complete:
                    self._quantized = quantize_weight(self._name, self._data, self._recipe, self._widened)
                    storage.resize_(0)
            return result

        return load

    def _note(self, given: Tensor, copies: list[tuple[int, int]]) -> None:
        copied = sum(values for _, values in copies)
        # What comes twice, from files that overlap, does not stand for what never comes.
        self._missing -= sum(values for offset, values in {*copies} - self._filled)
        self._filled.update(copies)
        if copied in (0, given.numel()):
            return
        # Only a part of it lies here; all of it decides what the weight is scaled for.
        if self._amax is None:
            self._amax = torch.zeros(self._data.shape[:-2], dtype=torch.float32, device=self._data.device)
        if given.ndim == self._data.ndim:
            parts = [self._amax_of(part) for part in given.reshape(-1, *given.shape[-2:])]
            torch.maximum(self._amax, torch.stack(parts).reshape(self._amax.shape), out=self._amax)
            return
        amax = self._amax_of(given)
        expert_values = self._data[0].numel()
        for expert in {offset // expert_values for offset, _ in copies}:
            self._amax[expert] = torch.maximum(self._amax[expert], amax)

    def _amax_of(self, matrix: Tensor) -> Tensor:
        # Copying it to a GPU is faster than reading it on one core, which is what engines leave to a loading rank.
        return matrix.to(self._data.device).abs().amax().float()

    def _widened(self, amax: Tensor) -> Tensor:
        return amax if self._amax is None else torch.maximum(amax, self._amax)

    def take(self) -> NVFP4Tensor:
        """The quantized weight, once.

        Raises:
            ValueError: not all of it has come.
        """
        quantized, self._quantized = self._quantized, None
        if quantized is None:
            raise ValueError(missing(self._name, "weight"))
        return quantized
