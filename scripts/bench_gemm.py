"""Time dense and mixture-of-experts products on packed NVFP4 weights, ours beside others', on a GPU.

python scripts/bench_gemm.py [--quick] [--json FILE] [--plot FILE.png]

All in one run: ours (W4A16; W4A4 with its quantizer, and its GEMM alone), cuBLAS on bf16 weights, vLLM's Marlin and
Triton bf16 experts, Humming, dequantizing and then cuBLAS, and a kernel that only reads the weights' bytes. CUDA
graphs of many calls over weights that together exceed the L2 several times, random activations, medians. Below the
times stand the floors (bytes at 4.3 TB/s, FLOP at 790 TFLOP/s) and our ratios against what was aimed at.

Every peer's result is compared with the product in fp64 first. One that is missing or fails becomes '-', with its
reason below the tables. Measurements run in a process of their own: where a kernel breaks the GPU's context or never
ends, the next process goes on without that peer, and the run still ends in tables, after ``--seconds`` at the latest.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import bench_gemm_peers as peers
import bench_timing
import torch
import torch.nn.functional as F
import versions
from argument_types import output, positive
from argument_types import plot as plot_file
from argument_types import seconds as seconds_argument
from bench_gemm_report import (
    DENSE_SHAPES,
    MOE_SHAPES,
    Dense,
    Moe,
    notes,
    plot,
    shape_table,
    times,
    verdict_summary,
    verdict_table,
    verdicts,
)
from ending import Signals
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin.kernels import cuda, ops, set_batch_invariant
from fouroversix_plugin.nvfp4 import NVFP4Tensor

DENSE_TOKENS = tuple(2**i for i in range(14))
MOE_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
"""Fewer: Triton compiles vLLM's bf16 kernels anew for nearly every one."""
QUICK_DENSE_TOKENS, QUICK_MOE_TOKENS = (1, 16, 64, 256, 1024, 4096), (1, 64, 1024, 4096)
QUICK_SHAPES = ("4096x4096", "28672x4096", "qwen3-30b-a3b")

COLD_BYTES = 220 << 20
"""Of distinct weights that a graph goes through: several times the L2."""
CALLS = 32
"""Of a graph, about: starting it is shared by them."""
GRAPH_SECONDS = 0.03
"""A graph of slow calls holds fewer. Those read and write far more than the L2 holds, whatever the weights."""
CHECKED_TOKENS = 4


# --- the process that measures ---------------------------------------------------------------------------------------


def shape_named(name: str) -> Dense | Moe:
    shapes: tuple[Dense | Moe, ...] = (*DENSE_SHAPES, *MOE_SHAPES)
    known = {shape.name: shape for shape in shapes}
    if name in known:
        return known[name]
    N, _, K = name.partition("x")
    if N.isdecimal() and K.isdecimal() and int(K) % 16 == 0 and int(N) and int(K):
        return Dense(int(N), int(K))
    raise argparse.ArgumentTypeError(f"shape {name!r}: needs NxK with K a multiple of 16, or one of {', '.join(known)}")


def peers_of(shape: Dense | Moe, wanted: Sequence[str]) -> dict[str, peers.Peer]:
    known = peers.DENSE if isinstance(shape, Dense) else peers.MOE
    return {name: known[name] for name in wanted if name in known}


