"""The NVFP4 format: codes, packing, scale layouts, and the tensor that holds them together. No arithmetic on values.

value = e2m1 * block_scale * decode_scale. Two e2m1 codes a byte (even column in the low nibble), one E4M3
``block_scale`` per 16 columns, one fp32 ``decode_scale`` per tensor or per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from fouroversix_plugin.recipe import BLOCK_SIZE

E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of each 3-bit code; bit 3 of a code is the sign."""

_CODE_OF_SIX: Final = 7
_BYTES_AT_A_TIME: Final = 2**23
"""Of packed codes that are looked at: unpacked, all of a layer's experts would not fit beside them."""

ScaleLayout = Literal["row_major", "128x4", "8x4"]


@dataclass(frozen=True, slots=True, eq=False)
class NVFP4Tensor:
    """A quantized tensor of logical shape [..., M, K]; leading dimensions are experts.

    Args:
        packed: uint8 [..., M, K/2].
        block_scale: float8_e4m3fn [..., M, K/16], row-major, as stored.
        decode_scale: float32, one per matrix ([...]) or one per row ([..., M]).

    Raises:
        ValueError: dtypes, shapes or devices that do not fit together, with what was got and what was needed.
    """

    packed: Tensor
    block_scale: Tensor
    decode_scale: Tensor

    def __post_init__(self) -> None:
        _dtype("packed", self.packed, torch.uint8)
        _dtype("block_scale", self.block_scale, torch.float8_e4m3fn)
        _dtype("decode_scale", self.decode_scale, torch.float32)
        if self.packed.ndim < 2:
            raise ValueError(f"packed: got shape {tuple(self.packed.shape)}, needed [..., M, K/2]")
        *lead, rows, half = self.packed.shape
        check_columns("packed", half * 2)
        expected = (*lead, rows, half * 2 // BLOCK_SIZE)
        if tuple(self.block_scale.shape) != expected:
            raise ValueError(
                f"block_scale: got shape {tuple(self.block_scale.shape)}, needed {expected} "
                f"for packed {tuple(self.packed.shape)}"
            )
        # Compared, not looked up: sizes can be symbols, which have no hash.
        if tuple(self.decode_scale.shape) not in (tuple(lead), (*lead, rows)):
            raise ValueError(
                f"decode_scale: got shape {tuple(self.decode_scale.shape)}, needed {tuple(lead)} (one per matrix) "
                f"or {(*lead, rows)} (one per row)"
            )
        devices = {tensor.device for tensor in (self.packed, self.block_scale, self.decode_scale)}
        if len(devices) > 1:
            raise ValueError(f"packed, block_scale and decode_scale: got devices {devices}, needed one")

    def __getstate__(self) -> tuple[Tensor, Tensor, Tensor]:
        # As bytes: pickle writes torch's float8 tensors, but does not read them.
        return self.packed, self.block_scale.view(torch.uint8), self.decode_scale

    def __setstate__(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        packed, bytes_, decode_scale = state
        for name, part in zip(self.__slots__, (packed, bytes_.view(torch.float8_e4m3fn), decode_scale), strict=True):
            object.__setattr__(self, name, part)

    @property
    def shape(self) -> torch.Size:
        """Logical shape [..., M, K]."""
        return torch.Size((*self.packed.shape[:-1], self.packed.shape[-1] * 2))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.packed.nbytes + self.block_scale.nbytes + self.decode_scale.nbytes

    @property
    def row_decode_scale(self) -> Tensor:
        """float32 [..., M]: the decode scale of every row."""
        if self.decode_scale.ndim == self.packed.ndim - 1:
            return self.decode_scale
        return self.decode_scale.unsqueeze(-1).expand(self.packed.shape[:-1])

    @staticmethod
    def stack(parts: Sequence[NVFP4Tensor]) -> NVFP4Tensor:
        """Matrices of one shape as the experts of one tensor."""
        # As bytes: stacking needs to know nothing of float8.
        scales = torch.stack([part.block_scale.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        packed, decode_scale = torch.stack([p.packed for p in parts]), torch.stack([p.decode_scale for p in parts])
        return NVFP4Tensor(packed, scales, decode_scale)

    def to(self, device: torch.device | str) -> NVFP4Tensor:
        return self._map(lambda tensor: tensor.to(device))

    def __getitem__(self, expert: int) -> NVFP4Tensor:
        """One matrix of a tensor with leading dimensions."""
        if self.packed.ndim == 2:
            raise IndexError("a matrix has no experts to choose from")
        return self._map(lambda tensor: tensor[expert])

    def rows(self, first: int, last: int) -> NVFP4Tensor:
        """Rows ``first`` to ``last`` of a matrix."""
        decode_scale = self.decode_scale[first:last] if self.decode_scale.ndim else self.decode_scale
        return NVFP4Tensor(self.packed[first:last], self.block_scale[first:last], decode_scale)

    def _map(self, change: Callable[[Tensor], Tensor]) -> NVFP4Tensor:
        return NVFP4Tensor(change(self.packed), change(self.block_scale), change(self.decode_scale))

    def share_of_four(self) -> float:
        """Share of non-zero blocks that hold no code for 6, i.e. that mapped their largest value to 4.

        Read off the stored bytes. Exact where the block scale is a normal, unsaturated E4M3 number: rounding such a
        scale moves the largest value by at most 1/16, so a block mapped to 6 holds a 6 and one mapped to 4 does not.
        """
        fours, blocks = self.block_choices()
        return fours / blocks if blocks else 0.0

    def block_choices(self) -> tuple[int, int]:
        """(blocks that chose 4, non-zero blocks); see :meth:`share_of_four`."""
        counts = torch.zeros(2, dtype=torch.int64, device=self.packed.device)
        if self.packed.numel():
            rows = max(1, _BYTES_AT_A_TIME // self.packed.shape[-1])
            for packed in self.packed.flatten(0, -2).split(rows):
                magnitudes = unpack(packed).bitwise_and_(7).unflatten(-1, (-1, BLOCK_SIZE))
                largest = magnitudes.amax(dim=-1)
                nonzero = largest > 0
                counts += torch.stack(((nonzero & (largest < _CODE_OF_SIX)).sum(), nonzero.sum()))
        fours, blocks = counts.tolist()
        return fours, blocks


def check_columns(where: str, columns: int) -> None:
    """Raise ValueError unless ``columns`` is a positive multiple of the block size."""
    if columns <= 0 or columns % BLOCK_SIZE:
        raise ValueError(f"{where}: got K = {columns}, needed a positive multiple of {BLOCK_SIZE}")


def pack(codes: Tensor) -> Tensor:
    """Codes 0..15 as uint8 [..., K] to bytes [..., K/2]: even column in the low nibble."""
    _dtype("codes", codes, torch.uint8)
    if codes.shape[-1] % 2:
        raise ValueError(f"codes: got {codes.shape[-1]} columns, needed an even number")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Bytes [..., K/2] to codes 0..15 as uint8 [..., K]; the inverse of :func:`pack`."""
    _dtype("packed", packed, torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def scales_to_layout(block_scale: Tensor, layout: ScaleLayout) -> Tensor:
    """Row-major block scales [M, C] to the order a kernel or a file wants; padding is 0.

    ``128x4`` (cuBLAS and CUTLASS block-scaled GEMMs): rows padded to 128, columns to 4, and within a 128x4 tile the
    byte of (r, c) at (r % 32) * 16 + (r % 128) // 32 * 4 + c. ``8x4`` (TensorRT-LLM small-M kernels): rows padded to
    8, columns to 4, tiles of 8x4 row-major.

    Returns:
        The same dtype: [M, C] for ``row_major``, flat for the others.
    """
    if block_scale.ndim != 2:
        raise ValueError(f"block_scale: got shape {tuple(block_scale.shape)}, needed [M, K/16]")
    if layout == "row_major":
        return block_scale
    rows, columns = block_scale.shape
    index = _layout_index(layout, rows, columns, block_scale.device)
    padded_rows, padded_columns = padded_scale_shape(layout, rows, columns)
    flat = torch.zeros(padded_rows * padded_columns, dtype=torch.uint8, device=block_scale.device)
    flat[index] = block_scale.contiguous().view(torch.uint8)
    return flat.view(block_scale.dtype)


def scales_from_layout(scales: Tensor, layout: ScaleLayout, rows: int, columns: int) -> Tensor:
    """Block scales in ``layout`` back to row-major [rows, columns]; the inverse of :func:`scales_to_layout`.

    Raises:
        ValueError: a number of scales other than the padded shape holds.
    """
    padded_rows, padded_columns = padded_scale_shape(layout, rows, columns)
    if scales.numel() != padded_rows * padded_columns:
        raise ValueError(
            f"scales in layout {layout}: got {scales.numel()}, needed {padded_rows} x {padded_columns} = "
            f"{padded_rows * padded_columns} for {rows} x {columns}"
        )
    if layout == "row_major":
        return scales.reshape(rows, columns)
    index = _layout_index(layout, rows, columns, scales.device)
    return scales.contiguous().view(torch.uint8).flatten()[index].view(scales.dtype)


def padded_scale_shape(layout: ScaleLayout, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that [rows, columns] block scales take in ``layout``."""
    row_tile, column_tile = {"row_major": (1, 1), "128x4": (128, 4), "8x4": (8, 4)}[layout]
    return -(-rows // row_tile) * row_tile, -(-columns // column_tile) * column_tile


def _layout_index(layout: ScaleLayout, rows: int, columns: int, device: torch.device) -> Tensor:
    """int64 [rows, columns]: where each row-major scale lies in the flat layout."""
    r = torch.arange(rows, device=device).unsqueeze(1)
    c = torch.arange(columns, device=device).unsqueeze(0)
    tiles_per_row = padded_scale_shape(layout, rows, columns)[1] // 4
    if layout == "128x4":
        tile = (r // 128) * tiles_per_row + c // 4
        return tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
    tile = (r // 8) * tiles_per_row + c // 4
    return tile * 32 + (r % 8) * 4 + c % 4


def _dtype(what: str, tensor: object, needed: torch.dtype) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != needed:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{what}: got {got}, needed {needed}")
