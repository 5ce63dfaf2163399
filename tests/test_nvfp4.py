"""The format: where every nibble and every scale lies, and which tensors do not fit together."""

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from conftest import assert_same_bytes, assert_same_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fouroversix_plugin.nvfp4 import NVFP4Tensor, pack, padded_scale_shape, scales_from_layout, scales_to_layout, unpack

E4M3 = torch.float8_e4m3fn
LAYOUTS = ("128x4", "8x4")


def scales(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random block scales, none of them 0 or NaN, so that padding shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 0x7F, (rows, columns), dtype=torch.uint8, generator=generator)


# --- codes ---


def test_nibble_order_and_sign_bit_do_not_move() -> None:
    codes = torch.tensor([[1, 2, 3, 4], [15, 0, 8, 7]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0x21, 0x43], [0x0F, 0x78]]
    assert unpack(torch.tensor([0x21, 0x8F], dtype=torch.uint8)).tolist() == [1, 2, 15, 8]


@given(data=st.lists(st.integers(0, 15), min_size=2, max_size=64))
def test_packing_loses_no_code(data: list[int]) -> None:
    codes = torch.tensor(data[: len(data) // 2 * 2], dtype=torch.uint8)
    assert unpack(pack(codes)).tolist() == codes.tolist()


def test_every_byte_survives_unpacking() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    assert_same_tensor("bytes", pack(unpack(packed)), packed)
    assert_same_tensor("codes of a view", unpack(packed.transpose(0, 1)), unpack(packed).transpose(0, 1).contiguous())


def test_codes_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(ValueError, match="codes: got 3 columns, needed an even number"):
        pack(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"codes: got torch.int64, needed torch.uint8"):
        pack(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"packed: got torch.int8, needed torch.uint8"):
        unpack(torch.zeros(2, 4, dtype=torch.int8))


# --- scale layouts ---


def slowly_laid_out(block_scale: Tensor, layout: str) -> list[int]:
    """The index formulas of design/numerics.md, one scale at a time; C is the padded number of columns."""
    rows, columns = block_scale.shape
    row_tile = {"128x4": 128, "8x4": 8}[layout]
    R, C = (rows + row_tile - 1) // row_tile * row_tile, (columns + 3) // 4 * 4
    flat = [0] * (R * C)
    for r, row in enumerate(block_scale.tolist()):
        for c, scale in enumerate(row):
            if layout == "128x4":
                index = ((r // 128) * (C // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
            else:
                index = ((r // 8) * (C // 4) + c // 4) * 32 + (r % 8) * 4 + c % 4
            flat[index] = scale
    return flat


@pytest.mark.parametrize("layout", LAYOUTS)
@given(rows=st.integers(1, 300), columns=st.integers(1, 40))
@settings(max_examples=100)
def test_no_scale_moves_and_padding_is_zero(layout: Any, rows: int, columns: int) -> None:
    block_scale = scales(rows, columns, seed=rows * 41 + columns)
    laid_out = scales_to_layout(block_scale, layout)
    assert laid_out.tolist() == slowly_laid_out(block_scale, layout)
    assert_same_tensor("round trip", scales_from_layout(laid_out, layout, rows, columns), block_scale)


def test_layouts_are_not_mistaken_for_one_another() -> None:
    # The padded sizes agree, so only the bytes tell which layout a file holds.
    block_scale = scales(256, 8)
    flat = {
        layout: bytes(scales_to_layout(block_scale, layout).flatten().tolist()) for layout in ("row_major", *LAYOUTS)
    }
    assert len({len(data) for data in flat.values()}) == 1
    assert len(set(flat.values())) == 3
    # What lies transposed is no other layout of the same either.
    transposed = scales_to_layout(block_scale.t().contiguous(), "128x4")
    assert bytes(transposed.tolist())[: 256 * 8] not in flat.values()


@pytest.mark.parametrize(
    ("layout", "rows", "columns", "padded"),
    [("128x4", 1, 1, (128, 4)), ("128x4", 129, 5, (256, 8)), ("8x4", 9, 4, (16, 4)), ("row_major", 9, 5, (9, 5))],
)
def test_padding_is_to_the_tile(layout: Any, rows: int, columns: int, padded: tuple[int, int]) -> None:
    assert padded_scale_shape(layout, rows, columns) == padded
    assert scales_to_layout(scales(rows, columns), layout).numel() == padded[0] * padded[1]


@pytest.mark.parametrize("layout", ["row_major", *LAYOUTS])
def test_layouts_keep_the_dtype_and_take_views(layout: Any) -> None:
    block_scale = scales(6, 130).t().view(E4M3)  # [130, 6], not contiguous
    laid_out = scales_to_layout(block_scale, layout)
    assert laid_out.dtype == E4M3
    assert_same_tensor("round trip", scales_from_layout(laid_out, layout, 130, 6), block_scale.contiguous())


def test_scales_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layout 128x4: got 512, needed 256 x 8 = 2048 for 130 x 5"):
        scales_from_layout(scales(128, 4).flatten(), "128x4", 130, 5)
    with pytest.raises(ValueError, match=r"layout row_major: got 8, needed 3 x 3 = 9"):
        scales_from_layout(scales(2, 4), "row_major", 3, 3)
    with pytest.raises(ValueError, match=r"block_scale: got shape \(2, 3, 4\), needed \[M, K/16\]"):
        scales_to_layout(scales(6, 4).view(2, 3, 4), "128x4")


# --- the tensor ---


def tensor(*lead: int, rows: int = 2, columns: int = 32, per_row: bool = False) -> NVFP4Tensor:
    all_rows = torch.Size((*lead, rows)).numel()
    decode_shape = torch.Size((*lead, rows) if per_row else lead)
    return NVFP4Tensor(
        (torch.arange(all_rows * columns // 2) % 251).to(torch.uint8).view(*lead, rows, columns // 2),
        scales(all_rows, columns // 16).view(*lead, rows, columns // 16).view(E4M3),
        1.0 + torch.arange(decode_shape.numel()).view(decode_shape),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(2, 16, dtype=torch.int8)}, "packed: got torch.int8, needed torch.uint8"),
        ({"packed": [[0] * 16] * 2}, "packed: got list, needed torch.uint8"),
        ({"block_scale": torch.zeros(2, 2, dtype=torch.uint8)}, f"block_scale: got torch.uint8, needed {E4M3}"),
        ({"block_scale": torch.zeros(2, 2)}, f"block_scale: got torch.float32, needed {E4M3}"),
        (
            {"decode_scale": torch.ones((), dtype=torch.bfloat16)},
            "decode_scale: got torch.bfloat16, needed torch.float32",
        ),
        ({"packed": torch.zeros(16, dtype=torch.uint8)}, "packed: got shape (16,), needed [..., M, K/2]"),
        ({"packed": torch.zeros(2, 12, dtype=torch.uint8)}, "packed: got K = 24, needed a positive multiple of 16"),
        ({"packed": torch.zeros(2, 0, dtype=torch.uint8)}, "packed: got K = 0, needed a positive multiple of 16"),
        (
            {"block_scale": torch.zeros(2, 4).to(E4M3)},
            "block_scale: got shape (2, 4), needed (2, 2) for packed (2, 16)",
        ),
        (
            {"block_scale": torch.zeros(2, 1, 2).to(E4M3)},
            "block_scale: got shape (2, 1, 2), needed (2, 2) for packed (2, 16)",
        ),
        (
            {"decode_scale": torch.ones(1)},
            "decode_scale: got shape (1,), needed () (one per matrix) or (2,) (one per row)",
        ),
        ({"decode_scale": torch.ones(2, 1)}, "decode_scale: got shape (2, 1), needed () (one per matrix) or (2,)"),
        ({"decode_scale": torch.ones((), device="meta")}, "got devices {"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change: dict[str, Tensor], message: str) -> None:
    q = tensor()
    parts = {"packed": q.packed, "block_scale": q.block_scale, "decode_scale": q.decode_scale}
    with pytest.raises(ValueError, match=re.escape(message)):
        NVFP4Tensor(**{**parts, **change})


def test_copies_and_files_lose_nothing() -> None:
    # pickle alone cannot read torch's float8 tensors.
    q = tensor(3, per_row=True)
    assert_same_bytes(pickle.loads(pickle.dumps(q)), q)
    assert_same_bytes(copy.deepcopy(q), q)
    file = io.BytesIO()
    torch.save(q, file)
    with torch.serialization.safe_globals([NVFP4Tensor]):
        file.seek(0)
        assert_same_bytes(torch.load(file), q)


def test_experts_need_a_decode_scale_each() -> None:
    q = tensor(3)
    with pytest.raises(ValueError, match=re.escape("got shape (), needed (3,) (one per matrix) or (3, 2)")):
        NVFP4Tensor(q.packed, q.block_scale, torch.ones(()))


def test_every_row_has_its_own_decode_scale() -> None:
    one, rows, experts = tensor(), tensor(per_row=True), tensor(3)
    assert one.row_decode_scale.tolist() == [one.decode_scale.item()] * 2
    assert_same_tensor("rows", rows.row_decode_scale, rows.decode_scale)
    assert experts.row_decode_scale.tolist() == [[scale] * 2 for scale in experts.decode_scale.tolist()]
    assert tensor(3, per_row=True).row_decode_scale.tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("per_row", [False, True])
def test_an_expert_is_its_own_matrix(per_row: bool) -> None:
    q = tensor(3, per_row=per_row)
    assert_same_bytes(q[1], NVFP4Tensor(q.packed[1], q.block_scale[1], q.decode_scale[1]))
    assert q[2].packed.data_ptr() == q.packed[2].data_ptr(), "no copy of an expert's weight"
    with pytest.raises(IndexError, match="a matrix has no experts"):
        tensor()[0]


def test_sizes_are_those_of_the_logical_tensor() -> None:
    q = tensor(3, rows=4, columns=48, per_row=True)
    assert (tuple(q.shape), q.nbytes, q.device.type) == ((3, 4, 48), 3 * 4 * (24 + 3 + 4), "cpu")
    assert q.to("meta").device.type == "meta"
    assert tuple(tensor(rows=0).shape) == (0, 32)


def test_share_of_four_counts_what_a_block_holds() -> None:
    six, four, zero = 7, 6, 0
    blocks = [
        [six] + [1] * 15,
        [four] * 16,  # 4 is its largest
        [zero] * 16,  # no choice was made
        [8] * 16,  # nor here: -0.0
        [six + 8] + [four] * 15,  # -6 is a 6
        [1, four + 8] + [zero] * 14,  # -4 is its largest
    ]
    codes = torch.tensor(blocks, dtype=torch.uint8).view(2, 48)
    q = NVFP4Tensor(pack(codes), torch.ones(2, 3).to(E4M3), torch.ones(()))
    assert q.block_choices() == (2, 4)
    assert q.share_of_four() == 0.5
    empty = NVFP4Tensor(torch.zeros(0, 8, dtype=torch.uint8), torch.zeros(0, 1).to(E4M3), torch.ones(()))
    assert (empty.block_choices(), empty.share_of_four()) == ((0, 0), 0.0)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made within it."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


def test_counting_choices_takes_as_much_memory_as_the_experts() -> None:
    """They are counted while full-precision weights are held, too: unpacked, experts take half as much again."""
    packed = torch.randint(256, (3, 3000, 4096), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    q = NVFP4Tensor(packed, torch.ones(3, 3000, 512).to(E4M3), torch.ones(3))
    with Largest() as largest:
        choices = q.block_choices()
    assert 0 < largest.nbytes <= packed.nbytes // 2
    assert choices == tuple(map(sum, zip(*(q[e].block_choices() for e in range(3)), strict=True)))
