"""What quantization costs in accuracy: BF16, plain NVFP4 and Four over Six of the same models, in one table.

python scripts/accuracy.py MODEL [MODEL ...] --data test.jsonl --shots-data train.jsonl --out accuracy.json

Each configuration of each model (BF16, and three recipes as W4A16 and as W4A4, quantized while loading) runs in a
process of its own, --jobs of them at a time on one GPU. Its one engine scores GSM8K's solutions (divergence.py: KL from
BF16, top-1 agreement, perplexity) and answers the questions (gsm8k.py). Written are OUT.json with every document and
answer, and OUT.md with the tables; both also where a configuration failed or --seconds were over.

The intervals are over documents. How weights happen to be rounded is one draw for each model, and moves the KL more:
demo_model.py --order writes the same network with its channels in another order, and given such models too, the ratio
of divergences is also reported over the orders.

The same command goes on where an earlier one was interrupted: OUT.work holds what there is, a folder with a log for
each configuration. Exit status: 0; 1 for an error, a configuration that is missing, or an aim that is not met; 2 for
wrong usage; 128 + the signal that ended it.
"""

import argparse
import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple

import gsm8k
import torch
import versions
from accuracy_report import CONFIGURATIONS, REFERENCE, label, report, verdicts
from accuracy_worker import ANSWERS, PHASES, SCORES, write
from argument_types import json_object, natural, positive, seconds
from divergence import build_result, load_texts
from divergence_scores import ScoresFile
from divergence_statistics import compare, join
from engine_process import end_group, errors, plugin_environment, why_failed
from gsm8k_data import InputError
from server_client import run_together
from server_process import GRACE_SECONDS, run_until_signal

WORKER = Path(__file__).with_name("accuracy_worker.py")
STOP_SECONDS = 2 * GRACE_SECONDS + 5
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
LLM = {"dtype": "bfloat16", "seed": 0, "enforce_eager": True, "max_model_len": 4096}
# Engines that start together would each take the others' memory for its own: theirs is stated, not measured.
CUDA_LLM = {"max_num_seqs": 1024, "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 10 << 30}
CPU_LLM = {"max_num_seqs": 32, "kv_cache_memory_bytes": 1 << 30}


class Job(NamedTuple):
    model: Path
    configuration: str
    folder: Path

    @property
    def entry(self) -> dict[str, Any]:
        return {"model": self.model.name, "configuration": self.configuration}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="BF16 checkpoints, in folders of different names")
    add("--configurations", type=names, default=[*CONFIGURATIONS], help=f"of {','.join(CONFIGURATIONS)} (all)")
    add("--data", required=True, metavar="FILE", help="JSONL of question and answer: solutions to score and questions")
    add("--shots-data", required=True, metavar="FILE", help="where the examples come from")
    add("--documents", type=positive, metavar="N", help="solutions to score, a sample drawn with --seed (all)")
    add("--questions", type=natural, metavar="N", help="questions to answer, a sample drawn with --seed (all)")
    add("--num-shots", type=natural, default=8, metavar="N", help="examples in the prompt (8)")
    add("--max-tokens", type=positive, default=512, metavar="N", help="of an answer (512)")
    add("--top", type=positive, default=100, metavar="K", help="log-probabilities a position (100)")
    add("--seed", type=int, default=0, help="draws documents, questions, examples and the bootstrap (0)")
    add("--jobs", type=positive, default=1, metavar="N", help="configurations at a time (1)")
    add("--seconds", type=seconds, default=86400.0, help="stop measuring and report after so long (a day)")
    add(
        "--engine", choices=("vllm", "sglang"), default="vllm", help="vLLM in the process (default), or SGLang's server"
    )
    add("--llm", type=json_object, default={}, metavar="JSON", help="more arguments of vllm.LLM")
    add("--server-args", type=str.split, default=[], metavar="WORDS", help="more arguments of SGLang's server")
    add("--parallel", type=positive, default=64, metavar="N", help="requests at a time to SGLang's server (64)")
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; tables go to FILE.md")
    options = parser.parse_args(arguments)
    if unknown := set(options.configurations) - set(CONFIGURATIONS):
        parser.error(f"--configurations: no {', '.join(sorted(unknown))}; there are {', '.join(CONFIGURATIONS)}")
    if REFERENCE not in options.configurations:
        parser.error(f"--configurations: needs {REFERENCE}, from which the divergence is measured")
    if len({model.name for model in options.models}) < len(options.models):
        parser.error("MODEL: two folders have the same name")
    if options.out.suffix != ".json":
        parser.error(f"--out {options.out}: needs a name that ends in .json")
    return options


