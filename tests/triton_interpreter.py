"""Triton's interpreter in a process of its own (``triton_worker.py``): what the tests of Triton's kernels share."""

import atexit
import functools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_kernels import no_cuda

INTERPRETED_OR_CUDA = (
    pytest.param("interpreted", id="interpreted"),
    pytest.param("cuda", id="cuda", marks=[pytest.mark.gpu, no_cuda]),
)


class Interpreted:
    """The backend's functions in the worker process, given and giving CPU tensors."""

    def __init__(self) -> None:
        worker = [sys.executable, str(Path(__file__).with_name("triton_worker.py"))]
        self._process = subprocess.Popen(worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def quantize(self, *arguments: object) -> Any:
        return self.call("quantize", arguments)

    def quantize_values(self, *arguments: object) -> Any:
        return self.call("quantize_values", arguments)

    def dequantize(self, *arguments: object) -> Any:
        return self.call("dequantize", arguments)

    def call(self, name: str, arguments: tuple[object, ...]) -> Any:
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None
        assert answers is not None
        pickle.dump((name, arguments), questions)
        questions.flush()
        result, raised = pickle.load(answers)
        assert raised is None, raised
        return result

    def close(self) -> None:
        self._process.communicate(timeout=20)  # the end of its input ends it


@functools.cache
def interpreted() -> Interpreted:
    """One worker for all tests of this process: it takes seconds to start."""
    worker = Interpreted()
    atexit.register(worker.close)
    return worker
