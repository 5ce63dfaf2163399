"""What `compare` measures: figures that can be worked out by hand, and factors that a cosine would not see."""

import importlib
import json
import math
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ATTENTION, CONFIG, EXPERT, GROUPS, SINGLE, merged, parts, single, tiny_model, write
from safetensors.torch import load_file, save_file
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin import comparison as module_under_test
from fouroversix_plugin import plots
from fouroversix_plugin.checkpoint import CheckpointError, load_checkpoint, quantize_checkpoint
from fouroversix_plugin.comparison import MEAN_RATIO_RANGE, PLAIN, Comparison, compare_checkpoints
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe

SCHEME = fos.preset("nvfp4_4over6")
DOWN = "model.layers.0.mlp.down_proj"


def squared(x: Tensor) -> float:
    return x.double().square().sum().item()


def converted(tmp_path: Path, tensors: Mapping[str, Tensor], config: object = CONFIG) -> tuple[Path, Path]:
    """(quantized, source)"""
    source = single(tmp_path / "source", tensors, config)
    quantize_checkpoint(source, tmp_path / "target", SCHEME)
    return tmp_path / "target", source


def altered(folder: Path, changes: Mapping[str, float]) -> None:
    """Multiply tensors of a checkpoint of one file."""
    tensors = load_file(folder / SINGLE)
    save_file({n: t * changes[n] if n in changes else t for n, t in tensors.items()}, folder / SINGLE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    source = write(folder / "source", tiny_model())
    quantize_checkpoint(source, folder / "target", SCHEME)
    return folder / "target", source


@pytest.fixture(scope="module")
def tiny_comparison(tiny: tuple[Path, Path]) -> Comparison:
    return compare_checkpoints(*tiny)


# --- the figures ---


def test_the_figures_of_one_block_worked_out_by_hand(tmp_path: Path) -> None:
    # Plain: the scale is 448/448 = 1, so 6 stays 6 and 5, halfway between 4 and 6, becomes 4: an error of 1.
    # 4 over 6: mapped to 4, the scale is 1.5 and 6 stays 6, 5 / 1.5 = 3.33 becomes 3, that is 4.5: an error of 1/4.
    x = torch.tensor([[6.0] * 14 + [5.0, 0.0]])  # 14 * 36 + 25 = 529 = 23²
    (layer,) = compare_checkpoints(*converted(tmp_path, {f"{DOWN}.weight": x})).layers
    errors = layer.errors
    assert (layer.module, layer.shape) == (DOWN, (1, 16))
    assert (errors.error.squared_error, errors.plain.squared_error, errors.ratio) == pytest.approx((0.25, 1.0, 0.25))
    assert (errors.error.relative_rmse, errors.plain.relative_rmse) == pytest.approx((0.5 / 23, 1 / 23))
    assert (errors.error.mean_ratio, errors.plain.mean_ratio) == pytest.approx((526.5 / 529, 524 / 529))
    assert errors.plain.sqnr_db == pytest.approx(27.2346, abs=1e-4)
    assert errors.error.sqnr_db == pytest.approx(27.2346 + 6.0206, abs=1e-4)
    assert not errors.failed


def test_plain_nvfp4_shares_the_amaxes_of_the_file(tiny_comparison: Comparison) -> None:
    weights = merged(tiny_model())
    layers = {layer.module: layer.errors for layer in tiny_comparison.layers}
    assert set(layers) == {module for group in GROUPS for module in group}
    for group in GROUPS:
        amax = max(weights[f"{module}.weight"].float().abs().max() for module in group)
        for module in group:
            x = weights[f"{module}.weight"]
            plain = fos.dequantize(fos.quantize(x, Recipe(adaptive=False, scale_max=448), amax=amax))
            ours = fos.dequantize(fos.quantize(x, SCHEME.weights, amax=amax))
            assert layers[module].plain.squared_error == pytest.approx(squared(plain - x.float()), rel=1e-12), module
            assert layers[module].error.squared_error == pytest.approx(squared(ours - x.float()), rel=1e-12), module


def test_weights_with_scales_of_their_own_are_compared_with_plain_ones_that_have_them_too(tmp_path: Path) -> None:
    # Others' files may scale q, k and v each for its own amax.
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(16, 32, generator=generator) * 10**i for i, name in enumerate("qk")}
    tensors = {
        f"{ATTENTION}.{name}_proj.{part}": tensor
        for name, values in x.items()
        for part, tensor in parts("modelopt", fos.quantize(values), 0).items()
    }
    block = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    target = single(tmp_path / "target", tensors, {**CONFIG, "quantization_config": block})
    source = single(tmp_path / "source", {f"{ATTENTION}.{name}_proj.weight": values for name, values in x.items()})
    layers = {layer.module: layer.errors for layer in compare_checkpoints(target, source).layers}
    for name, values in x.items():
        expected = squared(fos.dequantize(fos.quantize(values, PLAIN)) - values)
        assert layers[f"{ATTENTION}.{name}_proj"].plain.squared_error == pytest.approx(expected, rel=1e-12)


