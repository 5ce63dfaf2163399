"""The per-question log: one JSON object a line, the run's settings first. What an interrupted run goes on from."""

import fcntl
import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from gsm8k_data import InputError


class Answer(NamedTuple):
    """What the server gave for one question."""

    question: str
    """The question's id."""
    text: str
    finish_reason: str | None
    output_tokens: int | None
    attempt: int
    """1 for the run's first attempt; each time it is resumed, one more."""
    seconds: float
    """From the start of its attempt until the answer was there."""


class RunLog:
    """Holds a lock while open: two runs cannot write one log."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+", encoding="utf-8")
        try:
            self._lock()
            self._read(settings)
        except BaseException:
            self._file.close()
            raise
        self.attempt = 1 + max((answer.attempt for answer in self.answers.values()), default=0)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, answer: Answer) -> None:
        self.answers[answer.question] = answer
        self._write(answer._asdict())

    def seconds(self) -> float:
        """Wall-clock time of all attempts, each until its last answer."""
        last: dict[int, float] = {}
        for answer in self.answers.values():
            last[answer.attempt] = max(answer.seconds, last.get(answer.attempt, 0.0))
        return sum(last.values())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{self.path} is being written by another run; wait for it, or give another --out"
            ) from error

    def _read(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        whole, _, rest = self._file.read().rpartition("\n")  # rest: what was being written when the run ended
        found: list[Answer] = []
        try:
            if whole:
                first, *others = [json.loads(line) for line in whole.split("\n")]
                logged = first["settings"]
                found = [Answer(**other) for other in others]
            elif rest[: len(_FIRST)] != _FIRST[: len(rest)]:
                raise TypeError("it does not begin with settings")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path} is no log of this script ({error}); move it away or give another --out"
            ) from error
        if whole and logged != settings:
            raise InputError(
                f"{self.path} is of a run with other settings ({_differences(logged, settings)}); {_REMEDY}"
            )
        # Not before: it may be somebody's file.
        if rest:
            self._file.truncate(len((whole + "\n").encode()) if whole else 0)
        if not whole:
            self._write({"settings": settings})
        self.answers = {answer.question: answer for answer in found}

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()


_FIRST = '{"settings": '
_REMEDY = "repeat them to resume it, or give another --out"


def _differences(logged: dict[str, Any], settings: dict[str, Any]) -> str:
    names = sorted(name for name in {*logged, *settings} if logged.get(name) != settings.get(name))
    return "; ".join(f"{name}: {logged.get(name)!r} there, {settings.get(name)!r} here" for name in names)
