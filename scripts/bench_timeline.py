"""Show the kernels of a product, and when each starts and ends, on a GPU.

python scripts/bench_timeline.py [--shape NxK|qwen3-30b-a3b|...] [--tokens 256,4096] [--peers w4a16,w4a4]

A CUDA graph of several calls, over weights that together exceed the L2 as in ``bench_gemm.py``, is replayed under
torch's profiler. Medians over the calls, in µs from the start of the call's first kernel. A kernel may start before the
one above it has ended: it then brings what does not depend on that one, and waits. What a whole call takes is of such
a graph without the profiler.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import bench_gemm
import bench_timing
import torch
from argument_types import positive
from markdown_table import table

CALLS, REPLAYS = 8, 4
TEMPLATE = re.compile(r"<.*")


class Kernel(NamedTuple):
    name: str
    start: float
    end: float
    """In µs."""


def short(name: str) -> str:
    """Of a kernel, without its types and namespaces."""
    without = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return TEMPLATE.sub("", without).partition("(")[0].rpartition("::")[2] or name


def medians(kernels: Sequence[Kernel], calls: int) -> list[Kernel]:
    """Of each kernel of a call, from the start of its first; ``kernels`` are those of ``calls`` calls.

    Raises:
        ValueError: the calls did not run as many kernels each.
    """
    in_order = sorted(kernels, key=lambda kernel: kernel.start)
    each, rest = divmod(len(in_order), calls)
    if rest or not each:
        raise ValueError(f"{len(in_order)} kernels in {calls} calls, needed as many in each")
    found = []
    for number in range(each):
        of_calls = [(in_order[first + number], in_order[first].start) for first in range(0, len(in_order), each)]
        start = statistics.median(kernel.start - began for kernel, began in of_calls)
        end = statistics.median(kernel.end - began for kernel, began in of_calls)
        found.append(Kernel(of_calls[0][0].name, start, end))
    return found


def profiled(graph: torch.cuda.CUDAGraph) -> list[Kernel]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and event.time_range.end > event.time_range.start
    ]


def timeline(shape: Any, peer: Any, weights: Sequence[Any], tokens: int) -> tuple[float, list[Kernel]]:
    """Seconds a call, and its kernels."""
    calls = [peer.prepare(weight, [tokens]) for weight in weights]
    inputs = [peer.prepare_input(given) for given in bench_gemm.make_inputs(shape, tokens, CALLS, "cuda")]
    bound = [lambda call=call, x=x: call(x) for call, x in zip(itertools.cycle(calls), inputs, strict=False)]
    seconds = bench_timing.graph_seconds(bound, 9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in bound:
            call()
    graph.replay()
    return seconds, medians(profiled(graph), CALLS * REPLAYS)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", type=bench_gemm.shape_named, default="qwen3-30b-a3b", help="default: qwen3-30b-a3b")
    add("--tokens", type=lambda text: [positive(n) for n in names(text)], default=[256, 4096], help="default: 256,4096")
    add("--peers", type=names, default=["w4a16", "w4a4"], help="of bench_gemm.py (default: w4a16,w4a4)")
    options = parser.parse_args(arguments)
    known = bench_gemm.peers_of(options.shape, options.peers)
    if unknown := set(options.peers) - set(known):
        parser.error(f"--peers: no {', '.join(sorted(unknown))} for {options.shape.name}")
    options.peers = known
    return options


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("bench_timeline: no CUDA device")
    torch.manual_seed(0)
    with torch.no_grad():
        weights = bench_gemm.make_weights(options.shape, "cuda")
        for tokens, peer in itertools.product(options.tokens, options.peers.values()):
            seconds, kernels = timeline(options.shape, peer, weights, tokens)
            print(f"\n{options.shape.name}, {peer.title}, {tokens} tokens: {seconds * 1e6:.1f} µs a call\n")
            rows = [[short(k.name), *(f"{us:.1f}" for us in (k.start, k.end, k.end - k.start))] for k in kernels]
            print(table(["kernel", "start", "end", "takes"], rows))


if __name__ == "__main__":
    main()
