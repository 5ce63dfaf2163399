"""The process of one configuration: one engine, which scores the solutions and answers the questions.

``python accuracy_worker.py JOB.json``. What is there already is not measured again.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gsm8k
import versions
from accuracy_report import REFERENCE
from divergence import load_texts
from divergence_sources import Request, score_on_server, score_with_engine
from gsm8k_answers import STOPS
from gsm8k_log import Answer, RunLog
from server_process import run_until_signal, serving

SCORES, ANSWERS, PHASES = "scores.safetensors", "gsm8k.json", "phases.jsonl"
READY_SECONDS = 400


def quantization_config(configuration: str) -> dict[str, Any] | None:
    """The whole block, since no preset has the weights of another recipe without activations; None for BF16."""
    if configuration == REFERENCE:
        return None
    import fouroversix_plugin as fos

    recipe, _, scheme = configuration.rpartition("-")
    preset = fos.preset(recipe)
    return (preset if scheme == "w4a4" else dataclasses.replace(preset, activations=None)).to_dict()


def run_vllm(options: argparse.Namespace, config: dict[str, Any] | None, folder: Path) -> None:
    from vllm import LLM

    overrides = {"hf_overrides": {"quantization_config": config}} if config else {}
    arguments = {"model": options.model, "max_logprobs": options.top, **overrides, **options.llm}
    with phase(folder, "start"):
        engine = LLM(**arguments)
    if not (folder / SCORES).exists():
        with phase(folder, "divergence"):
            about = {"source": options.model, "model": options.model, "arguments": arguments}
            score_with_engine(engine, request(options), folder / SCORES, about)
    if options.num_questions != 0 and not (folder / ANSWERS).exists():
        with phase(folder, "gsm8k"):
            answer_in_engine(engine, options, config, folder)


def answer_in_engine(engine: Any, options: argparse.Namespace, config: dict[str, Any] | None, folder: Path) -> None:
    """What gsm8k.py asks a server, asked in one call."""
    import vllm

    tasks = gsm8k.build_tasks(options)
    settings = {
        **gsm8k.settings_of(options, tasks, "completion", 0.0),
        "server": {"model": options.model, "engine": "vllm", "version": vllm.__version__, "quantization": config},
    }
    params = vllm.SamplingParams(temperature=0, max_tokens=options.max_tokens, stop=list(STOPS))
    log_file = folder / "answers.jsonl"
    log_file.unlink(missing_ok=True)  # of a call that was interrupted: the answers come together or not at all
    started = time.monotonic()
    with RunLog(log_file, settings) as log:
        outputs = engine.generate([task.prompt for task in tasks], params, use_tqdm=sys.stderr.isatty())
        seconds = time.monotonic() - started
        for task, output in zip(tasks, outputs, strict=True):
            given = output.outputs[0]
            log.add(
                Answer(task.question.id, given.text, given.finish_reason, len(given.token_ids), log.attempt, seconds)
            )
        result = {"settings": settings, "versions": versions.installed(), **gsm8k.summarize(tasks, log)}
    write(folder / ANSWERS, result)


async def run_sglang(options: argparse.Namespace, config: dict[str, Any] | None, folder: Path) -> int:
    """One server for both, asked as any other is. The status to end with.

    Raises:
        ServerError: requests failed.
    """
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", options.model, *options.server_args]
    if config:
        command += ["--json-model-override-args", json.dumps({"quantization_config": config})]
    limits = {"parallel": options.parallel, "timeout": 600, "retries": 3}
    started = time.monotonic()
    async with serving(shlex.join(command), folder / "server.log", READY_SECONDS) as server:
        append(folder, "start", time.monotonic() - started)
        if not (folder / SCORES).exists():
            with phase(folder, "divergence"):
                await score_on_server(server.base_url, request(options), folder / SCORES, model=None, **limits)
        if options.num_questions != 0 and not (folder / ANSWERS).exists():
            some = folder / f"some-{ANSWERS}"  # also where requests failed: then nothing is done yet
            some.with_suffix(".jsonl").unlink(missing_ok=True)  # of another port
            with phase(folder, "gsm8k"):
                words = ["--base-url", server.base_url, "--out", str(some), *gsm8k_arguments(options)]
                await gsm8k.evaluate(gsm8k.parse(words))
            some.replace(folder / ANSWERS)
    return 0


def gsm8k_arguments(options: argparse.Namespace) -> list[str]:
    names = ("data", "shots_data", "num_shots", "num_questions", "max_tokens", "parallel", "seed")
    given = {name: getattr(options, name) for name in names}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]


def request(options: argparse.Namespace) -> Request:
    """Every configuration of a model tokenizes the same texts with the same tokenizer."""
    texts = load_texts(options.data, options.documents, options.seed)
    return Request(tuple(texts), (), options.top, 0, options.documents, options.seed)


@contextmanager
def phase(folder: Path, name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    append(folder, name, time.monotonic() - started)


def append(folder: Path, name: str, seconds: float) -> None:
    with (folder / PHASES).open("a") as file:
        file.write(json.dumps({name: seconds}) + "\n")


def write(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    options, folder = argparse.Namespace(**job["options"]), Path(sys.argv[1]).parent
    config = quantization_config(job["configuration"])
    if job["engine"] == "sglang":
        sys.exit(run_until_signal(run_sglang(options, config, folder)))
    run_vllm(options, config, folder)
    sys.stdout.flush()
    os._exit(0)  # vLLM's orderly end takes seconds


if __name__ == "__main__":
    main()
