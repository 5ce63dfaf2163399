"""What scripts take from the command line, refused where it would fail later, after the work."""

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import Any


def natural(text: str) -> int:
    return int(_at_least(0, int(text)))


def positive(text: str) -> int:
    return int(_at_least(1, int(text)))


def not_negative(text: str) -> float:
    return _at_least(0, float(text))


def seconds(text: str) -> float:
    return _at_least(0.001, float(text))


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"got {type(found).__name__}, needs a JSON object: {text}")
    return found


def output(text: str) -> Path:
    """A file to write when the work is done."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, needs the name of a file")
    return path


def plot(text: str) -> Path:
    """The same for a picture."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib")
    return output(text)


def _at_least(least: float, value: float) -> float:
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {value}, needs {least} or more")
    return value
