"""Products in every way they can be launched, once each, for compute-sanitizer (run by hand, on an H200).

compute-sanitizer --tool memcheck python tests/every_launch.py    # and --tool synccheck
"""

import itertools
import sys
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # the tests' own folder is there already

from products import PLAIN, generator, random_experts, random_weight, random_x, routing  # noqa: E402
from test_hopper import TILES, few_rows_take, launches_of  # noqa: E402

from fouroversix_plugin.kernels import hopper, ops  # noqa: E402
from fouroversix_plugin.recipe import Recipe  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16)


def linear(g: torch.Generator) -> int:
    calls = 0
    for dtype, (N, K) in itertools.product(DTYPES, ((48, 80), (272, 1936), (1040, 576))):
        held = ops.prepare_weight(random_weight(N, K, g=g), dtype)
        for M in (1, 16, 65, 300):
            for launch in launches_of(M, K):
                x = random_x(M, K, dtype, g)
                torch.ops.fouroversix_cuda.linear(
                    x, held.weight, held.block_scale, held.decode_scale, None, None, False, *launch
                )
                calls += 1
    return calls


def experts(g: torch.Generator) -> int:
    calls = 0
    for dtype, activations in itertools.product(DTYPES, (None, Recipe(), PLAIN)):
        for E, top_k, H, inner in ((4, 2, 576, 192), (16, 8, 128, 48), (140, 4, 2064, 192)):
            held = ops.prepare_experts(*random_experts(E, H, inner, g), dtype)
            tiles = [tokens for tokens in TILES["experts"] if tokens > 16 or few_rows_take(H)]
            for M, tokens in itertools.product((1, 7, 64, 300, 900), tiles):
                weights, ids = routing(M, E, top_k, g)
                ids[M // 2, 0] = -1
                with mock.patch.object(hopper, "_rows_of_a_tile", lambda *_, tokens=tokens: tokens):
                    for activation, on_input in (("silu", False), ("gelu", True)):
                        x = random_x(M, H, dtype, g)
                        ops.moe(x, *held, weights, ids, activations, activation, on_input)
                        calls += 1
    return calls


if __name__ == "__main__":
    why = hopper.reason(torch.device("cuda")) if torch.cuda.is_available() else "no CUDA device"
    if why is not None:
        raise SystemExit(f"every_launch: {why}")
    generated = generator("cuda", "every launch")
    made = linear(generated) + experts(generated)
    torch.cuda.synchronize()
    print(f"{made} calls")
