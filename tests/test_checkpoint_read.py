"""Reading NVFP4 of every family: the same bytes from each, and what is damaged or mislabelled refused by name."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    BLOCKS,
    CONFIG,
    FAMILIES,
    NVFP4_ARGUMENTS,
    RECIPE,
    SINGLE,
    header_of,
    parts,
    raw_file,
    redtype,
    single,
    tiled,
    write_family,
)
from conftest import assert_same_bytes, assert_same_tensor, mixed_magnitudes
from safetensors.torch import load_file, save_file
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin.checkpoint import CheckpointError, load_checkpoint
from fouroversix_plugin.nvfp4 import NVFP4Tensor, scales_to_layout
from fouroversix_plugin.recipe import Recipe
from fouroversix_plugin.reference import quantize as reference_quantize

# Shapes that padding changes: rows that 128, columns that 64 and scales that 4 do not divide.
WEIGHTS = {
    "layers.0.q_proj": mixed_magnitudes(32, 64, seed=1, spread=2),
    "layers.0.o_proj": mixed_magnitudes(48, 80, seed=2, spread=2) * 0.1,
    "layers.1.up_proj": mixed_magnitudes(130, 48, seed=3, spread=2),
    "layers.1.zero_proj": torch.zeros(16, 16),
}
OTHERS = {"lm_head.weight": torch.arange(64.0).reshape(4, 16), "norm.weight": torch.ones(16).bfloat16()}
LAYER = "layers.0.q_proj"
UNPADDED = [family for family in FAMILIES if family != "fouroversix"]
NAMES = {
    "nvfp4_4over6": ("weight", "weight_scale", "weight_scale_2"),
    "modelopt": ("weight", "weight_scale", "weight_scale_2"),
    "modelopt hf_quant_config": ("weight", "weight_scale", "weight_scale_2"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale"),
    "fouroversix": ("quantized_weight_values", "quantized_weight_scale_factors", "quantized_weight_amax"),
}


def quantized(weight: Tensor, recipe: Recipe | None = None) -> tuple[NVFP4Tensor, float]:
    """A weight by the reference, and its amax."""
    return reference_quantize(weight, recipe or Recipe()), weight.abs().max().item()


def tensors_of(family: str, weights: Mapping[str, Tensor] = WEIGHTS, recipe: Recipe | None = None) -> dict[str, Tensor]:
    stored = {}
    for module, weight in weights.items():
        q, amax = quantized(weight, recipe)
        encoded = (recipe or Recipe()).encoded_amax
        stored |= {f"{module}.{name}": tensor for name, tensor in parts(family, q, amax, encoded).items()}
    return stored


def one_layer(family: str, shape: tuple[int, int] = (32, 64)) -> dict[str, Tensor]:
    """The parts of one weight by the last part of their names."""
    return parts(family, *quantized(mixed_magnitudes(*shape, seed=1, spread=2)))


def folder_of(folder: Path, family: str, layer: Mapping[str, Tensor], **block: Any) -> Path:
    """A checkpoint of LAYER alone."""
    tensors = {f"{LAYER}.{name}": tensor.contiguous() for name, tensor in layer.items()}
    return write_family(folder, family, tensors, {**BLOCKS[family], **block})


def weight_of(folder: Path) -> NVFP4Tensor:
    q = load_checkpoint(folder)[f"{LAYER}.weight"]
    assert isinstance(q, NVFP4Tensor)
    return q


def refuse(folder: Path, message: str) -> None:
    """Opening the checkpoint or reading the layer fails with ``message``, folder and layer named."""
    with pytest.raises(CheckpointError, match=message) as caught:
        weight_of(folder)
    assert str(folder) in str(caught.value)
    assert LAYER in str(caught.value)


# --- the same weights in every family ---


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_to_the_bytes_that_were_quantized(tmp_path: Path, family: str) -> None:
    loaded = load_checkpoint(write_family(tmp_path / "c", family, tensors_of(family) | OTHERS))
    assert set(loaded) == {f"{module}.weight" for module in WEIGHTS} | set(OTHERS)
    assert len(loaded) == len(list(loaded)) == len(WEIGHTS) + len(OTHERS)
    assert loaded.quantized == {f"{module}.weight": module for module in WEIGHTS}
    for module, weight in WEIGHTS.items():
        q = loaded[f"{module}.weight"]
        assert isinstance(q, NVFP4Tensor)
        assert_same_bytes(q, quantized(weight)[0])
        assert loaded.shape(f"{module}.weight") == tuple(weight.shape)
    for name, tensor in OTHERS.items():
        other = loaded[name]
        assert isinstance(other, Tensor)
        assert_same_tensor(name, other, tensor)
    assert loaded.stored is not None
    assert loaded.stored.scheme.ignores("lm_head")
    assert not any(loaded.stored.scheme.ignores(module) for module in WEIGHTS)
    assert loaded.stored.scheme.activations is not None
    assert loaded.stored.labelled == (family in ("nvfp4_4over6", "fouroversix"))
    with pytest.raises(KeyError):
        loaded["nowhere.weight"]


W4A16: Mapping[str, Mapping[str, Any]] = {
    "nvfp4_4over6": {"activations": None},
    "modelopt": {"quant_algo": "W4A16_NVFP4"},
    "modelopt hf_quant_config": {"quantization": {"quant_algo": "W4A16_NVFP4", "group_size": 16}},
    "compressed-tensors": {"config_groups": {"g": {"targets": ["Linear"], "weights": NVFP4_ARGUMENTS}}},
}


@pytest.mark.parametrize("family", W4A16)
def test_weight_only_files_read_to_the_same_bytes_and_say_so(tmp_path: Path, family: str) -> None:
    loaded = load_checkpoint(
        write_family(tmp_path / "c", family, tensors_of(family), {**BLOCKS[family], **W4A16[family]})
    )
    assert loaded.stored is not None
    assert loaded.stored.scheme.activations is None
    for module, weight in WEIGHTS.items():
        q = loaded[f"{module}.weight"]
        assert isinstance(q, NVFP4Tensor)
        assert_same_bytes(q, quantized(weight)[0])


@pytest.mark.parametrize("family", ["modelopt", "compressed-tensors"])
def test_input_scales_of_calibration_are_kept_beside_the_weights(tmp_path: Path, family: str) -> None:
    name = {"modelopt": "input_scale", "compressed-tensors": "input_global_scale"}[family]
    folder = folder_of(tmp_path / "c", family, one_layer(family) | {name: torch.tensor(0.5)})
    loaded = load_checkpoint(folder)
    scale = loaded[f"{LAYER}.{name}"]
    assert isinstance(scale, Tensor)
    assert scale.item() == 0.5
    assert set(loaded) == {f"{LAYER}.weight", f"{LAYER}.{name}"}


@pytest.mark.parametrize("family", ["modelopt", "compressed-tensors"])
def test_a_range_of_448_is_read_where_nothing_says_256(tmp_path: Path, family: str) -> None:
    recipe = Recipe(adaptive=False, scale_max=448)
    loaded = load_checkpoint(write_family(tmp_path / "c", family, tensors_of(family, recipe=recipe)))
    for module, weight in WEIGHTS.items():
        assert_same_bytes(loaded[f"{module}.weight"], quantized(weight, recipe)[0])  # type: ignore[arg-type]


def test_the_padded_layout_differs_from_row_major_where_it_is_tested(tmp_path: Path) -> None:
    # Otherwise the test above would not see a reader that takes one for the other.
    for module in ("layers.0.o_proj", "layers.1.up_proj"):
        q, _ = quantized(WEIGHTS[module])
        flat, stored = tiled(q.block_scale).view(torch.uint8), q.block_scale.view(torch.uint8).flatten()
        assert len(flat) > len(stored)
        assert not torch.equal(flat[: len(stored)], stored)
        assert_same_tensor(module, scales_to_layout(q.block_scale, "128x4").view(torch.uint8), flat)


def test_garbage_in_the_padding_is_not_read(tmp_path: Path) -> None:
    layer = one_layer("fouroversix", (130, 48))
    layer["quantized_weight_values"][130:] = 0x77
    layer["quantized_weight_values"][:, 24:] = 0x77
    assert_same_bytes(
        weight_of(folder_of(tmp_path / "c", "fouroversix", layer)),
        quantized(mixed_magnitudes(130, 48, seed=1, spread=2))[0],
    )


def test_a_checkpoint_that_is_not_quantized_reads_as_it_is(tmp_path: Path) -> None:
    loaded = load_checkpoint(single(tmp_path / "c", OTHERS))
    assert (loaded.stored, dict(loaded.quantized), set(loaded)) == (None, {}, set(OTHERS))
    for name, tensor in OTHERS.items():
        assert_same_tensor(name, loaded[name], tensor)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["nvfp4_4over6", "modelopt", "compressed-tensors"])
def test_shards_of_a_fused_layer_keep_their_own_scales(tmp_path: Path, family: str) -> None:
    # R7, R8: one tensor, a decode scale per row. The largest for all of them would garble the small ones.
    halves = [reference_quantize(mixed_magnitudes(16, 64, seed=i, spread=1) * 10.0**i, Recipe()) for i in (0, 1)]
    decode = torch.cat([half.decode_scale.expand(16) for half in halves])
    scale = torch.reciprocal(decode) if family == "compressed-tensors" else decode
    if family == "compressed-tensors":
        decode = torch.reciprocal(scale)
    packed, block, last = NAMES[family]
    layer = {
        packed: torch.cat([half.packed for half in halves]),
        block: torch.cat([half.block_scale.view(torch.uint8) for half in halves]).view(torch.float8_e4m3fn),
        last: scale,
    }
    for i, shape in enumerate([(32,), (32, 1)]):
        q = weight_of(folder_of(tmp_path / str(i), family, layer | {last: scale.reshape(shape)}))
        assert_same_tensor("decode_scale", q.decode_scale, decode)
        for j in (0, 1):
            rows = slice(16 * j, 16 * j + 16)
            expected = NVFP4Tensor(halves[j].packed, halves[j].block_scale, decode[rows][0])
            assert_same_tensor(f"half {j}", fos.dequantize(q)[rows], fos.dequantize(expected))


# --- C4: documented equivalents ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_decode_scale_of_one_value_may_have_any_shape(tmp_path: Path, family: str, shape: tuple[int, ...]) -> None:
    layer = one_layer(family)
    name = NAMES[family][2]
    layer[name] = layer[name].reshape(shape)
    assert_same_bytes(weight_of(folder_of(tmp_path / "c", family, layer)), quantized(WEIGHTS[LAYER])[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["I8", "F4"])
def test_codes_may_be_called_int8_or_float4(tmp_path: Path, family: str, dtype: str) -> None:
    folder = folder_of(tmp_path / "c", family, one_layer(family))
    name = f"{LAYER}.{NAMES[family][0]}"
    rows, columns = header_of(folder / SINGLE)[name]["shape"]
    redtype(folder / SINGLE, name, dtype, (rows, columns * 2 if dtype == "F4" else columns))
    assert_same_bytes(weight_of(folder), quantized(WEIGHTS[LAYER])[0])
    assert load_checkpoint(folder).shape(f"{LAYER}.weight") == (32, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_scales_may_be_called_uint8(tmp_path: Path, family: str) -> None:
    layer = one_layer(family)
    layer[NAMES[family][1]] = layer[NAMES[family][1]].view(torch.uint8)
    assert_same_bytes(weight_of(folder_of(tmp_path / "c", family, layer)), quantized(WEIGHTS[LAYER])[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("part", "dtype", "message"),
    [
        (0, torch.bfloat16, r"got torch\.bfloat16, needed torch\.uint8; the tensor is not NVFP4"),
        (0, torch.float32, r"got torch\.float32, needed torch\.uint8"),
        (0, torch.float8_e4m3fn, r"got torch\.float8_e4m3fn, needed torch\.uint8"),
        (1, torch.float32, r"got torch\.float32, needed torch\.float8_e4m3fn"),
        (1, torch.float8_e5m2, r"got torch\.float8_e5m2, needed torch\.float8_e4m3fn"),
        (1, torch.int8, r"got torch\.int8, needed torch\.float8_e4m3fn"),
        (2, torch.int32, r"got torch\.int32, needed float32"),
        (2, torch.float64, r"got torch\.float64, needed float32"),
        (2, torch.float8_e4m3fn, r"got torch\.float8_e4m3fn, needed float32"),
    ],
    ids=str,
)
def test_a_part_of_another_dtype_is_refused(
    tmp_path: Path, family: str, part: int, dtype: torch.dtype, message: str
) -> None:
    layer, name = one_layer(family), NAMES[family][part]
    layer[name] = layer[name].float().to(dtype)
    refuse(folder_of(tmp_path / "c", family, layer), rf"{re.escape(LAYER)}\.{name}: {message}")


# --- C5: shapes ---


def transposed(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8).t().contiguous().view(scales.dtype)


DISAGREEING: Mapping[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], int, str]] = {
    "narrow-scales": (lambda p, b: (p, b[:, :3]), 1, r"got shape \(48, 3\), needed \(48, 4\)"),
    "short-scales": (lambda p, b: (p, b[:31]), 1, r"got shape \(31, 4\), needed \(48, 4\)"),
    "transposed-scales": (lambda p, b: (p, transposed(b)), 1, r"got shape \(4, 48\), needed \(48, 4\)"),
    "flat-scales": (lambda p, b: (p, b.flatten()), 1, r"got shape \(192,\), needed \(48, 4\)"),
    "transposed-codes": (lambda p, b: (p.t(), b), 1, r"got shape \(48, 4\), needed \(32, 6\)"),
    "narrow-codes": (lambda p, b: (p[:, :24], b), 1, r"got shape \(48, 4\), needed \(48, 3\)"),
    "flat-codes": (lambda p, b: (p.flatten(), b), 0, r"got shape \(1536,\), needed \[N, K/2\]"),
    "3-D-codes": (lambda p, b: (p[None], b), 0, r"got shape \(1, 48, 32\), needed \[N, K/2\]"),
    "K-26": (lambda p, b: (p[:, :13], b[:, :1]), 0, r"got K = 26, needed a positive multiple of 16"),
    "K-40": (lambda p, b: (p[:, :20], b[:, :2]), 0, r"got K = 40, needed a positive multiple of 16"),
    "K-0": (lambda p, b: (p[:, :0], b[:, :0]), 0, r"got K = 0, needed a positive multiple of 16"),
}


@pytest.mark.parametrize("family", UNPADDED)
@pytest.mark.parametrize("kind", DISAGREEING)
def test_parts_whose_shapes_disagree_are_refused_with_both(tmp_path: Path, family: str, kind: str) -> None:
    change, named, message = DISAGREEING[kind]
    layer = one_layer(family, (48, 64))
    packed, block, _ = NAMES[family]
    layer[packed], layer[block] = change(layer[packed], layer[block])
    refuse(folder_of(tmp_path / "c", family, layer), rf"{re.escape(LAYER)}\.{NAMES[family][named]}: {message}")


def test_half_a_column_of_float4_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "c", "modelopt", one_layer("modelopt"))
    redtype(folder / SINGLE, f"{LAYER}.weight", "F4", (64, 32))
    refuse(folder, r"weight_scale: got shape \(32, 4\), needed \(64, 2\)")
    redtype(folder / SINGLE, f"{LAYER}.weight", "F4", (2048, 1))
    refuse(folder, r"weight: got K = 1, needed a positive multiple of 16")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(2,), (31,), (0,), (4, 8)], ids=str)
def test_decode_scales_that_fit_nothing_are_refused(tmp_path: Path, family: str, shape: tuple[int, ...]) -> None:
    layer, name = one_layer(family), NAMES[family][2]
    layer[name] = torch.full(shape, 0.001)
    refuse(folder_of(tmp_path / "c", family, layer), rf"{name}: got shape {re.escape(str(shape))}, needed one value")


METADATA: Mapping[str, tuple[Tensor, str]] = {
    "row-major": (
        torch.tensor([32, 64, 128, 64, 1, 0]),
        r"metadata: got \[32, 64, 128, 64, 1, 0\], needed \[32, 64, 128",
    ),
    "unpadded": (torch.tensor([32, 64, 32, 64, 1, 1]), r"metadata: got .*, needed \[32, 64, 128, 64, 1, 1\]"),
    "other-rows": (torch.tensor([200, 64, 256, 64, 1, 1]), r"values: got shape \(128, 32\), needed \(256, 32\)"),
    "other-columns": (torch.tensor([32, 80, 128, 128, 1, 1]), r"values: got shape \(128, 32\), needed \(128, 64\)"),
    "huge": (torch.tensor([2**50, 64, 2**50, 64, 1, 1]), r"values: got shape \(128, 32\), needed"),
    "K-40": (torch.tensor([32, 40, 128, 64, 1, 1]), r"metadata: got K = 40, needed a positive multiple of 16"),
    "negative": (torch.tensor([-5, -64, 0, 0, 1, 1]), r"metadata: got \[-5, .*, needed six integers"),
    "short": (torch.tensor([32]), r"metadata: got shape \(1,\), needed six integers"),
    "scalar": (torch.tensor(32), r"metadata: got shape \(\), needed six integers"),
    "fractions": (torch.tensor([32.0, 64, 128, 64, 1, 1]), r"metadata: got \[32\.0, .*, needed six integers"),
    "nested": (torch.ones(2, 3, dtype=torch.int32), r"metadata: got shape \(2, 3\), needed six integers"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_that_does_not_describe_the_padding_is_refused(tmp_path: Path, kind: str) -> None:
    layer = one_layer("fouroversix")
    layer["quantized_weight_metadata"], message = METADATA[kind]
    refuse(folder_of(tmp_path / "c", "fouroversix", layer), rf"{re.escape(LAYER)}\.quantized_weight_{message}")


@pytest.mark.parametrize(
    ("name", "shape", "needed"),
    [("values", (32, 32), (128, 32)), ("scale_factors", (128,), (512,)), ("scale_factors", (128, 4), (512,))],
)
def test_a_part_without_its_padding_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], needed: tuple[int, ...]
) -> None:
    layer = one_layer("fouroversix")
    layer[f"quantized_weight_{name}"] = torch.zeros(shape, dtype=torch.uint8)
    message = rf"_{name}: got shape {re.escape(str(shape))}, needed {re.escape(str(needed))}"
    refuse(folder_of(tmp_path / "c", "fouroversix", layer), message)


# --- C2, R1, R4: scales no quantizer writes ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("byte", [0x7F, 0xFF, 0x80, 0xB8])
def test_a_block_scale_that_is_nan_or_negative_is_refused(tmp_path: Path, family: str, byte: int) -> None:
    layer, name = one_layer(family), NAMES[family][1]
    layer[name].view(torch.uint8).flatten()[0] = byte
    message = "got nothing .or NaN" if byte == 0x7F else "got negative or NaN block scales, needed 0 or more"
    refuse(folder_of(tmp_path / "c", family, layer), message)


BAD_SCALES = {"nan": float("nan"), "zero": 0.0, "minus": -0.001, "inf": float("inf"), "minus-inf": -float("inf")}
BAD_SCALES["subnormal"] = 1e-40


@pytest.mark.parametrize(
    ("family", "kind"),
    # An amax of 0 is that of a weight of zeros.
    [(family, kind) for family in FAMILIES for kind in BAD_SCALES if (family, kind) != ("fouroversix", "zero")],
)
def test_a_decode_scale_no_quantizer_writes_is_refused(tmp_path: Path, family: str, kind: str) -> None:
    layer, name = one_layer(family), NAMES[family][2]
    layer[name] = torch.full_like(layer[name], BAD_SCALES[kind])
    refuse(
        folder_of(tmp_path / "c", family, layer), "needed finite|got nothing .or NaN|got inf, needed|needed at most 1"
    )


@pytest.mark.parametrize("family", UNPADDED)
def test_one_bad_decode_scale_among_the_rows_is_refused(tmp_path: Path, family: str) -> None:
    layer, name = one_layer(family), NAMES[family][2]
    layer[name] = layer[name].reshape(1).repeat(32)
    layer[name][17] = -1
    refuse(folder_of(tmp_path / "c", family, layer), "got -1.0, needed finite, normal and above 0")


@pytest.mark.parametrize("family", UNPADDED)
def test_a_scale_stored_the_wrong_way_round_is_refused(tmp_path: Path, family: str) -> None:
    # A decode scale where compressed-tensors has an encode scale, and the other way round.
    layer, name = one_layer(family), NAMES[family][2]
    layer[name] = torch.reciprocal(layer[name])
    refuse(folder_of(tmp_path / "c", family, layer), r"needed at most 1: .*reciprocal")


@pytest.mark.parametrize("family", ["nvfp4_4over6", "fouroversix"])
def test_a_range_of_448_in_a_file_that_says_256_is_refused(tmp_path: Path, family: str) -> None:
    weight = mixed_magnitudes(32, 64, seed=1, spread=2)
    layer = parts(family, *quantized(weight, Recipe(adaptive=False, scale_max=448)), 2688.0)
    message = r"block scale 448 is impossible for scale_max 256 \(largest 384\)"
    refuse(folder_of(tmp_path / "c", family, layer), message)


def test_a_block_scale_just_above_what_its_range_allows_is_refused_and_the_largest_is_not(tmp_path: Path) -> None:
    layer = one_layer("nvfp4_4over6")
    scales = layer["weight_scale"].view(torch.uint8)
    scales[3, 2] = torch.tensor(384.0).to(torch.float8_e4m3fn).view(torch.uint8)
    weight_of(folder_of(tmp_path / "a", "nvfp4_4over6", layer))
    scales[3, 2] += 1
    refuse(folder_of(tmp_path / "b", "nvfp4_4over6", layer), "block scale 416 is impossible for scale_max 256")
    scales[3, 2] = torch.tensor(288.0).to(torch.float8_e4m3fn).view(torch.uint8)
    plain = {"weights": {**RECIPE, "adaptive": False}}
    refuse(folder_of(tmp_path / "c", "nvfp4_4over6", layer, **plain), r"block scale \d+ .*\(largest 256\)")


def test_a_range_of_256_in_a_file_that_says_448_decodes_right(tmp_path: Path) -> None:
    # The stored decode scale is all it takes; the label matters only to activations.
    folder = folder_of(tmp_path / "c", "nvfp4_4over6", one_layer("nvfp4_4over6"), weights={**RECIPE, "scale_max": 448})
    assert_same_bytes(weight_of(folder), quantized(WEIGHTS[LAYER])[0])


# --- C7: scales in the order of a GEMM ---


def structured(rows: int, columns: int) -> Tensor:
    """A weight whose outputs and inputs differ in magnitude, as trained ones do."""
    generator = torch.Generator().manual_seed(7)
    by_row = torch.exp2(torch.randn(rows, 1, generator=generator))
    by_column = torch.exp2(torch.randn(1, columns // 16, generator=generator)).repeat_interleave(16, 1)
    return torch.randn(rows, columns, generator=generator) * by_row * by_column


@pytest.mark.parametrize("family", UNPADDED)
@pytest.mark.parametrize("shape", [(256, 512), (128, 512), (384, 1088), (1024, 256)], ids=str)
def test_scales_in_the_layout_of_a_gemm_under_a_row_major_name_are_refused(
    tmp_path: Path, family: str, shape: tuple[int, int]
) -> None:
    layer = parts(family, *quantized(structured(*shape)))
    weight_of(folder_of(tmp_path / "right", family, layer))
    name = NAMES[family][1]
    layer[name] = scales_to_layout(layer[name], "128x4").reshape(layer[name].shape)
    message = rf"{name}: the block scales lie in the 128x4 layout of a GEMM .*write the checkpoint without swizzling"
    refuse(folder_of(tmp_path / "swizzled", family, layer), message)


def test_weights_without_structure_are_not_suspected(tmp_path: Path) -> None:
    for seed in range(5):
        weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(seed))
        weight_of(folder_of(tmp_path / str(seed), "modelopt", parts("modelopt", *quantized(weight))))


def in_blocks(kind: str) -> Tensor:
    """A weight whose large and small parts lie in blocks, which neither rows nor columns explain."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    row, column = torch.arange(512).unsqueeze(1), torch.arange(512).unsqueeze(0)
    if kind == "block diagonal":
        return weight * (row // 128 == column // 128)
    if kind == "sparse in blocks":
        return weight * ((row // 64 * 5 + column // 64 * 3) % 7 < 3)
    if kind == "parts with heads of their own":
        return weight * (1 + (row // 128 * 3 + column // 64 * 5) % 8)
    return weight * torch.exp(-(row - column).abs() / 64)  # a band


@pytest.mark.parametrize("kind", ["block diagonal", "sparse in blocks", "parts with heads of their own", "band"])
def test_weights_of_large_and_small_blocks_are_not_suspected(tmp_path: Path, kind: str) -> None:
    weight_of(folder_of(tmp_path / "a", "modelopt", parts("modelopt", *quantized(in_blocks(kind)))))


# --- what is missing ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_weight_that_lacks_a_part_is_refused_with_the_part(tmp_path: Path, family: str, part: int) -> None:
    tensors, name = tensors_of(family) | OTHERS, f"{LAYER}.{NAMES[family][part]}"
    del tensors[name]
    refuse(write_family(tmp_path / "c", family, tensors), rf"'{re.escape(name)}' is not; the checkpoint is incomplete")


def test_padding_without_its_metadata_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of("fouroversix")
    del tensors[f"{LAYER}.quantized_weight_metadata"]
    refuse(write_family(tmp_path / "c", "fouroversix", tensors), "quantized_weight_metadata' is not; the checkpoint is")


@pytest.mark.parametrize("family", UNPADDED)
def test_codes_without_any_scale_are_not_handed_out_as_a_weight(tmp_path: Path, family: str) -> None:
    tensors = tensors_of(family)
    for part in (1, 2):
        del tensors[f"{LAYER}.{NAMES[family][part]}"]
    refuse(write_family(tmp_path / "c", family, tensors), rf"{NAMES[family][1]}' is not; the checkpoint is incomplete")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_says_nvfp4_over_full_precision_is_refused(tmp_path: Path, family: str) -> None:
    folder = write_family(tmp_path / "c", family, OTHERS)
    with pytest.raises(
        CheckpointError, match=rf"says {family.split()[0]}, but no tensor is named …\.{NAMES[family][1]}"
    ):
        load_checkpoint(folder)


def test_a_weight_both_quantized_and_not_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of("compressed-tensors") | {f"{LAYER}.weight": torch.ones(32, 64)}
    refuse(write_family(tmp_path / "c", "compressed-tensors", tensors), "is there both quantized and not")


@pytest.mark.parametrize("family", ["compressed-tensors", "fouroversix"])
def test_the_tensors_of_another_family_are_not_guessed(tmp_path: Path, family: str) -> None:
    folder = write_family(tmp_path / "c", family, tensors_of("modelopt"))
    with pytest.raises(CheckpointError, match=rf"{family}"):
        load_checkpoint(folder)


def test_a_damaged_layer_does_not_hide_the_others(tmp_path: Path) -> None:
    tensors = tensors_of("modelopt")
    tensors[f"{LAYER}.weight_scale_2"] = torch.tensor(-1.0)
    loaded = load_checkpoint(write_family(tmp_path / "c", "modelopt", tensors))
    loaded["layers.0.o_proj.weight"]
    assert f"{LAYER}.weight" in loaded, "asking for a name reads nothing"
    assert "layers.9" not in loaded
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight_scale_2: got -1\.0"):
        loaded[f"{LAYER}.weight"]


# --- R6: another quantization ---


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"quant_method": "awq", "bits": 4}, "got awq, needed NVFP4"),
        ({"quant_method": "gptq"}, "got gptq, needed NVFP4"),
        ({"quant_method": "fp8"}, "got fp8, needed NVFP4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "got bitsandbytes, needed NVFP4"),
        ({"quant_method": "mxfp4"}, "got mxfp4, needed NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "got modelopt FP8, needed NVFP4"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "got compressed-tensors float-quantized"),
        ({}, "got an unknown method, needed NVFP4"),
        ({"quant_method": ["nvfp4_4over6"]}, r"got \['nvfp4_4over6'\], needed NVFP4"),
        ("fp8", "quantization_config: got 'fp8', needed an object"),
        ([], r"quantization_config: got \[\], needed an object"),
        ({**BLOCKS["nvfp4_4over6"], "format_version": 2}, "quantization_config.format_version: got 2, needed 1"),
        ({**BLOCKS["nvfp4_4over6"], "extra": 1}, "quantization_config: unknown key 'extra'"),
        ({**BLOCKS["fouroversix"], "scale_rule": ["mse"]}, r"scale_rule: got \['mse'\], needed mse"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_another_quantization_is_refused_with_its_name(tmp_path: Path, block: Any, words: str) -> None:
    folder = single(tmp_path / "c", OTHERS, {**CONFIG, "quantization_config": block})
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_a_block_in_a_text_config_is_found(tmp_path: Path) -> None:
    config = {**CONFIG, "text_config": {"quantization_config": dict(BLOCKS["modelopt"])}}
    folder = single(tmp_path / "c", tensors_of("modelopt"), config)
    assert len(load_checkpoint(folder).quantized) == len(WEIGHTS)


def test_the_config_goes_before_an_older_hf_quant_config(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "c", "modelopt", tensors_of("modelopt"))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert len(load_checkpoint(folder).quantized) == len(WEIGHTS)


# --- a tensor that is in the file twice ---


def test_a_second_scale_of_the_same_name_cannot_replace_the_first(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "c", "modelopt", one_layer("modelopt"))
    path = folder / SINGLE
    header, content = header_of(path), path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    name = f"{LAYER}.weight_scale_2"
    text = json.dumps(header)
    assert text.endswith("}")
    path.write_bytes(raw_file(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}", data))
    with pytest.raises(CheckpointError, match=rf"the key '{re.escape(name)}' is there twice"):
        load_checkpoint(folder)
    assert set(load_file(path)) == {f"{LAYER}.{part}" for part in NAMES["modelopt"]}, "the library takes it"
    save_file(load_file(path), path)
    weight_of(folder)
