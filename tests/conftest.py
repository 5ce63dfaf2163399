"""What several test files share: the golden data, every recipe, and how results are compared."""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import hypothesis
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import ErrorDomain, Metric, Recipe, ScaleMax

# One thread: where other processes keep the cores busy, OpenMP's threads wait for one another at the end of every tiny
# operation, and a test of a millisecond takes a second.
torch.set_num_threads(1)

pytest.register_assert_rewrite("engines")

# The same examples in every run, so that a red test means a change of the code; no deadline, for the reason above.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seconds", type=float, default=1800, help="that tests of engines on GPUs wait for all their runs together"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Where two files run at a time, what takes longest must not be left for one of them to end with.
    items.sort(key=lambda item: item.path.name != "test_vllm.py")


Left = Callable[..., float]
"""Seconds that are left of those for all runs, and the ``more`` that are asked for."""


@pytest.fixture(scope="module")
def left(request: pytest.FixtureRequest) -> Left:
    deadline = time.monotonic() + float(request.config.getoption("--seconds"))
    return lambda more=0: max(0.1, deadline + more - time.monotonic())


GOLDEN = ROOT.parent / "shared" / "golden"

RECIPES = [
    Recipe(metric, scale_max, adaptive, error)
    for metric, scale_max, adaptive, error in itertools.product(
        get_args(Metric), get_args(ScaleMax), (True, False), get_args(ErrorDomain)
    )
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def golden_cases() -> list[Any]:
    """Parameters, one a golden case; a single skipped one where the data is absent."""
    listing = GOLDEN / "nvfp4_4over6.json"
    if not listing.is_file():
        reason = f"no golden data: {listing} does not exist (it lies beside the repository, not in it)"
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(case, id=case["case"]) for case in json.loads(listing.read_text())]


@pytest.fixture(scope="session")
def golden() -> Mapping[str, Tensor]:
    """The golden tensors by name: inputs, and the bytes and decode scales of every case."""
    path = GOLDEN / "nvfp4_4over6.safetensors"
    if not path.is_file():
        pytest.skip(f"no golden data: {path} does not exist (it lies beside the repository, not in it)")
    return load_file(path)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the package logs, also where a test before registered the plugin: its lines then go to vLLM's logger."""
    monkeypatch.setattr(logging.getLogger("fouroversix_plugin"), "parent", logging.getLogger())
    caplog.set_level(logging.INFO, logger="fouroversix_plugin")
    return caplog


def raw(tensor: Tensor) -> Tensor:
    """The tensor's bytes, [..., bytes of an element]: NaN equals NaN, and -0.0 is not 0.0."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)


def repeated(calls: Callable[[], list[Any]], captured: bool, times: int = 10) -> Iterator[list[Any]]:
    """What ``calls`` returns each time, on a CUDA stream of its own; ``captured``: as a graph that is replayed."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = calls()  # what a first call sets up cannot be captured
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                found = calls()
        for _ in range(times):
            if captured:
                graph.replay()
            else:
                found = calls()
            torch.cuda.synchronize()
            yield found


def assert_same_tensor(what: str, actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    differs = (raw(actual) != raw(expected)).any(dim=-1)
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        got, needed = raw(actual)[first].tolist(), raw(expected)[first].tolist()
        pytest.fail(f"{what}: {int(differs.sum())} of {differs.numel()} differ, first at {first}: {got} != {needed}")


def assert_same_bytes(actual: NVFP4Tensor, expected: NVFP4Tensor) -> None:
    """Codes, block scales and decode scales, byte for byte."""
    for part in ("decode_scale", "block_scale", "packed"):
        assert_same_tensor(part, getattr(actual, part), getattr(expected, part))


def calc_diff(actual: Tensor, expected: Tensor) -> float:
    """1 - 2<x, y> / (|x|² + |y|²): 0 for equal tensors, and unlike a cosine not blind to a wrong scale."""
    x, y = actual.double(), expected.double()
    return 1 - (2 * (x * y).sum() / (x.square() + y.square()).sum()).item()


def mean_ratio(actual: Tensor, expected: Tensor) -> float:
    """Mean magnitude of ``actual`` over that of ``expected``: a scale that is off by a factor shows as the factor."""
    return (actual.double().abs().mean() / expected.double().abs().mean()).item()


def assert_close(actual: Tensor, expected: Tensor, diff: float, ratio: float) -> None:
    """calc_diff at most ``diff`` and the mean ratio within ``ratio`` of 1."""
    assert actual.shape == expected.shape
    got = calc_diff(actual, expected), mean_ratio(actual, expected)
    assert got[0] <= diff, f"calc_diff {got[0]:.3g} above {diff:.3g} (mean ratio {got[1]:.6f})"
    assert abs(got[1] - 1) <= ratio, f"mean ratio {got[1]:.6f} off by more than {ratio:.3g} (calc_diff {got[0]:.3g})"


def mixed_magnitudes(rows: int, columns: int, seed: int, spread: int = 12) -> Tensor:
    """fp32 normal values whose blocks of 16 differ in magnitude by up to 2^(2 * spread)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    exponents = torch.randint(-spread, spread + 1, (rows, columns // 16), generator=generator)
    return values * torch.exp2(exponents.float()).repeat_interleave(16, dim=1)


@pytest.fixture(scope="session")
def models() -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct in BF16, dense and as a mixture of experts (first use builds them: half a minute)."""
    import demo_model

    cache = demo_model.DEFAULT_CACHE
    return demo_model.dense(cache), demo_model.moe(cache)
