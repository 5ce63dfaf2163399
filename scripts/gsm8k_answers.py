"""The number in an answer, by the rules of lm-eval's task gsm8k (version 3): strict and flexible."""

import re
from decimal import Decimal
from typing import NamedTuple

STOPS = ("Question:", "</s>", "<|im_end|>")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NUMBER = re.compile(r"-?([0-9]+(\.[0-9]+)?|\.[0-9]+)")


class Grade(NamedTuple):
    """What was found in an answer by either rule, and whether it is the gold number."""

    strict: str | None
    flexible: str | None
    strict_correct: bool
    correct: bool
    invalid: bool
    """The flexible rule found nothing, or nothing that is a number. Not correct, and not a wrong number either."""


def cut(text: str) -> str:
    """The text before the first stop string, wherever the server ended it."""
    return text[: min((place for stop in STOPS if (place := text.find(stop)) >= 0), default=len(text))]


def strict(text: str) -> str | None:
    """The first number after ``####``."""
    found = STRICT.search(text)
    return found[1] if found else None


def flexible(text: str) -> str | None:
    """The last thing that looks like a number."""
    found = FLEXIBLE.findall(text)
    return found[-1][0] or found[-1][1] if found else None


def number(text: str | None) -> Decimal | None:
    """The value, without dollar signs, thousands separators and a sentence's full stop; None if there is none.

    lm-eval drops the same characters and compares what is left as text: there 18.0 is not 18.
    """
    bare = re.sub(r"[$,]", "", text or "").rstrip(".")
    return Decimal(bare) if NUMBER.fullmatch(bare) else None


def gold_answer(solution: str) -> str | None:
    """What stands after ``####`` (or all of it, where a set gives only the number); None if that is no number."""
    answer = solution.rpartition("####")[2].strip()
    return answer if number(answer) is not None else None


def grade(text: str, gold: str) -> Grade:
    """Grade a server's text against a gold answer."""
    kept = cut(text)
    by_strict, by_flexible = strict(kept), flexible(kept)
    wanted, value = number(gold), number(by_flexible)
    return Grade(by_strict, by_flexible, number(by_strict) == wanted, value == wanted, value is None)
