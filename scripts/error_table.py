"""Quantization error of every preset, as a Markdown table: how much less squared error than plain NVFP4.

python scripts/error_table.py          random data and the 210 linear weights of SmolLM2-135M-Instruct, on the CPU
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import demo_model
import torch
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin.checkpoint import Checkpoint
from fouroversix_plugin.recipe import Granularity, Recipe, preset_names

PLAIN = Recipe(scale_max=448, adaptive=False)


def random_data() -> dict[str, list[Tensor]]:
    torch.manual_seed(0)
    student = torch.distributions.StudentT(3.0)
    return {
        "N(0, 1)": [torch.randn(512, 4096)],
        "Student t(3)": [student.sample(torch.Size((512, 4096)))],
    }


def linear_weights(model: Path) -> Iterator[Tensor]:
    checkpoint = Checkpoint.open(model)
    for name, stored in checkpoint.tensors.items():
        if len(stored.shape) == 2 and "embed" not in name:
            yield checkpoint.read(name)


def squared_error(tensors: list[Tensor], recipe: Recipe, granularity: Granularity) -> float:
    """Sum of squared errors over the sum of squares."""
    error = total = 0.0
    for x in tensors:
        error += (fos.dequantize(fos.quantize(x, recipe, granularity)).double() - x.double()).square().sum().item()
        total += x.double().square().sum().item()
    return error / total


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    data = random_data() | {"SmolLM2 weights": list(linear_weights(demo_model.dense(demo_model.DEFAULT_CACHE)))}
    columns: list[tuple[str, Granularity]] = [("N(0, 1)", "tensor"), ("N(0, 1)", "token"), ("Student t(3)", "tensor")]
    columns += [("SmolLM2 weights", "tensor"), ("SmolLM2 weights", "token")]
    plain = {column: squared_error(data[column[0]], PLAIN, column[1]) for column in columns}
    print("| weights recipe of | " + " | ".join(f"{name}, per {scope}" for name, scope in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    recipes = {name: fos.preset(name).weights for name in preset_names() if name != "w4a16"}  # that of nvfp4_4over6
    for name, recipe in recipes.items():
        cells = []
        for column in columns:
            share = squared_error(data[column[0]], recipe, column[1]) / plain[column]
            cells.append(f"{plain[column]:.5f}" if recipe == PLAIN else f"−{100 * (1 - share):.1f} %")
        print(f"| `{name}` | " + " | ".join(cells) + " |")
    print("\n`nvfp4`: squared error over squared values; the others: their squared error against that.")


if __name__ == "__main__":
    main()
