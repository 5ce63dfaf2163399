"""Time the quantizer.

python scripts/bench_quantize.py [--device cpu|cuda] [--json FILE] [--compiled-reference]

On a CPU: all linear weights of SmolLM2-135M per tensor, and activations per token; median of 5 runs after a warm-up.

On a GPU: large tensors, and few rows as while decoding. Calls are replayed from CUDA graphs over inputs that together
exceed the L2 several times, or that something else has driven out of it, so that it is cold; median of the replays. A
decoder's activations come from the kernel before, and a graph of few inputs shows that too ("input in L2"). "of copy"
is the time a copy of as many bytes (read and written) takes in the same run, over the call's: 1 is the memory's speed.
``--compiled-reference`` times torch.compile of the specification beside it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from argument_types import output
from bench_timing import COPY_BYTES, copy_bandwidth, graph_seconds
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin import reference
from fouroversix_plugin.kernels import build
from fouroversix_plugin.recipe import Recipe, preset_names

RUNS = 5
REPLAYS = 15
COLD_BYTES = 400 << 20
"""Distinct input a graph goes through: several times the largest L2."""
FEW_ROWS_CALLS = 200
"""Calls of a graph over few rows: as in a decoder's, what starting the graph takes is shared by many."""

Row = dict[str, Any]


def median_seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(statistics.median(times))


def cpu_rows() -> list[Row]:
    import demo_model
    from error_table import linear_weights

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


def cuda_calls() -> list[tuple[str, int, Callable[[Tensor], object]]]:
    """(what, inputs' columns over what is quantized, call) of every operator."""
    ops, default = torch.ops.fouroversix, Recipe().key
    plain = Recipe("mse", 448, adaptive=False).key
    return [
        ("per token", 1, lambda x: ops.quantize(x, None, "token", default)),
        ("per token, plain NVFP4", 1, lambda x: ops.quantize(x, None, "token", plain)),
        ("per token, mae 448", 1, lambda x: ops.quantize(x, None, "token", Recipe("mae", 448).key)),
        ("per token, abs_max", 1, lambda x: ops.quantize(x, None, "token", Recipe("abs_max").key)),
        ("per token, 128x4 scales", 1, lambda x: ops.quantize_to_layout(x, None, "token", default, "128x4")),
        ("per tensor", 1, lambda x: ops.quantize(x, None, "tensor", default)),
        ("per tensor, plain NVFP4", 1, lambda x: ops.quantize(x, None, "tensor", plain)),
        ("exact bf16, per token", 1, lambda x: ops.quantize_values(x, None, default)),
        ("exact bf16, per token, plain NVFP4", 1, lambda x: ops.quantize_values(x, None, plain)),
        ("silu_and_mul, per token", 2, lambda x: ops.silu_and_mul_quantize(x, None, "token", default, "row_major")),
        ("silu_and_mul, exact bf16, per token", 2, lambda x: ops.silu_and_mul_quantize_values(x, None, default)),
    ]


def cuda_rows(compiled_reference: bool) -> list[Row]:
    bandwidth = copy_bandwidth(REPLAYS)
    copy = f"copy, {bandwidth / 1e12:.2f} TB/s"
    found: list[Row] = [{"what": copy, "values": COPY_BYTES, "seconds": 2 * COPY_BYTES / bandwidth}]

    def add(
        what: str,
        shape: tuple[int, int],
        factor: int,
        call: Callable[[Tensor], object],
        dtype: torch.dtype,
        few_inputs: int | None = None,
        evict: Tensor | None = None,
    ) -> None:
        rows, columns = shape
        bytes_in = rows * columns * factor * dtype.itemsize
        count = few_inputs or max(2, -(-COLD_BYTES // bytes_in))
        inputs = [torch.randn(rows, columns * factor, device="cuda", dtype=dtype) for _ in range(count)]
        moved = bytes_in + sum(t.nbytes for t in results(call(inputs[0])))
        calls = count if few_inputs is None else FEW_ROWS_CALLS
        bound = [functools.partial(call, x) for x in itertools.islice(itertools.cycle(inputs), calls)]
        seconds = graph_seconds(bound, REPLAYS, evict)
        found.append(
            {
                "what": f"{rows} x {columns} {str(dtype)[6:]}, {what}",
                "values": rows * columns,
                "seconds": seconds,
                "of_copy": moved / bandwidth / seconds,
            }
        )

    for shape in ((8192, 8192), (16384, 4096)):
        for what, factor, call in cuda_calls():
            add(what, shape, factor, call, torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        add("per token", (8192, 8192), 1, cuda_calls()[0][2], dtype)
    offsets = torch.arange(0, 16385, 128, device="cuda", dtype=torch.int32)
    key = Recipe().key
    add(
        "128 experts",
        (16384, 4096),
        1,
        lambda x: torch.ops.fouroversix.quantize_experts(x, offsets, None, key, "row_major"),
        torch.bfloat16,
    )
    filler = torch.zeros(COLD_BYTES // 8, device="cuda", dtype=torch.int64)
    for rows, columns in itertools.product((1, 8, 16, 32, 64), (4096, 8192, 14336)):
        for what, call in (
            ("per token", lambda x: torch.ops.fouroversix.quantize(x, None, "token", key)),
            ("exact bf16, per token", lambda x: torch.ops.fouroversix.quantize_values(x, None, key)),
        ):
            add(f"{what}, cold", (rows, columns), 1, call, torch.bfloat16, FEW_ROWS_CALLS, filler)
            add(f"{what}, input in L2", (rows, columns), 1, call, torch.bfloat16, 8)
    if compiled_reference:
        compiled = torch.compile(lambda x: results(reference.quantize(x, Recipe(), "token")), dynamic=False)
        add("per token, torch.compile of the reference", (8192, 8192), 1, compiled, torch.bfloat16)
    return found


def results(out: object) -> tuple[Tensor, ...]:
    if isinstance(out, fos.NVFP4Tensor):
        return out.packed, out.block_scale.view(torch.uint8), out.decode_scale
    assert isinstance(out, tuple)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=output, help="also write the figures here")
    parser.add_argument("--compiled-reference", action="store_true", help="time torch.compile of the specification too")
    options = parser.parse_args()
    reason = build.load(options.device)
    kernels = "compiled kernels" if reason is None else f"no compiled kernels ({reason})"
    where = platform.machine() if options.device == "cpu" else torch.cuda.get_device_name()
    machine = f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kernels}"
    found = cpu_rows() if options.device == "cpu" else cuda_rows(options.compiled_reference)
    print(f"{machine}\n\n| what | million values | µs | million values/s | of copy |\n|---|---|---|---|---|")
    for row in found:
        millions, of_copy = row["values"] / 1e6, f"{row['of_copy']:.2f}" if "of_copy" in row else ""
        speed = f"{millions / row['seconds']:.0f}"
        print(f"| {row['what']} | {millions:.3f} | {row['seconds'] * 1e6:.1f} | {speed} | {of_copy} |")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
