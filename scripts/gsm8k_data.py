"""GSM8K's questions, and the few-shot prompts made of them."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gsm8k_answers import gold_answer

HUB_DATASET = "openai/gsm8k"

Message = dict[str, str]
Prompt = str | list[Message]


class InputError(ValueError):
    """What was asked for cannot be done: what, where, got, needed, what to do."""


class Question(NamedTuple):
    text: str
    solution: str
    """The reasoning and, after ``####``, the number."""
    gold: str

    @property
    def id(self) -> str:
        return digest(self.text)[:16]


def digest(value: object) -> str:
    """SHA-256 of a JSON value, the same for the same value on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_on_hub(source: str) -> bool:
    return source == "hub" or source.startswith("hub:")


def load_questions(source: str, split: str) -> list[Question]:
    """The questions of a JSONL file, or of a data set on the hub: ``hub`` (openai/gsm8k) or ``hub:OWNER/NAME``."""
    if is_on_hub(source):
        name = source.removeprefix("hub").removeprefix(":") or HUB_DATASET
        return _questions(_rows_of_hub(name, split), f"{name}, split {split}, row")
    return _questions(_rows_of_file(Path(source)), f"{source}, line")


def draw(questions: Sequence[Question], count: int | None, seed: int) -> list[Question]:
    """``count`` questions (all for None) in an order that the seed fixes. A smaller count is the start of a larger."""
    if count is not None and not 0 < count <= len(questions):
        raise InputError(f"number of questions {count}: needs 1 to {len(questions)}, what the data holds")
    return random.Random(seed).sample(questions, len(questions))[:count]


def draw_shots(examples: Sequence[Question], count: int, seed: int, asked: Iterable[Question]) -> list[Question]:
    """``count`` examples that are none of the questions asked."""
    ids = {question.id for question in asked}
    others = [example for example in examples if example.id not in ids]
    if count > len(others):
        raise InputError(
            f"number of shots {count}: the data holds only {len(others)} examples that are not asked themselves; "
            "lower --num-shots, or name other examples with --shots-data"
        )
    return random.Random(seed).sample(others, count)


def build_prompt(shots: Sequence[Question], question: Question, *, chat: bool) -> Prompt:
    """lm-eval's prompt for its task gsm8k; for chats, the examples are turns, as with its --fewshot_as_multiturn."""
    asked = f"Question: {question.text}\nAnswer:"
    if not chat:
        examples = (f"Question: {shot.text}\nAnswer: {shot.solution}\n\n" for shot in shots)
        return "".join(examples) + asked
    turns: list[Message] = []
    for shot in shots:
        turns.append({"role": "user", "content": f"Question: {shot.text}\nAnswer:"})
        turns.append({"role": "assistant", "content": shot.solution})
    return [*turns, {"role": "user", "content": asked}]


def _rows_of_file(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() also splits inside strings, at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); needs a JSONL file of question and answer") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}): {line[:80]!r}") from error
    return rows


def _rows_of_hub(name: str, split: str) -> list[Any]:
    try:
        import datasets
    except ImportError as error:
        raise InputError("--data hub needs the package datasets: pip install datasets, or give a JSONL file") from error
    try:
        return list(datasets.load_dataset(name, "main", split=split))
    except (OSError, ValueError) as error:  # What the library raises without a network, a name or a split.
        raise InputError(f"the data set {name}, split {split}, cannot be loaded from the hub: {error}") from error


def _questions(rows: Iterable[Any], where: str) -> list[Question]:
    found: dict[str, Question] = {}
    for number, row in enumerate(rows, 1):
        place = f"{where} {number}"
        if not isinstance(row, Mapping):
            raise InputError(f"{place}: got {type(row).__name__}, needed an object with question and answer")
        for key in ("question", "answer"):
            if not isinstance(row.get(key), str):
                raise InputError(f"{place}: {key!r} is {row.get(key)!r}, needed a string (keys here: {sorted(row)})")
        gold = gold_answer(row["answer"])
        if gold is None:
            raise InputError(f"{place}: no number after '####' in the answer {row['answer'][-60:]!r}")
        question = Question(row["question"], row["answer"], gold)
        if question.id in found:
            raise InputError(f"{place}: the question is there twice: {row['question'][:80]!r}")
        found[question.id] = question
    if not found:
        raise InputError(f"{where.rpartition(',')[0]}: no question in it")
    return list(found.values())
