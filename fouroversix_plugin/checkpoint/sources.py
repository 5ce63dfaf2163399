"""What a full-precision checkpoint holds, as matrices to quantize: BF16, FP16, FP32 or FP8, one by one or stacked.

A :class:`Matrix` is one linear weight [N, K] wherever it lies: a tensor of its own, or one expert's part of a stacked
3-D tensor, in either orientation. It is read a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from fouroversix_plugin.checkpoint.files import Checkpoint, CheckpointError, StoredTensor
from fouroversix_plugin.formats import describe, quantization_block, stored_scheme

FULL_PRECISION: Final = ("BF16", "F16", "F32")
FP8: Final = ("F8_E4M3", "F8_E5M2")
_FP8_METHODS: Final = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
_FP8_BLOCK: Final = (128, 128)

_SCALES: Final = ("weight_scale_inv", "weight_scale")
"""Names of FP8 decode scales. The first is DeepSeek's, and it multiplies whatever it is called."""

_SCALE_DTYPES: Final = ("F64", *FULL_PRECISION, "F8_E8M0")
"""Exponents as bare bytes (U8) would be read as numbers."""

_FP8_EXTRAS: Final = (*_SCALES, "input_scale", "activation_scale", "input_scale_ub")
"""What an FP8 checkpoint keeps beside a weight; meaningless once the weight is NVFP4."""

_TRANSPOSED: Final[Mapping[str, tuple[str, ...]]] = {"gpt2": ("c_attn", "c_fc", "c_proj", "q_attn")}
"""Names of Conv1D modules, whose weights are [K, N], by model type."""

_STACKED: Final = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""Names of stacked expert tensors, with the projections of an expert that each holds, in the order of its outputs."""

_PARALLEL: Final = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}
"""Granite's names of stacked expert weights, which are [E, N, K] beside no module of experts, by the usual ones."""

