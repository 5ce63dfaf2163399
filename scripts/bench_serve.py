"""Serve one model shape in bf16, as stock NVFP4 and as ours, and compare decoding and prefill.

python scripts/bench_serve.py --engine vllm|sglang --shape llama-8b|qwen3-30b-a3b [--json FILE] [--plot FILE.png]

Nothing is downloaded: weights are random (``bench_serve_models.py``), bf16 ones are made up by the engine.
Configurations run one after the other, each in a process of its own, so that its memory is freed and a failure of one
leaves the others; what fails is '-', with its reason below the table. Stock is the engine's own loader of ModelOpt's
NVFP4, which runs Marlin on Hopper. CUDA graphs, and vLLM's torch.compile, are on unless ``--enforce-eager``; prefixes
are not cached. What the engines differ in stands in ``bench_serve_vllm.py`` and ``bench_serve_sglang.py``.

Decoding: as many requests at once as there are streams, short random prompts, a fixed number of tokens each; generated
tokens over the time of all. Prefill: long random prompts, one token each; prompt tokens over the time. The best of the
repeats, after a warm-up. "load s" is the engine's time to load the weights (bf16 ones are not read, but made), "start
s" all until it can answer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import bench_serve_models as models
import bench_serve_sglang
import bench_serve_vllm
import versions
from argument_types import json_object, output, positive
from argument_types import plot as plot_file
from argument_types import seconds as seconds_argument
from bench_serve_report import (
    CONFIGURATIONS,
    PREFILL,
    plot,
    products,
    reasons,
    result_table,
    speeds,
    verdict_summary,
    verdict_table,
    verdicts,
)
from ending import Signals
from engine_process import end_group, errors, plugin_environment, why_failed

PROMPT_TOKENS = 16
"""Of a stream that decodes: so few that prefill is not what is timed."""
WARM_UP_TOKENS = 8
PRODUCTS = re.compile(r"fouroversix: products of (?P<what>linear|experts) \w+ by (?P<by>\w+)")
"""What our method's log says of its kernels on a GPU."""
ENGINES = {"vllm": bench_serve_vllm, "sglang": bench_serve_sglang}
"""What differs between them: NAME, LOADED (a line of the log), arguments(), constructor() and generate()."""


# --- the process of a configuration ----------------------------------------------------------------------------------


def measure(job: dict[str, Any]) -> None:
    """Start the engine, time every point, and append records to ``job["records"]`` as they come."""
    chance = random.Random(0)
    module = ENGINES[job["engine"]]
    make = module.constructor()
    started = time.perf_counter()
    engine = make(**job["arguments"])
    append(job["records"], {"configuration": job["configuration"], "start_seconds": time.perf_counter() - started})

    def run(streams: int, prompt_tokens: int, new_tokens: int) -> float:
        """Seconds. Prompts are new ones every time."""
        prompts = [[chance.randrange(job["vocabulary"]) for _ in range(prompt_tokens)] for _ in range(streams)]
        before = time.perf_counter()
        generated = module.generate(engine, prompts, new_tokens)
        seconds = time.perf_counter() - before
        if generated != streams * new_tokens:
            raise RuntimeError(f"{streams} streams generated {generated} tokens, needed {streams * new_tokens}")
        return seconds

    def best(point: str, tokens: int, streams: int, prompt_tokens: int, new_tokens: int) -> None:
        run(streams, prompt_tokens, min(new_tokens, WARM_UP_TOKENS))
        seconds = [run(streams, prompt_tokens, new_tokens) for _ in range(job["repeats"])]
        record = {"configuration": job["configuration"], "point": point, "seconds": seconds}
        append(job["records"], record | {"speed": tokens / min(seconds)})

    for streams in job["streams"]:
        best(str(streams), streams * job["new_tokens"], streams, PROMPT_TOKENS, job["new_tokens"])
    count, length = job["prefill"]
    best(PREFILL, count * length, count, length, 1)