def make_weights(shape: Dense | Moe, device: str) -> list[Any]:
    """Distinct quantized weights, more bytes than caches hold: NVFP4Tensor, or peers.Experts."""
    if isinstance(shape, Dense):
        first = _random_weight(shape.N, shape.K, device)
        count = max(2, -(-COLD_BYTES // first.nbytes))
        return [first, *(_random_weight(shape.N, shape.K, device) for _ in range(count - 1))]

    def experts() -> peers.Experts:
        w13, w2 = (
            _random_weight(shape.E * rows, columns, device)
            for rows, columns in ((2 * shape.I, shape.H), (shape.H, shape.I))
        )
        return peers.Experts(_as_experts(w13, shape.E), _as_experts(w2, shape.E))

    # One has several times the L2, but a few tokens read only a part of it.
    return [experts(), experts()]


def _random_weight(rows: int, columns: int, device: str) -> NVFP4Tensor:
    return fos.quantize(torch.randn(rows, columns, device=device, dtype=torch.bfloat16))


def _as_experts(q: NVFP4Tensor, E: int) -> NVFP4Tensor:
    packed, block_scale = (part.unflatten(0, (E, -1)) for part in (q.packed, q.block_scale))
    return NVFP4Tensor(packed, block_scale, q.decode_scale.repeat(E))


def make_inputs(shape: Dense | Moe, M: int, calls: int, device: str) -> list[Any]:
    """One for every call: the same x [M, K], or peers.Routed with experts that are uniformly random.

    The first token's experts are dealt from a shuffled deck, so that a single token finds its experts cold.
    """
    if isinstance(shape, Dense):
        return [torch.randn(M, shape.K, device=device, dtype=torch.bfloat16)] * calls
    x = torch.randn(M, shape.H, device=device, dtype=torch.bfloat16)
    deck: list[int] = []
    inputs = []
    for _ in range(calls):
        if len(deck) < shape.top_k:
            deck = torch.randperm(shape.E).tolist()
        ids = torch.rand(M, shape.E, device=device).topk(shape.top_k).indices.to(torch.int32)
        ids[0] = torch.tensor([deck.pop() for _ in range(shape.top_k)])
        inputs.append(peers.Routed(x, torch.rand(M, shape.top_k, device=device).softmax(dim=-1), ids))
    return inputs


def relative_error(shape: Dense | Moe, weight: Any, peer: peers.Peer, call: peers.Call, device: str) -> float:
    """Of the peer's result at a few tokens, against the same product in fp64."""
    given = make_inputs(shape, CHECKED_TOKENS, 1, device)[0]
    out = call(peer.prepare_input(given)).double()

    def activations(x: Tensor) -> Tensor:
        if peer.activations is None:
            return x.double()
        return ops.dequantize(fos.quantize(x.bfloat16(), peer.activations, "token")).double()

    if isinstance(shape, Dense):
        expected = activations(given) @ ops.dequantize(weight).double().T
    else:
        expected = torch.zeros_like(out)
        x = activations(given.x)
        for token, slot in itertools.product(range(CHECKED_TOKENS), range(shape.top_k)):
            expert = int(given.topk_ids[token, slot])
            w13, w2 = (ops.dequantize(part[expert]).double() for part in weight)
            gate, up = (w13 @ x[token]).chunk(2)
            hidden = activations((F.silu(gate) * up)[None])[0]
            expected[token] += float(given.topk_weights[token, slot]) * (w2 @ hidden)
    return float((out - expected).norm() / expected.norm())


def call_seconds(calls: Sequence[peers.Call], inputs: Sequence[Any], replays: int) -> float:
    bound = [functools.partial(call, x) for call, x in zip(itertools.cycle(calls), inputs, strict=False)]
    bound[0]()
    once = bench_timing.event_seconds(bound[0])
    few = max(2, int(GRAPH_SECONDS / once))
    return bench_timing.graph_seconds(bound[:few], replays if once < GRAPH_SECONDS else 3)


def measure(
    shape: Dense | Moe, peer: peers.Peer, weights: Sequence[Any], tokens: Sequence[int], replays: int, device: str
) -> Iterator[dict[str, Any]]:
    """Records, as bench_gemm_report describes them, without who and where."""
    calls = [peer.prepare(weight, sorted({*tokens, CHECKED_TOKENS})) for weight in weights]
    count = len(calls) * max(1, CALLS // len(calls))
    if peer.computes:
        yield {"relative_error": relative_error(shape, weights[0], peer, calls[0], device)}
    seconds = 0.0
    for M in tokens:
        given = make_inputs(shape, M, count, device)
        if peer.computes or not seconds:
            prepared = [peer.prepare_input(given[0])] * count if isinstance(shape, Dense) else given
            seconds = call_seconds(calls, prepared, replays)
        record = {"tokens": M, "seconds": seconds}
        if isinstance(shape, Moe):
            record["experts"] = sum(len(routed.topk_ids.unique()) for routed in given) / count
        yield record


def work(options: argparse.Namespace, device: str = "cuda") -> None:
    """Append to ``options.worker`` what is not in it yet."""
    records = read_records(options.worker)
    done = {(r["shape"], r["peer"]) for r in records if "finished" in r}
    broke = {r["peer"] for r in records if "broke" in r}
    with options.worker.open("a") as file, torch.no_grad():
        for shape in options.shapes:
            torch.manual_seed(0)
            wanted = {
                name: peer for name, peer in peers_of(shape, options.peers).items() if (shape.name, name) not in done
            }
            tokens = options.dense_tokens if isinstance(shape, Dense) else options.moe_tokens
            weights = make_weights(shape, device) if wanted else []
            for name, peer in wanted.items():
                common = {"shape": shape.name, "peer": name}
                _append(file, common | {"began": True})
                started = time.monotonic()
                try:
                    if name in broke:
                        raise RuntimeError("not tried again after it ended a process")
                    for record in measure(shape, peer, weights, tokens, options.replays, device):
                        _append(file, common | record)
                except Exception as error:  # of any kind: other people's code, compilers, CUDA
                    _append(file, common | {"failed": reason(error)})
                    if device == "cuda":
                        leave_if_broken()
                took = round(time.monotonic() - started, 1)
                _append(file, common | {"finished": took})
                print(f"{shape.name} {name}: {took} s", file=sys.stderr)
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()


def leave_if_broken() -> None:
    """A CUDA context that met an illegal access answers nothing any more: the next process needs a new one."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        os._exit(3)  # the interpreter's own end would hang on the broken context


def reason(error: Exception) -> str:
    """One line."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}".rstrip(": ")[:300]


def _append(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


# --- the process that reports ----------------------------------------------------------------------------------------


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_workers(command: Sequence[str], path: Path, limit: float) -> str | None:
    """Run the command until it ends well, each time without what ended it before.

    Returns:
        None, or why there are no more measurements.
    """
    deadline = time.monotonic() + limit
    while True:
        with subprocess.Popen(command, stdout=sys.stderr) as process:
            try:
                status = process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                status = None
            except SystemExit:  # a signal, which reached this process alone
                process.kill()
                raise
        if status == 0:
            return None
        why = f"the time limit of {limit:g} s ended it" if status is None else f"its process ended with status {status}"
        records = read_records(path)
        began, finished, failed = (
            {(r["shape"], r["peer"]) for r in records if key in r} for key in ("began", "finished", "failed")
        )
        with path.open("a") as file:
            for shape, peer in began - finished:
                common = {"shape": shape, "peer": peer}
                if (shape, peer) not in failed:
                    _append(file, common | {"failed": why})
                _append(file, common | {"broke": True, "finished": 0})
        if status is None or began == finished:
            return why


def report(options: argparse.Namespace, records: list[dict[str, Any]], machine: str) -> None:
    print(f"{machine}\n")
    titles = {name: peer.title for known in (peers.MOE, peers.DENSE) for name, peer in known.items()}

    def titles_of(shape: Dense | Moe) -> dict[str, str]:
        return {name: peer.title for name, peer in peers_of(shape, options.peers).items()}

    for shape in options.shapes:
        print(f"{shape.name}, µs\n\n{shape_table(shape, titles_of(shape), records)}\n")
    print("\n".join(notes(records, titles)) + "\n")
    chosen = [ours for ours in ("w4a16", "w4a4") if ours in options.peers]
    judged = {ours: verdicts(ours, options.shapes, times(records)) for ours in chosen}
    print(f"Our time over that of the faster of others, where it is worst\n\n{verdict_table(judged, titles)}\n")
    for ours, found in judged.items():
        print(verdict_summary(titles[ours], found))
    if options.json:
        aims = [
            {"ours": ours, "shape": v.shape, "tokens": v.tokens, **v.aim.__dict__, "ratio": v.ratio, "met": v.met}
            for ours, found in judged.items()
            for v in found
        ]
        written = {"machine": machine, "versions": versions.installed(), "records": records, "aims": aims}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    if options.plot:
        plot(options.shapes, titles_of, records, machine, options.plot)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    known = dict.fromkeys((*peers.DENSE, *peers.MOE))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", action="store_true", help="only dense products")
    parser.add_argument("--moe", action="store_true", help="only mixtures of experts")
    parser.add_argument("--shapes", type=names, help="separated by commas: NxK, or a name of a mixture of experts")
    parser.add_argument("--tokens", type=lambda text: sorted(map(positive, names(text))), help="separated by commas")
    parser.add_argument("--peers", type=names, help=f"separated by commas, of {', '.join(known)}")
    parser.add_argument("--triton", action="store_true", help="our Triton backend, too")
    parser.add_argument("--batch-invariant", action="store_true", help="ours by one order of sums for every batch")
    parser.add_argument(
        "--quick", action="store_true", help="two dense shapes and one of experts, few numbers of tokens"
    )
    parser.add_argument("--seconds", type=seconds_argument, default=540.0, help="report what there is after so long")
    parser.add_argument("--json", type=output, help="also write every record here")
    parser.add_argument("--plot", type=plot_file, help="draw time over floor into this PNG")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        chosen = [shape_named(name) for name in options.shapes or (QUICK_SHAPES if options.quick else ())]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    options.shapes = [
        shape
        for shape in chosen or (*DENSE_SHAPES, *MOE_SHAPES)
        if options.dense == options.moe or isinstance(shape, Dense) == options.dense
    ]
    options.dense_tokens = options.tokens or (QUICK_DENSE_TOKENS if options.quick else DENSE_TOKENS)
    options.moe_tokens = options.tokens or (QUICK_MOE_TOKENS if options.quick else MOE_TOKENS)
    if unknown := set(options.peers or ()) - set(known):
        parser.error(f"--peers: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    options.peers = options.peers or [name for name in known if options.triton or not name.startswith("triton")]
    options.replays = 5 if options.quick else 9
    return options


def main() -> None:
    options = parse()
    set_batch_invariant(options.batch_invariant)
    if options.worker:
        work(options)
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench_gemm: no CUDA device")
    chosen = cuda.choose(torch.empty(16, 8, dtype=torch.uint8, device="cuda"), torch.bfloat16, "")
    print(f"ours: products by {chosen}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        started, signals = time.monotonic(), Signals()
        try:
            stopped = run_workers([sys.executable, *sys.argv, "--worker", str(path)], path, options.seconds)
        except SystemExit:  # what was measured until then is shown
            stopped = f"signal {signals.first} ended it"
        records = read_records(path)
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ours by {chosen}"
    where += ", batch-invariant" if options.batch_invariant else ""
    machine = f"{where}, {time.monotonic() - started:.0f} s"
    report(options, records, machine)
    if stopped:
        print(f"not all was measured: {stopped}", file=sys.stderr)
        sys.exit(128 + signals.first if signals.first else 1)


if __name__ == "__main__":
    main()