def test_a_decode_scale_per_row_gives_plain_nvfp4_an_amax_per_row(tmp_path: Path) -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9).unsqueeze(1)
    q = fos.quantize(x, granularity="token")
    tensors = {f"{DOWN}.{part}": tensor for part, tensor in parts("nvfp4_4over6", q, 0).items()}
    target = single(tmp_path / "target", tensors, {**CONFIG, "quantization_config": SCHEME.to_dict()})
    source = single(tmp_path / "source", {f"{DOWN}.weight": x})
    (layer,) = compare_checkpoints(target, source).layers
    expected = squared(fos.dequantize(fos.quantize(x, PLAIN, "token")) - x)
    assert layer.errors.plain.squared_error == pytest.approx(expected, rel=1e-12)
    assert layer.errors.error.squared_error == pytest.approx(squared(fos.dequantize(q) - x), rel=1e-12)


def test_totals_are_sums_and_the_worst_comes_first(tiny_comparison: Comparison) -> None:
    layers = tiny_comparison.layers
    worst_first = sorted((layer.errors.error.relative_rmse for layer in layers), reverse=True)
    assert [layer.errors.error.relative_rmse for layer in layers] == worst_first
    total = tiny_comparison.total
    for name in ("squared_error", "product", "squares"):
        assert getattr(total.error, name) == pytest.approx(sum(getattr(layer.errors.error, name) for layer in layers))
    assert total.ratio == pytest.approx(
        sum(layer.errors.error.squared_error for layer in layers)
        / sum(layer.errors.plain.squared_error for layer in layers)
    )
    assert 0.5 < total.ratio < 1


def test_the_figures_do_not_depend_on_how_many_rows_are_read_at_once(
    tiny: tuple[Path, Path], tiny_comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "_ROWS_NBYTES", 5 * 4 * 32)
    again = compare_checkpoints(*tiny)
    for few, whole in zip(again.layers, tiny_comparison.layers, strict=True):
        assert few.module == whole.module
        assert few.errors.plain.squared_error == pytest.approx(whole.errors.plain.squared_error, rel=1e-12)
        assert few.errors.error.product == pytest.approx(whole.errors.error.product, rel=1e-12)


# --- what must not pass ---


@pytest.mark.parametrize("factor", [256 / 448, 448 / 256])
def test_a_scale_decoded_for_another_range_fails_by_its_mean_ratio(tmp_path: Path, factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    target, source = converted(tmp_path, {f"{name}.weight": torch.randn(32, 64, generator=generator) for name in names})
    altered(target, {f"{names[1]}.weight_scale_2": factor})
    comparison = compare_checkpoints(target, source)
    assert comparison.failed
    assert [layer.module for layer in comparison.layers if layer.errors.failed] == [names[1]]
    worst = comparison.layers[0]
    assert worst.module == names[1]
    assert worst.errors.error.mean_ratio == pytest.approx(factor, rel=0.02)
    assert worst.errors.plain.mean_ratio == pytest.approx(1, abs=0.02)
    q = load_checkpoint(target)[f"{names[1]}.weight"]
    assert isinstance(q, NVFP4Tensor)
    x = load_file(source / SINGLE)[f"{names[1]}.weight"]
    assert torch.nn.functional.cosine_similarity(fos.dequantize(q).flatten(), x.flatten(), 0) > 0.99
    text = comparison.text()
    assert f"FAILED: the mean ratio of 1 of 3 weights, such as {names[1]}" in text


def test_rounding_of_few_values_is_not_taken_for_another_range(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(300)]
    shapes = [(1, 16), (4, 16), (16, 16)] * 100
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in zip(names, shapes, strict=True)
    }
    target, source = converted(tmp_path, tensors)
    comparison = compare_checkpoints(target, source)
    ratios = [layer.errors.error.mean_ratio for layer in comparison.layers]
    assert min(ratios) < MEAN_RATIO_RANGE[0]
    assert not comparison.failed
    assert "or for few values as near as rounding explains" in comparison.text()
    for factor in (256 / 448, 448 / 256):
        altered(target, {f"{name}.weight_scale_2": factor for name in names})
        assert all(layer.errors.failed for layer in compare_checkpoints(target, source).layers)
        altered(target, {f"{name}.weight_scale_2": 1 / factor for name in names})


