"""Time the quantizer: all linear weights of SmolLM2-135M per tensor, and activations per token.

python scripts/bench_quantize.py [--json FILE]     on the CPU, all cores, median of 5 runs after a warm-up
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_model
import torch
from error_table import linear_weights

import fouroversix_plugin as fos
from fouroversix_plugin.recipe import preset_names

RUNS = 5


def median_seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rows() -> list[dict[str, Any]]:
    weights = list(linear_weights(demo_model.dense(demo_model.DEFAULT_CACHE)))
    values = sum(weight.numel() for weight in weights)
    found = []
    for name in preset_names():
        recipe = fos.preset(name).weights
        if name != "w4a16":  # the weights of nvfp4_4over6
            seconds = median_seconds(lambda recipe=recipe: [fos.quantize(w, recipe) for w in weights])  # type: ignore[misc]
            found.append({"what": f"{name}: {len(weights)} weights", "values": values, "seconds": seconds})
    for tokens in (1, 8, 64, 512):
        x = torch.randn(tokens, 4096, dtype=torch.bfloat16)
        seconds = median_seconds(lambda x=x: fos.quantize(x, granularity="token"))  # type: ignore[misc]
        found.append({"what": f"nvfp4_4over6: {tokens} x 4096, per token", "values": x.numel(), "seconds": seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    found = rows()
    print(f"{machine}\n\n| what | million values | seconds | million values/s |\n|---|---|---|---|")
    for row in found:
        millions = row["values"] / 1e6
        print(f"| {row['what']} | {millions:.3f} | {row['seconds']:.6f} | {millions / row['seconds']:.0f} |")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