def names(text: str) -> list[str]:
    """In the order of the table."""
    given = [name for name in text.split(",") if name]
    return [
        *(name for name in CONFIGURATIONS if name in given),
        *(name for name in given if name not in CONFIGURATIONS),
    ]


def build_jobs(options: argparse.Namespace, *, cuda: bool) -> list[Job]:
    """Their folders, each with the settings of its measurement.

    Raises:
        InputError: a model or the data is not there, or an earlier command measured with other settings.
    """
    common = {
        "data": str(Path(options.data).resolve()),
        "shots_data": str(Path(options.shots_data).resolve()),
        "documents": options.documents,
        "num_questions": options.questions,
        **{name: getattr(options, name) for name in ("num_shots", "max_tokens", "top", "seed")},
        "chat": False,
        "llm": {**LLM, **(CUDA_LLM if cuda else CPU_LLM), **options.llm},
        "server_args": options.server_args,
        "parallel": options.parallel,
    }
    # What each engine would find out only after it has started.
    load_texts(common["data"], options.documents, options.seed)
    if options.questions != 0:
        gsm8k.build_tasks(argparse.Namespace(**common))
    jobs = []
    for model, configuration in itertools.product(options.models, options.configurations):
        if not (model / "config.json").is_file():
            raise InputError(f"{model} is no checkpoint: needs a folder with config.json")
        folder = options.out.with_suffix(".work") / f"{model.name}-{configuration}"
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"model": str(model.resolve()), **common}
        job = {"engine": options.engine, "configuration": configuration, "options": settings}
        file = folder / "job.json"
        measured = any((folder / name).exists() for name in (SCORES, ANSWERS))
        if measured and file.exists() and json.loads(file.read_text()) != job:
            raise InputError(f"{folder} was measured with other settings; repeat them, or give another --out")
        write(file, job)
        jobs.append(Job(model, configuration, folder))
    return jobs


def environment(options: argparse.Namespace) -> dict[str, str]:
    given = os.environ | ENVIRONMENT | plugin_environment(options.out.with_suffix(".work"))
    if options.jobs > 1:
        given.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    return given


