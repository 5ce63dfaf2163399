"""Time linear layers on packed weights on a CPU, beside torch's bf16 ones.

python scripts/bench_linear.py [--json FILE]

Weights are rotated through more than any cache holds, so that they come from memory, as those of a model do. Median of
the calls; both sides in one run, call by call in turn, so that a disturbance hits both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin.kernels import build, ops

SHAPES = {"4096 x 4096": (4096, 4096), "14336 x 4096": (14336, 4096), "SmolLM2 up": (1536, 576)}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
COLD_BYTES = 256 << 20
"""Distinct bf16 weights: several times a last-level cache's share of two cores."""

CALLS = 31


def in_turn(calls: list[Callable[[int], object]]) -> list[float]:
    """Median seconds of each call; each gets the number of the round."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(CALLS + 2):
        for seconds, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call(round_)
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[2:]) for seconds in times]


def measure(rows: int, columns: int) -> list[dict[str, Any]]:
    count = max(2, COLD_BYTES // (2 * rows * columns))
    weights = [torch.randn(rows, columns, dtype=torch.bfloat16) for _ in range(count)]
    prepared = [ops.prepare_weight(fos.quantize(weight), torch.bfloat16) for weight in weights]
    found = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, dtype=torch.bfloat16)

        def bf16(i: int, x: Tensor = x) -> Tensor:
            return F.linear(x, weights[i % count])

        def w4a16(i: int, x: Tensor = x) -> Tensor:
            return ops.linear(x, prepared[i % count], None, None)

        def w4a4(i: int, x: Tensor = x) -> Tensor:
            return ops.linear(x, prepared[i % count], fos.Recipe(), None)

        names = ("bf16", "W4A16", "W4A4")
        found.append({"tokens": tokens, **dict(zip(names, in_turn([bf16, w4a16, w4a4]), strict=True))})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    reason = build.load("cpu")
    kernels = "compiled kernels" if reason is None else f"no compiled kernels ({reason})"
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kernels}"
    found = {name: measure(*shape) for name, shape in SHAPES.items()}
    print(
        f"{machine}\n\n| N x K | tokens | bf16 µs | W4A16 µs | bf16 / W4A16 | bf16 / W4A4 |\n|---|---|---|---|---|---|"
    )
    for name, row in itertools.chain.from_iterable(itertools.product([name], rows) for name, rows in found.items()):
        bf16, w4a16, w4a4 = row["bf16"], row["W4A16"], row["W4A4"]
        times = f"{bf16 * 1e6:.0f} | {w4a16 * 1e6:.0f}"
        print(f"| {name} | {row['tokens']} | {times} | {bf16 / w4a16:.2f} | {bf16 / w4a4:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "seconds": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
