"""Runs the Triton kernels on CPU tensors by Triton's interpreter, for tests, in a process of its own.

Triton decides whether kernels are compiled or interpreted where they are decorated, those of its own library when it is
first imported. Within the tests' process, where others compile kernels and vLLM imports Triton, that would be whatever
came first; here the variable is set before anything is imported, and nobody else sees it.

Standard input has pickled (function of one of the backend's modules, its arguments), standard output what it returned
or the text of what it raised: (result, None) or (None, text).
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pickle
import sys
import traceback
from typing import Any

import numpy as np
import torch

from fouroversix_plugin.kernels import triton, triton_gemm

_matmul = np.matmul


def matmul(a: Any, b: Any, dtype: Any) -> Any:
    """numpy's, summed in fp64: its fp32 sums depend on where in a matrix a row lies, on some processors."""
    return _matmul(a, b, dtype=np.float64).astype(dtype)


def main() -> None:
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # infinities and NaN are meant
    np.matmul = matmul
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(triton if hasattr(triton, name) else triton_gemm, name)(*arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