def append(path: str, record: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


# --- the process that reports ----------------------------------------------------------------------------------------


def engine_arguments(options: argparse.Namespace, configuration: str, folder: Path) -> dict[str, Any]:
    """Those of the engine's own, then those that were asked for."""
    source = models.source(configuration, folder, options.dummy)
    made_up = {"load_format": "dummy"} if source.made_up else {}
    return {**ENGINES[options.engine].arguments(options, configuration, source), **made_up, **options.llm}


def run_configuration(
    options: argparse.Namespace,
    configuration: str,
    folder: Path,
    command: Sequence[str],
    deadline: float,
    records: list[dict[str, Any]],
    hold: Callable[[], AbstractContextManager[object]],
) -> None:
    """Append its records: also those of a process that failed, or was ended at ``deadline`` (of time.monotonic) or by
    an exception, which does not come within ``hold``.
    """
    engine, logs = ENGINES[options.engine], options.logs or folder
    measured, log, job_file = (folder / f"{configuration}.{kind}" for kind in ("jsonl", "log", "job"))
    log = logs / log.name
    job = {
        "configuration": configuration,
        "engine": options.engine,
        "arguments": engine_arguments(options, configuration, folder),
        "vocabulary": models.SHAPES[options.shape].vocabulary,
        "streams": options.streams,
        "prefill": options.prefill,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "records": str(measured),
    }
    job_file.write_text(json.dumps(job))
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"} | plugin_environment(folder)
    process: subprocess.Popen[bytes] | None = None
    why: str | None = "a signal came first"
    try:
        with hold(), log.open("wb") as output:
            process = subprocess.Popen(
                [*command, str(job_file)], stdout=output, stderr=output, env=environment, start_new_session=True
            )
        status = process.wait(max(deadline - time.monotonic(), 0))
        why = (why_failed(log.read_text(errors="replace")) or f"ended with {status}") if status else None
    except subprocess.TimeoutExpired:
        why = f"{options.seconds:g} s were over"
    finally:
        with hold():
            if process is not None:
                end_group(process)
            said = log.read_text(errors="replace") if log.exists() else ""
            if measured.exists():
                records += map(json.loads, measured.read_text().splitlines())
            if loaded := engine.LOADED.search(said):
                gib, seconds = map(float, loaded.group("gib", "seconds"))
                records.append({"configuration": configuration, "model_gib": gib, "load_seconds": seconds})
            if by := {match["what"]: match["by"] for match in PRODUCTS.finditer(said)}:
                records.append({"configuration": configuration, "products": by})
            if why is not None:
                records.append({"configuration": configuration, "failed": why})
                print("\n".join([f"--- {configuration}: errors in its log", *errors(said)]), file=sys.stderr)
            of_points = [f"{point}: {speed:.0f}" for point, speed in speeds(records).get(configuration, {}).items()]
            print(f"{configuration}: tokens a second by streams: {', '.join(of_points) or 'none'}", file=sys.stderr)


def report(options: argparse.Namespace, records: list[dict[str, Any]], machine: str) -> None:
    count, length = options.prefill
    title = f"{options.shape}, {machine}; {options.new_tokens} tokens a stream, prefill {count} x {length}"
    points = [*map(str, options.streams), PREFILL]
    found = verdicts(records, experts=models.SHAPES[options.shape].experts > 0)
    print(f"{title}\n\n{result_table(records, options.configurations, points)}\n")
    if said := [*products(records), *reasons(records)]:
        print("\n".join(said) + "\n")
    print(f"{verdict_table(found)}\n\n{verdict_summary(found)}")
    if options.json:
        aims = [{**verdict.aim._asdict(), "point": verdict.point, "ratio": verdict.ratio} for verdict in found]
        written = {"title": title, "versions": versions.installed(), "records": records, "aims": aims}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    if options.plot:
        plot(records, options.configurations, title, options.plot)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engine", choices=ENGINES, default="vllm", help="default: vllm")
    add("--shape", choices=models.SHAPES, default="llama-8b", help="default: llama-8b")
    add("--configurations", type=names, default=[*CONFIGURATIONS], help=f"of {','.join(CONFIGURATIONS)} (default: all)")
    add("--streams", type=numbers, default=[1, 16, 64, 256], help="default: 1,16,64,256")
    add("--new-tokens", type=positive, default=256, help="that each stream generates (default: 256)")
    add("--prefill", type=prompts, default=(8, 8192), help="prompts x their length (default: 8x8192)")
    add("--repeats", type=positive, default=2, help="of which the best counts (default: 2)")
    add("--enforce-eager", action="store_true", help="no CUDA graphs, no torch.compile")
    add("--dummy", action="store_true", help="ours quantizes made-up weights while loading; without stock, no files")
    add("--llm", type=json_object, default={}, help="JSON: more arguments of vllm.LLM or sglang.Engine")
    add("--folder", type=Path, help="where models are written and removed: 5 to 20 GB (default: a temporary one)")
    add("--logs", type=Path, help="keep the engine's logs in this folder")
    add("--seconds", type=seconds_argument, default=540.0, help="report what there is after so long (default: 540)")
    add("--json", type=output, help="also write every record here")
    add("--plot", type=plot_file, help="draw the table into this PNG")
    options = parser.parse_args(arguments)
    if unknown := set(options.configurations) - set(CONFIGURATIONS):
        parser.error(f"--configurations: no {', '.join(sorted(unknown))}; there are {', '.join(CONFIGURATIONS)}")
    if options.dummy:
        options.configurations = [name for name in options.configurations if name != "stock"]
    if not options.configurations:
        parser.error("--configurations: nothing is left to measure")
    count, length = options.prefill
    options.longest = max(length + 1, PROMPT_TOKENS + options.new_tokens)
    options.most_requests = max(*options.streams, count)
    return options


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[int]:
    found = sorted({positive(number) for number in names(text)})
    if not found:
        raise argparse.ArgumentTypeError("needs a number")
    return found


def prompts(text: str) -> tuple[int, int]:
    count, _, length = text.partition("x")
    return positive(count), positive(length)


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--measure":
        measure(json.loads(Path(sys.argv[2]).read_text()))
        sys.stdout.flush()
        os._exit(0)  # an engine's orderly end takes seconds of nobody's use; whoever started this ends its children
    options = parse()
    import torch

    cuda = torch.cuda.is_available()
    deadline = time.monotonic() + options.seconds
    shape, positions = models.SHAPES[options.shape], options.prefill[1] + options.new_tokens + PROMPT_TOKENS
    records: list[dict[str, Any]] = []
    signals, status = Signals(), 0
    for folder in filter(None, (options.logs, options.folder)):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-serve-") as scratch:
        folder = Path(scratch)
        models.write_bf16_config(shape, folder / "bf16", positions)
        if not options.dummy and set(options.configurations) != {"bf16"}:
            started = time.monotonic()
            models.write_quantized(shape, folder, positions, "cuda" if cuda else "cpu")
            print(f"wrote the quantized model in {time.monotonic() - started:.0f} s", file=sys.stderr)
        if cuda:
            torch.cuda.empty_cache()  # the engines' memory
        command = [sys.executable, __file__, "--measure"]
        try:
            for configuration in options.configurations:
                print(f"{configuration}: {deadline - time.monotonic():.0f} s left", file=sys.stderr)
                run_configuration(options, configuration, folder, command, deadline, records, signals.hold)
        except SystemExit:  # a signal: what was measured until then is shown
            status = 128 + signals.first
        where = torch.cuda.get_device_name() if cuda else "CPU"
        engine = f"{ENGINES[options.engine].NAME} {versions.installed().get(options.engine, '?')}"
        with signals.hold():  # before the models are removed, which takes its time
            report(options, records, f"{where}, {engine}, torch {torch.__version__}")
            sys.stdout.flush()
    sys.exit(status or int(any("failed" in record for record in records)))


if __name__ == "__main__":
    main()
