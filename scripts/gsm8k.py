"""Few-shot GSM8K against any OpenAI-compatible server (vLLM, SGLang), or against one that it starts and stops itself.

python scripts/gsm8k.py --base-url http://127.0.0.1:8000/v1 --data test.jsonl --shots-data train.jsonl --out bf16.json
python scripts/gsm8k.py --serve "vllm serve MODEL --quantization nvfp4_4over6" --data hub --out nvfp4.json
python scripts/gsm8k.py --compare bf16.json nvfp4.json --out comparison.json

Prompts, stop strings and the rules that find the number are those of lm-eval's task gsm8k: the same answers
get the same grades, but for numbers written in two ways (18.0 is 18 here). lm-eval itself, which draws its own examples
(pip install 'fouroversix-plugin[lm-eval]'):

lm_eval --model local-completions --tasks gsm8k --num_fewshot 8 --gen_kwargs max_gen_toks=512 --log_samples \\
  --output_path DIR --model_args model=MODEL,base_url=http://127.0.0.1:8000/v1/completions,num_concurrent=32,\\
tokenizer_backend=None

It takes the questions from the hub, or with --include_path FOLDER from the local files that FOLDER/gsm8k.yaml names
(its first line is the path of the installed task; first_n: the first examples of the file, the same for all questions,
instead of random ones):

include: /.../site-packages/lm_eval/tasks/gsm8k/gsm8k.yaml
task: gsm8k
dataset_path: json
dataset_name: null
dataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}
fewshot_config: {sampler: first_n}

A run that was interrupted goes on where it was when the same command is given again: answers are logged as they come,
to OUT.jsonl beside OUT.json. Exit status: 0, 1 for an error or for requests that failed, 2 for wrong usage, 128 + the
signal that ended it.
"""

import argparse
import json
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import gsm8k_compare
import versions
from argument_types import natural, not_negative, positive, seconds
from gsm8k_answers import STOPS, Grade, grade
from gsm8k_data import InputError, Prompt, Question, build_prompt, digest, draw, draw_shots, is_on_hub, load_questions
from gsm8k_log import Answer, RunLog
from gsm8k_statistics import CONFIDENCE, standard_error, wilson
from server_client import Client, RequestError, ServerError, run_together
from server_process import run_until_signal, serving
from tqdm import tqdm

# So many requests that failed one after another, each after its retries, mean that the server is gone.
FAILURES_IN_A_ROW = 16


