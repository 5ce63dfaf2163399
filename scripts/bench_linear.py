"""Time linear layers and mixtures of experts on packed weights on a CPU, beside torch's bf16 ones.

python scripts/bench_linear.py [--json FILE]

Weights are rotated through more than any cache holds, and tokens go to other experts in each call, so that weights come
from memory, as those of a model do. Median of the calls; both sides in one run, call by call in turn, so that a
disturbance hits both. Torch has no mixture of experts: its side multiplies the rows of one expert after the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from argument_types import output
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin.kernels import build, ops

SHAPES = {"4096 x 4096": (4096, 4096), "14336 x 4096": (14336, 4096), "SmolLM2 up": (1536, 576)}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
# Experts, top k, hidden and intermediate size.
MIXTURES = {"128 experts, top 8, 2048 / 768": (128, 8, 2048, 768), "16 experts, top 8, 576 / 192": (16, 8, 576, 192)}
MIXTURE_TOKENS = (1, 4, 16, 64, 256)
COLD_BYTES = 256 << 20
"""Distinct bf16 weights: several times a last-level cache's share of two cores."""

CALLS = 31
NAMES = ("bf16", "W4A16", "W4A4")


def in_turn(calls: Sequence[Callable[[int], object]]) -> list[float]:
    """Median seconds of each call; each gets the number of the round."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(CALLS + 2):
        for seconds, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call(round_)
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[2:]) for seconds in times]


def experts_in_turn(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """A mixture of experts (SiLU) of bf16 weights w13 [E, 2I, H] and w2 [E, H, I]."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for e in topk_ids.unique().tolist():
        token, slot = (topk_ids == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], w13[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w2[e])
        out.index_add_(0, token, y.float() * topk_weights[token, slot].unsqueeze(-1))
    return out.to(x.dtype)


def measure_experts(experts: int, top_k: int, hidden: int, inner: int) -> list[dict[str, Any]]:
    count = max(1, COLD_BYTES // (6 * experts * hidden * inner))
    layers: list[Any] = []
    for _ in range(count):
        w13 = torch.randn(experts, 2 * inner, hidden, dtype=torch.bfloat16)
        w2 = torch.randn(experts, hidden, inner, dtype=torch.bfloat16)
        layers.append((w13, w2, *ops.prepare_experts(quantized(w13), quantized(w2), torch.bfloat16)))
    found = []
    for tokens in MIXTURE_TOKENS:
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        routes = [torch.rand(tokens, experts).softmax(-1).topk(top_k) for _ in range(CALLS + 2)]

        def bf16(i: int, x: Tensor = x, routes: Any = routes) -> Tensor:
            return experts_in_turn(x, *layers[i % count][:2], *routes[i])

        def ours(i: int, recipe: fos.Recipe | None, x: Tensor, routes: Any) -> Tensor:
            (_, _, w13, w2), (topk_weights, topk_ids) = layers[i % count], routes[i]
            return ops.moe(x, w13, w2, topk_weights, topk_ids, recipe, "silu", apply_router_weight_on_input=False)

        def w4a16(i: int, x: Tensor = x, routes: Any = routes) -> Tensor:
            return ours(i, None, x, routes)

        def w4a4(i: int, x: Tensor = x, routes: Any = routes) -> Tensor:
            return ours(i, fos.Recipe(), x, routes)

        found.append({"tokens": tokens, **dict(zip(NAMES, in_turn([bf16, w4a16, w4a4]), strict=True))})
    return found


def quantized(w: Tensor) -> fos.NVFP4Tensor:
    """Of [E, N, K], all experts for one amax."""
    q = fos.quantize(w.flatten(0, 1))
    packed, block_scale = (part.unflatten(0, w.shape[:2]) for part in (q.packed, q.block_scale))
    return fos.NVFP4Tensor(packed, block_scale, q.decode_scale.expand(len(w)))


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

        found.append({"tokens": tokens, **dict(zip(NAMES, in_turn([bf16, w4a16, w4a4]), strict=True))})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output, help="also write the figures here")
    options = parser.parse_args()
    reason = build.load("cpu")
    kernels = "compiled kernels" if reason is None else f"no compiled kernels ({reason})"
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kernels}"
    found = {name: measure(*shape) for name, shape in SHAPES.items()}
    found |= {name: measure_experts(*shape) for name, shape in MIXTURES.items()}
    print(f"{machine}\n\n| N x K, or experts | tokens | bf16 µs | W4A16 µs | bf16 / W4A16 | bf16 / W4A4 |")
    print("|---|---|---|---|---|---|")
    for name, row in itertools.chain.from_iterable(itertools.product([name], rows) for name, rows in found.items()):
        bf16, w4a16, w4a4 = row["bf16"], row["W4A16"], row["W4A4"]
        times = f"{bf16 * 1e6:.0f} | {w4a16 * 1e6:.0f}"
        print(f"| {name} | {row['tokens']} | {times} | {bf16 / w4a16:.2f} | {bf16 / w4a4:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "seconds": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
