"""Read NVFP4 checkpoints of every known family: names to tensors, each checked before it is handed out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from fouroversix_plugin.checkpoint.files import Checkpoint, CheckpointError
from fouroversix_plugin.formats import Stored, quantization_block, stored_scheme
from fouroversix_plugin.formats import describe as describe_block
from fouroversix_plugin.nvfp4 import NVFP4Tensor, check_columns
from fouroversix_plugin.weights import check_row_major, stored_weight

_PACKED: Final = ("U8", "I8", "F4")
"""Dtypes of codes, two a byte."""


class LoadedCheckpoint(Mapping[str, "NVFP4Tensor | Tensor"]):
    """The tensors of a checkpoint, read when asked for: quantized weights as :class:`NVFP4Tensor` under the name their
    full-precision weight would have (``….weight``), everything else as it is stored, under its own name.

    Args:
        checkpoint: the folder.
        stored: what its config claims, or None for a checkpoint that is not quantized.
    """

    def __init__(self, checkpoint: Checkpoint, stored: Stored | None) -> None:
        self.checkpoint = checkpoint
        self.stored = stored
        self._weights: dict[str, str] = {}
        parts: set[str] = set()
        if stored is not None:
            self._find(stored, parts)
        self._others = [name for name in checkpoint.tensors if name not in parts]
        clash = self._weights.keys() & set(self._others)
        if clash:
            raise CheckpointError(f"{checkpoint.folder}: {sorted(clash)[0]!r} is there both quantized and not")

    def _find(self, stored: Stored, parts: set[str]) -> None:
        """The modules of which the checkpoint holds any part, and the names of all tensors that belong to them."""
        suffixes = {part: f".{name}" for part, name in stored.format.names.items() if part != "input_scale"}
        held = self.checkpoint.tensors
        for name, tensor in held.items():
            of = [part for part, suffix in suffixes.items() if name.endswith(suffix)]
            # A full-precision weight may have the name that packed ones have.
            if not of or (of == ["packed"] and suffixes["packed"] == ".weight" and tensor.dtype not in _PACKED):
                continue
            module = name.removesuffix(suffixes[of[0]])
            if f"{module}.weight" in self._weights:
                continue
            missing = [module + suffix for suffix in suffixes.values() if module + suffix not in held]
            if missing:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {name!r} is there, {missing[0]!r} is not; the checkpoint is incomplete "
                    f"or not what its config says ({stored.format.name})"
                )
            self._weights[f"{module}.weight"] = module
            parts.update(module + suffix for suffix in suffixes.values())
        if not self._weights:
            raise CheckpointError(
                f"{self.checkpoint.folder}: config.json says {stored.format.name}, but no tensor is named "
                f"…{suffixes['block_scale']}"
            )

    @property
    def quantized(self) -> Mapping[str, str]:
        """Name of every quantized weight → its module."""
        return self._weights

    def shape(self, weight: str) -> tuple[int, int]:
        """(N, K) of a quantized weight, from the headers."""
        assert self.stored is not None
        tensors = dict(self.stored.format.tensors(self._weights[weight]))
        where, held = self.checkpoint.folder, self.checkpoint.tensors
        if "metadata" in tensors:
            name = tensors["metadata"]
            values = self.checkpoint.read(name).tolist() if held[name].shape == (6,) else None
            if values is None or not all(type(value) is int and value >= 0 for value in values):
                got = f"shape {held[name].shape}" if values is None else str(values)
                raise CheckpointError(
                    f"{where}: {name}: got {got}, needed six integers: rows, columns, both padded, 1, 1"
                )
            rows, columns = values[:2]
        else:
            name = tensors["packed"]
            if len(held[name].shape) != 2:
                raise CheckpointError(f"{where}: {name}: got shape {held[name].shape}, needed [N, K/2]")
            rows, columns = held[name].shape
            columns *= 1 if held[name].dtype == "F4" else 2
        try:
            check_columns(name, columns)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        return rows, columns

    def __getitem__(self, name: str) -> NVFP4Tensor | Tensor:
        if name not in self._weights:
            if name not in self.checkpoint.tensors:
                raise KeyError(name)
            return self.checkpoint.read(name)
        assert self.stored is not None
        module, form, recipe = self._weights[name], self.stored.format, self.stored.scheme.weights
        try:
            rows, columns = self.shape(name)
            parts = {
                part: form.canonical(part, tensor, self.checkpoint.read(tensor), rows, columns, recipe)
                for part, tensor in form.tensors(module)
                if part != "input_scale"
            }
            if not form.padded:
                check_row_major(f"{module}.{form.names['block_scale']}", parts["block_scale"])
            scale = parts["decode_scale"]
            widths = [1] * rows if scale.ndim else [rows]
            return stored_weight(module, parts["packed"], parts["block_scale"], scale.reshape(-1), widths, recipe)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.folder}: {error}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._weights or name in self.checkpoint.tensors  # Mapping's own reads and checks the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted([*self._weights, *self._others]))

    def __len__(self) -> int:
        return len(self._weights) + len(self._others)


def load_checkpoint(path: Path | str) -> LoadedCheckpoint:
    """Open a checkpoint in any of the known spellings of NVFP4, or one that is not quantized.

    Our own, ModelOpt's (W4A4 and W4A16), compressed-tensors' ``nvfp4-pack-quantized`` and fouroversix's. A weight is
    checked for dtypes, shapes, the direction, sign and range of its scales and their layout when it is read.

    Raises:
        CheckpointError: files that are not sound, another quantization, or a config that is not understood.
    """
    checkpoint = Checkpoint.open(path)
    try:
        block = quantization_block(checkpoint.config, checkpoint.hf_quant_config)
        stored = None if block is None else stored_scheme(block)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error
    if block is not None and stored is None:
        raise CheckpointError(
            f"{checkpoint.folder}: got {describe_block(block)}, needed NVFP4 (nvfp4_4over6, modelopt, "
            "compressed-tensors nvfp4-pack-quantized or fouroversix) or full precision"
        )
    return LoadedCheckpoint(checkpoint, stored)