class Task(NamedTuple):
    question: Question
    prompt: Prompt


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to measure").add_mutually_exclusive_group(required=True)
    what.add_argument("--base-url", metavar="URL", help="a server that runs, as http://127.0.0.1:8000/v1")
    what.add_argument(
        "--serve", metavar="COMMAND", help="start this server (on a free port if it names none), stop it after"
    )
    what.add_argument("--compare", nargs="+", type=Path, metavar="JSON", help="results to compare, the baseline first")
    parser.add_argument(
        "--data", metavar="FILE|hub", help="JSONL of question and answer; hub: openai/gsm8k; hub:OWNER/NAME"
    )
    parser.add_argument(
        "--shots-data", metavar="FILE|hub", help="where the examples come from (hub: its training split)"
    )
    parser.add_argument("--num-shots", type=natural, default=8, metavar="N", help="examples in the prompt (8)")
    parser.add_argument("--num-questions", type=positive, metavar="N", help="a sample drawn with --seed (all)")
    parser.add_argument(
        "--seed", type=int, default=0, help="draws questions and examples, and is sent to the server (0)"
    )
    parser.add_argument("--parallel", type=positive, default=32, metavar="N", help="requests at a time (32)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--chat", action="store_true", help="/v1/chat/completions, the examples as turns")
    mode.add_argument("--completion", dest="chat", action="store_false", help="/v1/completions (default)")
    parser.add_argument("--max-tokens", type=positive, default=512, metavar="N", help="of an answer (512)")
    parser.add_argument("--temperature", type=not_negative, default=0.0, help="(0)")
    parser.add_argument("--model", help="which model, where the server has several")
    parser.add_argument("--timeout", type=seconds, default=600, metavar="SECONDS", help="of one request (600)")
    parser.add_argument("--retries", type=natural, default=6, metavar="N", help="of one request, with back-off (6)")
    parser.add_argument("--serve-timeout", type=seconds, default=1200, metavar="SECONDS", help="to get ready (1200)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="results; with --compare also FILE.png")
    options = parser.parse_args(arguments)
    if options.compare is None and (options.data is None or options.out is None):
        parser.error("--base-url and --serve need --data and --out")
    if options.compare is not None and len(options.compare) < 2:
        parser.error("--compare needs two results or more")
    if options.out is not None and options.out.suffix != ".json":
        parser.error(f"--out {options.out}: needs a name that ends in .json")
    return options


def build_tasks(options: argparse.Namespace) -> list[Task]:
    questions = draw(load_questions(options.data, "test"), options.num_questions, options.seed)
    shots: list[Question] = []
    if options.num_shots:
        source = options.shots_data or ("hub" if is_on_hub(options.data) else None)
        if source is None:
            raise InputError(
                f"--num-shots {options.num_shots} needs --shots-data: --data is a file of questions to ask"
            )
        shots = draw_shots(load_questions(source, "train"), options.num_shots, options.seed, questions)
    return [Task(question, build_prompt(shots, question, chat=options.chat)) for question in questions]


class Evaluation:
    """The questions that the log does not hold yet, asked ``parallel`` at a time."""

    def __init__(self, client: Client, model: str, options: argparse.Namespace, log: RunLog, tasks: list[Task]) -> None:
        self._client, self._model, self._options, self._log = client, model, options, log
        self._tasks = iter([task for task in tasks if task.question.id not in log.answers])
        self._gold = {task.question.id: task.question.gold for task in tasks}
        self._start = time.monotonic()
        self._in_a_row = 0
        self.failures: dict[str, str] = {}
        self._correct = sum(grade(answer.text, self._gold[id]).correct for id, answer in log.answers.items())
        # A bar that rewrites itself belongs on a terminal only.
        self._bar = tqdm(total=len(tasks), initial=len(log.answers), unit="question", disable=not sys.stderr.isatty())

    async def run(self) -> None:
        with self._bar:
            await run_together(self._work() for _ in range(self._options.parallel))

    async def _work(self) -> None:
        for task in self._tasks:
            try:
                answer = await self._ask(task)
            except RequestError as error:
                self.failures[task.question.id] = str(error)
                self._in_a_row += 1
                if self._in_a_row >= FAILURES_IN_A_ROW:
                    raise ServerError(f"{self._in_a_row} requests in a row failed, the last: {error}") from error
                continue
            self._in_a_row = 0
            self._log.add(answer)
            self._correct += grade(answer.text, task.question.gold).correct
            self._bar.update()
            self._bar.set_postfix(accuracy=f"{self._correct / len(self._log.answers):.3f}")

    async def _ask(self, task: Task) -> Answer:
        chat = isinstance(task.prompt, list)
        body = {
            "model": self._model,
            "messages" if chat else "prompt": task.prompt,
            "max_tokens": self._options.max_tokens,
            "temperature": self._options.temperature,
            "seed": self._options.seed,
            "stop": list(STOPS),
        }
        reply = await self._client.post("chat/completions" if chat else "completions", body)
        try:
            choice = reply["choices"][0]
            # A chat's content is null where all tokens went into the reasoning.
            text = (choice["message"]["content"] or "") if chat else choice["text"]
            tokens = (reply.get("usage") or {}).get("completion_tokens")
        except (LookupError, TypeError, AttributeError) as error:
            raise RequestError(f"an answer without text: {json.dumps(reply)[:300]}") from error
        if not isinstance(text, str):
            raise RequestError(f"an answer whose text is {type(text).__name__}, needed a string")
        seconds = time.monotonic() - self._start
        return Answer(task.question.id, text, choice.get("finish_reason"), tokens, self._log.attempt, seconds)


def summarize(tasks: list[Task], log: RunLog) -> dict[str, Any]:
    """The figures, over the questions that were answered; failed requests are counted apart."""
    rows: list[dict[str, Any]] = []
    grades: list[Grade] = []
    for question, _ in tasks:
        answer = log.answers.get(question.id)
        row: dict[str, Any] = {"question": question.id, "gold": question.gold, "outcome": "failed"}
        if answer is not None:
            graded = grade(answer.text, question.gold)
            grades.append(graded)
            outcome = "correct" if graded.correct else "invalid" if graded.invalid else "wrong"
            found = {"strict": graded.strict, "flexible": graded.flexible, "strict_correct": graded.strict_correct}
            row |= {"outcome": outcome, **found, "finish_reason": answer.finish_reason}
        rows.append(row)
    n = len(grades)
    if not n:
        raise ServerError("no question was answered")
    given = [answer.output_tokens for answer in log.answers.values()]
    tokens = sum(count for count in given if count is not None) if None not in given else None
    seconds = log.seconds()
    correct = sum(graded.correct for graded in grades)
    strictly = sum(graded.strict_correct for graded in grades)
    return {
        "accuracy": correct / n,
        "standard_error": standard_error(correct, n),
        "confidence": CONFIDENCE,
        "confidence_interval": wilson(correct, n),
        "strict_accuracy": strictly / n,
        "strict_standard_error": standard_error(strictly, n),
        "strict_confidence_interval": wilson(strictly, n),
        "invalid": sum(graded.invalid for graded in grades) / n,
        "answered": n,
        "failed": len(tasks) - n,
        "cut_off": sum(row.get("finish_reason") == "length" for row in rows),
        "latency_seconds": seconds,
        "output_tokens": tokens,
        "output_throughput": tokens / seconds if tokens is not None and seconds else None,
        "answers": rows,
    }


def report(result: dict[str, Any]) -> str:
    low, high = result["confidence_interval"]
    strict_low, strict_high = result["strict_confidence_interval"]
    throughput = result["output_throughput"]
    lines = [
        f"Accuracy: {result['accuracy']:.3f} (standard error {result['standard_error']:.3f}, "
        f"95 % interval {low:.3f} to {high:.3f})",
        f"Accuracy, strict rule: {result['strict_accuracy']:.3f} (95 % interval {strict_low:.3f} to {strict_high:.3f})",
        f"Invalid: {result['invalid']:.3f}",
        f"Cut off at {result['settings']['max_tokens']} tokens: {result['cut_off']} of {result['answered']}",
        f"Latency: {result['latency_seconds']:.3f} s",
        "Output throughput: " + ("not counted by the server" if throughput is None else f"{throughput:.3f} token/s"),
    ]
    return "\n".join(lines)


def settings_of(options: argparse.Namespace, tasks: list[Task], mode: str, temperature: float) -> dict[str, Any]:
    """What is asked, and how: what answers must have in common to be of one run."""
    return {
        "data": options.data,
        "shots_data": options.shots_data,
        "num_shots": options.num_shots,
        "num_questions": len(tasks),
        "seed": options.seed,
        "mode": mode,
        "max_tokens": options.max_tokens,
        "temperature": temperature,
        "stop": list(STOPS),
        "prompt_sha256": digest([task.prompt for task in tasks]),
    }


async def evaluate(options: argparse.Namespace) -> int:
    tasks = build_tasks(options)
    async with AsyncExitStack() as stack:
        server = None
        if options.serve is not None:
            print(f"starting: {options.serve}", file=sys.stderr)
            server = await stack.enter_async_context(
                serving(options.serve, options.out.with_suffix(".server.log"), options.serve_timeout)
            )
        client = await stack.enter_async_context(
            Client(
                server.base_url if server else options.base_url,
                timeout=options.timeout,
                retries=options.retries,
                check_alive=server.check_alive if server else lambda: None,
            )
        )
        facts = await client.describe(options.model)
        settings = {
            **settings_of(options, tasks, "chat" if options.chat else "completion", options.temperature),
            "server": facts._asdict(),
            # The port of a server that is started here differs from run to run; its command does not.
            **({"serve": options.serve} if server else {"base_url": client.base_url}),
        }
        log = stack.enter_context(RunLog(options.out.with_suffix(".jsonl"), settings))
        if log.answers:
            print(f"resuming: {log.path} holds {len(log.answers)} of {len(tasks)} answers", file=sys.stderr)
        evaluation = Evaluation(client, facts.model, options, log, tasks)
        await evaluation.run()
        result = {"settings": settings, "versions": versions.installed(), **summarize(tasks, log)}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(report(result))
    if evaluation.failures:
        some = next(iter(evaluation.failures.values()))
        raise ServerError(
            f"{len(evaluation.failures)} of {len(tasks)} requests failed and are not in these figures. One: {some}\n"
            "Give the same command again to ask only them."
        )
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.compare:
            gsm8k_compare.compare(options.compare, options.out)
            return 0
        return run_until_signal(evaluate(options))
    except (InputError, ServerError, OSError) as error:
        print(f"gsm8k: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