_MAMBA_1: Final = ("in_proj", "x_proj", "dt_proj", "out_proj")
"""Linear layers of a Mamba-1 mixer, the middle two no other has."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear weight [rows, columns] of a checkpoint.

    Args:
        module: full name of the module it belongs to.
        tensor: name of the tensor that holds it.
        rows: N.
        columns: K.
        scale: name of the tensor with its FP8 decode scales, or None.
        expert: which of a stacked tensor's experts, or None.
        first_row: where its outputs start within the expert.
        transposed: whether the stacked tensor is [E, K, N].
    """

    module: str
    tensor: str
    rows: int
    columns: int
    scale: str | None = None
    expert: int | None = None
    first_row: int = 0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to be quantized, and how its FP8 weights are scaled."""

    checkpoint: Checkpoint
    fp8_block: tuple[int, int]

    @staticmethod
    def open(checkpoint: Checkpoint) -> Source:
        """Refuse what cannot be quantized: a checkpoint that is quantized already, except to FP8.

        Raises:
            CheckpointError: with what it is.
        """
        try:
            block = quantization_block(checkpoint.config, checkpoint.hf_quant_config)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.folder}: {error}") from error
        if block is None:
            return Source(checkpoint, _FP8_BLOCK)
        fp8 = any(stored.dtype in FP8 for name, stored in checkpoint.tensors.items() if name.endswith(".weight"))
        if block.get("quant_method") not in _FP8_METHODS or not fp8 or _is_nvfp4(block):
            raise CheckpointError(
                f"{checkpoint.folder}: already quantized ({describe(block)}), needed full-precision or FP8 weights"
            )
        size = block.get("weight_block_size") or _FP8_BLOCK
        if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
            raise CheckpointError(f"{checkpoint.folder}: weight_block_size: got {size!r}, needed two sizes")
        return Source(checkpoint, (size[0], size[1]))

    def fp8_extra_of(self, name: str) -> str | None:
        """The FP8 weight that the tensor ``name`` only serves (as a scale), or None."""
        module, _, last = name.rpartition(".")
        weight = self.checkpoint.tensors.get(f"{module}.weight")
        return f"{module}.weight" if last in _FP8_EXTRAS and weight is not None and weight.dtype in FP8 else None

    def matrices(self, name: str, stored: StoredTensor) -> list[Matrix] | None:
        """The linear weights that the tensor ``name`` holds, or None where it holds none.

        Raises:
            CheckpointError: an FP8 weight without a usable scale, or experts stacked in a way not known.
        """
        if self.is_transposed(name):
            return None
        if name.endswith(".weight") and len(stored.shape) == 2:
            whole = name.removesuffix(".weight")
            rows, columns = stored.shape
            return [Matrix(whole, name, rows, columns, self._scale_of(whole, stored))]
        stack = stack_of(name, stored)
        return None if stack is None else self._stacked(name, *stack, stored)

    def is_transposed(self, name: str) -> bool:
        """Whether the tensor ``name`` is the weight of a Conv1D module, as GPT-2 has in the place of linear ones."""
        module, _, last = name.rpartition(".")
        names = _TRANSPOSED.get(str(self.checkpoint.config.get("model_type")), ())
        return last == "weight" and module.rpartition(".")[2] in names

    def is_of_mamba_1(self, module: str) -> bool:
        """Whether ``module`` is a linear layer of a Mamba-1 mixer: Mamba-2's have such names, too."""
        parent, _, name = module.rpartition(".")
        middle = (f"{parent}.{there}.weight" in self.checkpoint.tensors for there in _MAMBA_1[1:3])
        return name in _MAMBA_1 and all(middle)

    def read(self, matrix: Matrix, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` of a matrix, in its own dtype; FP8 ones times their scales, in fp32."""
        read = self.checkpoint.read
        if matrix.expert is None:
            rows = read(matrix.tensor, first, last)
            return rows if matrix.scale is None else self._dequantized(matrix, rows, first, last)
        expert = read(matrix.tensor, matrix.expert, matrix.expert + 1)[0]
        wanted = slice(matrix.first_row + first, matrix.first_row + last)
        return expert.t()[wanted].contiguous() if matrix.transposed else expert[wanted]

    def rows_at_a_time(self, matrix: Matrix, nbytes: int) -> Iterator[tuple[int, int]]:
        """Spans of rows of about ``nbytes`` in fp32; whole FP8 blocks, and a transposed expert in one piece."""
        step = matrix.rows if matrix.transposed else max(1, nbytes // (4 * max(matrix.columns, 1)))
        if matrix.scale is not None:
            step = -(-step // self.fp8_block[0]) * self.fp8_block[0]
        return ((first, min(first + step, matrix.rows)) for first in range(0, matrix.rows, step))

    def _scale_of(self, module: str, stored: StoredTensor) -> str | None:
        if stored.dtype not in FP8:
            return None
        scale = next((f"{module}.{name}" for name in _SCALES if f"{module}.{name}" in self.checkpoint.tensors), None)
        if scale is None:
            raise CheckpointError(f"{module}.weight: got {stored.dtype} without a scale, needed {module}.{_SCALES[1]}")
        rows, columns = stored.shape
        blocks = (-(-rows // self.fp8_block[0]), -(-columns // self.fp8_block[1]))
        dtype, got = self.checkpoint.tensors[scale].dtype, self.checkpoint.tensors[scale].shape
        if dtype not in _SCALE_DTYPES:
            raise CheckpointError(f"{scale}: got {dtype}, needed {', '.join(_SCALE_DTYPES)}")
        if got not in {(), (1,), (1, 1), (rows,), (rows, 1), blocks}:
            raise CheckpointError(
                f"{scale}: got shape {got}, needed one value, one per row ({rows}) or one per block {blocks}"
            )
        return scale

    def _dequantized(self, matrix: Matrix, rows: Tensor, first: int, last: int) -> Tensor:
        assert matrix.scale is not None
        scale = self.checkpoint.read(matrix.scale).float()
        if scale.numel() > 1:
            if scale.ndim == 1 or scale.shape == (matrix.rows, 1):
                scale = scale.reshape(-1, 1)[first:last]
            else:
                height, width = self.fp8_block
                scale = scale[first // height : -(-last // height)]
                scale = scale.repeat_interleave(height, 0)[: last - first].repeat_interleave(width, 1)
                scale = scale[:, : matrix.columns]
        return rows.float() * scale

    def _stacked(self, name: str, module: str, last: str, stored: StoredTensor) -> list[Matrix]:
        experts, a, b = stored.shape
        hidden = _hidden_size(self.checkpoint.config)
        parts = _STACKED.get(last)
        shape = f"experts stacked in {name} {stored.shape}"
        if stored.dtype in FP8:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {shape}: got FP8, needed {', '.join(FULL_PRECISION)} in stacked experts; "
                "multiply them out first"
            )
        if parts is None or f"{module}.{last}_bias" in self.checkpoint.tensors:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {shape}: got a kind that is not supported (biases or names other than "
                f"{', '.join(_STACKED)}); add {module!r} to `ignore`"
            )
        transposed = False
        if not _is_parallel(name):
            if hidden is None or (a == hidden) == (b == hidden):
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {shape}: which dimension is the input cannot be told from hidden_size "
                    f"{hidden}; add {module!r} to `ignore`"
                )
            transposed = (b if last == "down_proj" else a) == hidden
        rows, columns = (b, a) if transposed else (a, b)
        if rows % len(parts):
            raise CheckpointError(f"{self.checkpoint.folder}: {shape}: got {rows} outputs, needed an even number")
        each = rows // len(parts)
        return [
            Matrix(f"{module}.{e}.{part}", name, each, columns, None, e, i * each, transposed)
            for e in range(experts)
            for i, part in enumerate(parts)
        ]


def stack_of(name: str, stored: StoredTensor) -> tuple[str, str] | None:
    """The module of the experts that the tensor ``name`` stacks, as engines name it, and the stack's name; or None."""
    if len(stored.shape) != 3:
        return None
    module, _, last = name.removesuffix(".weight").rpartition(".")
    if _is_parallel(name):
        return f"{module}.experts", _PARALLEL[last]
    return (module, last) if module.endswith(".experts") or ".experts." in name else None


def _is_parallel(name: str) -> bool:
    return name.endswith(tuple(f".{last}.weight" for last in _PARALLEL))


def _is_nvfp4(block: Mapping[str, Any]) -> bool:
    try:
        return stored_scheme(block) is not None
    except ValueError:
        return True


def _hidden_size(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    for holder in (text if isinstance(text, Mapping) else {}, config):
        size = holder.get("hidden_size")
        if type(size) is int:
            return size
    return None
