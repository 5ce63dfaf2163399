"""Numbers on the command line, refused outside their range."""

import argparse
import math


def natural(text: str) -> int:
    return int(_at_least(0, int(text)))


def positive(text: str) -> int:
    return int(_at_least(1, int(text)))


def not_negative(text: str) -> float:
    return _at_least(0, float(text))


def seconds(text: str) -> float:
    return _at_least(0.001, float(text))


def _at_least(least: float, value: float) -> float:
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {value}, needs {least} or more")
    return value