class Measurement:
    """The jobs that are not done yet, some at a time; the failure of one leaves the others."""

    def __init__(self, options: argparse.Namespace, jobs: list[Job]) -> None:
        self._options, self._environment = options, environment(options)
        self._left = iter([job for job in jobs if not done(job, options)])
        self._done, self._count = sum(done(job, options) for job in jobs), len(jobs)
        self._start = time.monotonic()
        self.failures: dict[Job, str] = {}

    async def run(self) -> None:
        await run_together(self._work() for _ in range(self._options.jobs))

    async def _work(self) -> None:
        for job in self._left:
            if self._seconds() >= self._options.seconds:
                return
            self._say(job, "started")
            status = await self._measure(job)
            if status is None:
                return
            if status != 0:
                said = (job.folder / "log").read_text(errors="replace")
                self.failures[job] = why_failed(said) or f"ended with {status}"
                self._say(job, "failed: " + "\n".join([self.failures[job], *errors(said)]))
                continue
            self._done += 1
            self._say(job, ", ".join(f"{name} {value:.0f} s" for name, value in phases(job).items()))

    async def _measure(self, job: Job) -> int | None:
        """The status its process ended with, None if it did not end in time."""
        with (job.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(WORKER), str(job.folder / "job.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        try:
            while (status := process.poll()) is None and self._seconds() < self._options.seconds:
                await asyncio.sleep(0.2)
            return status
        finally:
            # SGLang's server is in a group of its own, and its worker stops it.
            end_group(process, STOP_SECONDS if self._options.engine == "sglang" else 0)

    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _say(self, job: Job, what: str) -> None:
        done = f"{self._done} of {self._count} done, {self._seconds():.0f} s"
        print(f"[{done}] {job.model.name}, {label(job.entry)}: {what}", file=sys.stderr, flush=True)


def done(job: Job, options: argparse.Namespace) -> bool:
    return (job.folder / SCORES).exists() and (options.questions == 0 or (job.folder / ANSWERS).exists())


def phases(job: Job) -> dict[str, float]:
    """Seconds of each, the last of several starts."""
    found: dict[str, float] = {}
    with suppress(FileNotFoundError):
        for line in (job.folder / PHASES).read_text().splitlines():
            found |= json.loads(line)
    return found


def divergence(reference: Path, candidate: Path, seed: int) -> dict[str, Any]:
    one, other = ScoresFile(reference), ScoresFile(candidate)
    if one.documents != other.documents:
        raise InputError(f"{reference} and {candidate} hold scores of other documents; remove both to measure again")
    positions = join(compare(one.scores(i), other.scores(i), i) for i in range(len(one.documents)))
    return build_result(one, other, positions, seed)


def become_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all; the parent ends its workers
    torch.set_num_threads(1)


async def divergences(jobs: list[Job], seed: int) -> dict[Job, dict[str, Any]]:
    """Of all that were scored, from their model's reference."""
    references = {job.model: job.folder / SCORES for job in jobs if job.configuration == REFERENCE}
    scored = [job for job in jobs if job.configuration != REFERENCE and (job.folder / SCORES).exists()]
    # Minutes for one process where solutions are many; spawned, since torch's threads do not survive a fork.
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, get_context("spawn"), become_worker) as pool:
        running = {
            job: pool.submit(divergence, references[job.model], job.folder / SCORES, seed)
            for job in scored
            if references[job.model].exists()
        }
        try:
            return {job: await asyncio.wrap_future(future) for job, future in running.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                child.terminate()
            raise


def build_entry(options: argparse.Namespace, job: Job, divergence: dict[str, Any] | None, failure: str | None) -> Any:
    entry = {**job.entry, "phases": phases(job)}
    if divergence is not None:
        entry["divergence"] = divergence
    with suppress(FileNotFoundError):
        entry["gsm8k"] = json.loads((job.folder / ANSWERS).read_text())
    if failure is not None:
        entry["failed"] = failure
    elif not done(job, options):
        entry["failed"] = f"{options.seconds:g} s were over"
    return entry


async def measure(options: argparse.Namespace) -> int:
    cuda = torch.cuda.is_available()
    jobs = build_jobs(options, cuda=cuda)
    measurement = Measurement(options, jobs)
    await measurement.run()
    found, failures = await divergences(jobs, options.seed), measurement.failures
    where = torch.cuda.get_device_name() if cuda else "CPU"
    used = versions.installed()
    result = {
        "machine": f"{where}, {options.engine} {used.get(options.engine, '?')}, torch {torch.__version__}",
        "settings": {name: value for name, value in vars(options).items() if name not in ("models", "out")},
        "versions": used,
        "configurations": [build_entry(options, job, found.get(job), failures.get(job)) for job in jobs],
    }
    write(options.out, result)
    tables = report(result)
    options.out.with_suffix(".md").write_text(tables + "\n")
    print(tables)
    missing = any("failed" in entry for entry in result["configurations"])
    return int(missing or not all(verdicts(result)))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return run_until_signal(measure(options))
    except (InputError, OSError) as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