def test_weights_of_another_source_fail(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    target, _ = converted(tmp_path, {f"{DOWN}.weight": torch.randn(32, 64, generator=generator)})
    other = single(tmp_path / "other", {f"{DOWN}.weight": torch.randn(32, 64, generator=generator)})
    assert compare_checkpoints(target, other).failed


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": torch.ones(16)}, "has no linear weight 'model.layers.0.mlp.down_proj.weight'"),
        ({f"{DOWN}.weight": torch.ones(16, 64)}, r"got shape \(16, 64\), needed \(32, 64\)"),
        ({f"{DOWN}.weight": torch.full((32, 64), torch.nan)}, r"got 2048 NaN or infinite .* the first at \(0, 0\)"),
        ({f"{DOWN}.weight": torch.ones(32, 64, dtype=torch.int32)}, "got torch.int32, needed"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    target, _ = converted(tmp_path, {f"{DOWN}.weight": torch.randn(32, 64)})
    with pytest.raises(CheckpointError, match=message):
        compare_checkpoints(target, single(tmp_path / "other", tensors))


def test_quantized_and_source_cannot_be_swapped(tiny: tuple[Path, Path]) -> None:
    target, source = tiny
    with pytest.raises(CheckpointError, match="is not quantized, needed NVFP4 weights"):
        compare_checkpoints(source, source)
    with pytest.raises(CheckpointError, match=r"the source to compare with: .*already quantized"):
        compare_checkpoints(target, target)


def test_a_weight_of_zeros_is_exact(tmp_path: Path) -> None:
    comparison = compare_checkpoints(*converted(tmp_path, {f"{DOWN}.weight": torch.zeros(32, 64)}))
    errors = comparison.layers[0].errors
    assert (errors.error.relative_rmse, errors.error.sqnr_db, errors.error.mean_ratio) == (0.0, math.inf, 1.0)
    assert (errors.ratio, errors.failed) == (1.0, False)
    assert comparison.to_dict()["total"]["sqnr_db"] is None
    json.dumps(comparison.to_dict(), allow_nan=False)


# --- sources of every kind ---


def test_stacked_experts_of_the_source_are_found_by_the_names_of_their_parts(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = "model.layers.0.mlp.experts"
    stacked = {
        f"{experts}.gate_up_proj": torch.randn(2, 64, 96, generator=generator),  # [E, K, 2 I]
        f"{experts}.down_proj": torch.randn(2, 48, 64, generator=generator),
    }
    comparison = compare_checkpoints(*converted(tmp_path, stacked, {**CONFIG, "hidden_size": 64}))
    layers = {layer.module: layer for layer in comparison.layers}
    assert set(layers) == {f"{experts}.{e}.{name}_proj" for e in (0, 1) for name in ("gate", "up", "down")}
    up = stacked[f"{experts}.gate_up_proj"][1, :, 48:]
    assert layers[f"{experts}.1.up_proj"].shape == (48, 64)
    assert layers[f"{experts}.1.up_proj"].errors.error.squares == pytest.approx(squared(up))
    assert not comparison.failed


def test_an_fp8_source_counts_with_its_scales(tmp_path: Path) -> None:
    values = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.01)
    tensors = {f"{DOWN}.weight": values, f"{DOWN}.weight_scale": scale}
    target, source = converted(tmp_path, tensors, {**CONFIG, "quantization_config": {"quant_method": "fp8"}})
    told: dict[str, int] = {}
    (layer,) = compare_checkpoints(target, source, told.__setitem__).layers
    assert layer.errors.error.squares == pytest.approx(squared(values.float() * scale))
    assert not layer.errors.failed
    assert told == {f"{DOWN}.weight": 32 * 64}


# --- as JSON and as text ---


def test_json_holds_every_layer(tiny: tuple[Path, Path], tiny_comparison: Comparison) -> None:
    report = json.loads(json.dumps(tiny_comparison.to_dict(), allow_nan=False))
    assert (report["schema_version"], report["failed"], report["recipe"]) == (1, False, "mse 256 amax")
    assert (report["checkpoint"], report["source"]) == tuple(map(str, tiny))
    assert [layer["module"] for layer in report["layers"]] == [layer.module for layer in tiny_comparison.layers]
    figures = {"squared_error", "relative_rmse", "sqnr_db", "mean_ratio"}
    assert set(report["total"]) == figures | {"plain_nvfp4", "squared_error_ratio", "failed"}
    assert set(report["layers"][0]["plain_nvfp4"]) == figures


def test_text_lists_the_worst_and_counts_the_rest(tiny_comparison: Comparison) -> None:
    lines = tiny_comparison.text(limit=3).splitlines()
    rows = [line for line in lines if "_proj" in line or "experts" in line]
    assert [row.split()[0] for row in rows] == [
        layer.module.removeprefix("model.layers.") for layer in tiny_comparison.layers[:3]
    ]
    assert f"… {len(tiny_comparison.layers) - 3} layers with smaller errors" in lines
    assert any(line.startswith(f"all {len(tiny_comparison.layers)} weights") for line in lines)
    assert max(map(len, lines[3:])) <= 120


# --- plots ---


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert len(content) > 5000
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_plots_are_pngs_1200_pixels_wide(tmp_path: Path, tiny: tuple[Path, Path], tiny_comparison: Comparison) -> None:
    pytest.importorskip("matplotlib")
    paths = plots.plot_comparison(tiny_comparison, tiny[0], tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["heatmap.png", "block_scales.png", "error.png"]
    assert {png_size(path)[0] for path in paths} == {1200}


def test_a_heat_map_has_a_cell_per_layer_and_kind_with_experts_pooled(tiny_comparison: Comparison) -> None:
    cells, experts = plots._cells(tiny_comparison)
    assert experts == 1
    assert list(cells)[:4] == [(0, f"model.layers.*.self_attn.{name}_proj") for name in "qkvo"]
    two = [layer for layer in tiny_comparison.layers if layer.module in (f"{EXPERT}.w1", f"{EXPERT}.w2")]
    renamed = [
        module_under_test.LayerComparison(f"model.layers.1.mlp.experts.{e}.w1", layer.shape, layer.errors)
        for e, layer in enumerate(two)
    ]
    pooled = Comparison(tiny_comparison.folder, tiny_comparison.source, "", tuple(renamed))
    assert plots._cells(pooled) == ({(1, "model.layers.*.mlp.experts.*.w1"): pooled.total}, 2)


def test_blocks_are_counted_by_scale_and_choice(tiny: tuple[Path, Path]) -> None:
    told: list[str] = []
    fours, sixes = plots._count_blocks(tiny[0], lambda name, nbytes: told.append(name))
    loaded = load_checkpoint(tiny[0])
    weights = [q for q in (loaded[name] for name in loaded.quantized) if isinstance(q, NVFP4Tensor)]
    choices = [q.block_choices() for q in weights]
    assert int(fours.sum()) == sum(four for four, _ in choices)
    assert int((fours + sixes).sum()) == sum(nonzero for _, nonzero in choices)
    every_scale = torch.cat([q.block_scale.view(torch.uint8).flatten() for q in weights])
    assert (fours + sixes)[1:].tolist() == every_scale.int().bincount(minlength=127)[1:].tolist()
    assert set(told) == set(loaded.quantized)


def test_one_factor_among_many_layers_can_still_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    generator = torch.Generator().manual_seed(0)
    names = ["lm_head2", *(f"model.layers.{i}.mlp.down_proj" for i in range(3))]
    target, source = converted(tmp_path, {f"{name}.weight": torch.randn(32, 64, generator=generator) for name in names})
    altered(target, {f"{names[1]}.weight_scale_2": 20.0})
    paths = plots.plot_comparison(compare_checkpoints(target, source), target, tmp_path / "plots")
    assert all(png_size(path)[0] == 1200 for path in paths)


def test_a_dollar_in_a_name_begins_no_formula(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target, source = converted(tmp_path, {"layers.0.a$b_{$.weight": torch.ones(16, 32)})
    target = target.rename(tmp_path / "q$x^$")
    plots.plot_comparison(compare_checkpoints(target, source), target, tmp_path / "plots")


def test_a_long_name_leaves_the_axes_their_width() -> None:
    pytest.importorskip("matplotlib")
    figure, axes = plots._figure(5, "title", "a subtitle that goes on and on " * 8)
    figure.canvas.draw()
    assert axes.get_position().width > 0.9


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, tiny: tuple[Path, Path], tiny_comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden: dict[str, Any] = {name: None for name in sys.modules if name.split(".")[0] == "matplotlib"}
    for name in hidden | {"matplotlib": None, "matplotlib.backends.backend_agg": None}:
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(plots)  # importing it needs no matplotlib
    with pytest.raises(ValueError, match=r"pip install 'fouroversix-plugin\[cli\]'"):
        plots.plot_comparison(tiny_comparison, tiny[0], tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
