"""Compiling on first use: one build for many processes, whole or not at all, and a reason where there is none."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_same_bytes, mixed_magnitudes

import fouroversix_plugin as fos
from fouroversix_plugin import reference
from fouroversix_plugin.kernels import build, cpu

# A process of its own: what is loaded stays loaded.
QUANTIZE = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
import torch
import fouroversix_plugin as fos
x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
print(fos.quantize(x).packed.sum().item(), fos.quantize(x, backend="reference").packed.sum().item())
"""


def start(script: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script], env=variables, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH whose g++ does not optimise: for tests of what is built when, not of how fast it is."""
    folder = tmp_path_factory.mktemp("bin")
    compiler = folder / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def libraries(cache: Path) -> list[str]:
    return [path.name for path in sorted((cache / "fouroversix" / "kernels").iterdir()) if path.suffix != ".lock"]


def test_processes_that_start_at_once_build_more_than_once_or_differ(tmp_path: Path, hasty: str) -> None:
    done = [process.communicate(timeout=300) for process in [start(QUANTIZE, tmp_path, PATH=hasty) for _ in range(3)]]
    assert len({out for out, _ in done}) == 1
    assert len(set(done[0][0].split())) == 1, "other bytes than the reference"
    said = [line for _, err in done for line in err.splitlines()]
    assert sum("compiling the cpu kernels, once for this machine" in line for line in said) == 1, said
    (library,) = libraries(tmp_path)
    assert library.startswith("cpu-")
    assert library.endswith(".so")
    out, err = start(QUANTIZE, tmp_path, PATH=hasty).communicate(timeout=60)
    assert "compiling" not in err, "a second run compiled again"
    assert out == done[0][0]


@pytest.mark.parametrize("path", ["", "/nonexistent"], ids=["empty-path", "no-compiler"])
def test_a_missing_compiler_is_silent_or_changes_bytes(tmp_path: Path, path: str) -> None:
    out, err = start(QUANTIZE, tmp_path, PATH=path).communicate(timeout=60)
    assert len(set(out.split())) == 1
    assert err.count("no compiled cpu kernels, the same bytes come slower: no C++ compiler on the PATH") == 1, err


def test_a_compiler_that_fails_is_silent_or_leaves_something_behind(tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'cpu.cpp:1: error: no such language' >&2\nexit 3\n")
    compiler.chmod(0o755)
    out, err = start(QUANTIZE, tmp_path, PATH=f"{compiler.parent}:/usr/bin:/bin").communicate(timeout=60)
    assert len(set(out.split())) == 1
    assert "g++ failed with status 3: cpu.cpp:1: error: no such language" in err
    assert libraries(tmp_path) == []


def test_a_cache_that_cannot_be_written_stops_the_caller(tmp_path: Path) -> None:
    (tmp_path / "fouroversix").write_text("a file where a directory should be")
    out, err = start(QUANTIZE, tmp_path).communicate(timeout=60)
    assert len(set(out.split())) == 1, err
    assert "no compiled cpu kernels" in err


def test_a_cache_that_may_not_be_looked_into_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's, whose HOME a container kept. Root may look everywhere."""

    def forbidden(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", forbidden)
    monkeypatch.setattr(build, "_path", lambda name, recipe: Path("/home/other/.cache/kernels.so"))
    assert "Permission denied: '/home/other/.cache" in str(build.reason("cpu"))


def test_importing_compiles(tmp_path: Path) -> None:
    script = "import fouroversix_plugin.kernels.ops, fouroversix_plugin as fos; print(fos.backends()['cpu'])"
    out, err = start(script, tmp_path).communicate(timeout=60)
    assert (out.strip(), err) == ("None", "")
    assert not (tmp_path / "fouroversix").exists()


def test_another_source_option_or_torch_keeps_the_old_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def path() -> Path:
        return build._path("cpu", build._recipe("cpu"))

    first = path()
    assert path() == first
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.9")
        assert path() != first
    copy = tmp_path / "csrc"
    copy.mkdir()
    for source in build.csrc().iterdir():
        (copy / source.name).write_bytes(source.read_bytes())
    (copy / "cpu.cpp").write_text((copy / "cpu.cpp").read_text() + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(build, "csrc", lambda: copy)
        assert path() != first
    recipe = build._recipe("cpu")
    other = build._Recipe(recipe.compile, (*recipe.link, "-lm"))
    assert build._path("cpu", other) != first


def test_build_all_says_what_it_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hasty: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", hasty)
    monkeypatch.setattr(build, "_recipe", build._recipe.__wrapped__)
    said: list[str] = []
    found = build.build_all(said.append)
    assert found["cpu"] is None
    assert said[0].startswith("cpu: compiled into ")
    if not torch.cuda.is_available():
        assert found["cuda"] == build.reason("cuda")
        assert said[1] == f"cuda: {found['cuda']}"
    again: list[str] = []
    build.build_all(again.append)
    assert again[0].startswith("cpu: already at ")


@pytest.mark.parametrize("value", ["relative/path", ""], ids=["relative", "empty"])
def test_a_cache_home_that_the_standard_forbids_is_used(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert build.cache_directory() == Path.home() / ".cache" / "fouroversix" / "kernels"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if there were an H200, and CUDA 13.0 to compile for it."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(build, "nvcc", lambda: str(nvcc))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("driver", "runs"), [((12, 9), False), ((13, 0), True), ((14, 1), True), (None, True)])
def test_a_driver_is_given_what_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int] | None, runs: bool
) -> None:
    monkeypatch.setattr(build, "_driver_version", lambda: driver)
    if runs:
        assert build._cuda_recipe().compile
        return
    with pytest.raises(
        build.BuildError, match=r"nvcc is of CUDA 13\.0.*driver, of CUDA 12\.9.*needed a toolkit of CUDA 12"
    ):
        build._cuda_recipe()


@pytest.mark.parametrize(("number", "version"), [(13020, (13, 2)), (12080, (12, 8)), (None, None)])
def test_a_driver_is_misread(
    monkeypatch: pytest.MonkeyPatch, number: int | None, version: tuple[int, int] | None
) -> None:
    class Driver:
        def __init__(self, name: str) -> None:
            if number is None:
                raise OSError(f"{name}: cannot open shared object file")

        def cuDriverGetVersion(self, to: Any) -> int:  # noqa: N802
            to._obj.value = number
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    assert build._driver_version() == version


@pytest.mark.usefixtures("hopper")
def test_options_for_nvcc_in_the_environment_change_arithmetic(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """The host's compiler is chosen there, by conda for one, and nothing else."""
    usual = build._cuda_recipe()
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "--use_fast_math -allow-unsupported-compiler -ccbin=/opt/g++")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-ftz=true")
    asked = build._cuda_recipe()
    host = ("-allow-unsupported-compiler", "-ccbin", "/opt/g++")
    assert asked.compile == tuple((*command, *host) for command in usual.compile)
    assert asked.link == (*usual.link[:1], *host, *usual.link[1:])
    assert "not --use_fast_math -ftz=true" in log.records[-1].message
    unseen = "import os, sys; sys.exit(any(name.startswith('NVCC_') for name in os.environ))"
    build._run([sys.executable, "-c", unseen])
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "-O3 -ccbin")
    with pytest.raises(build.BuildError, match=r"NVCC_PREPEND_FLAGS.*expected one argument"):
        build._cuda_recipe()


def test_architecture_flags_miss_the_instructions_of_the_very_chip() -> None:
    assert build.architecture_flags((9, 0)) == ("-gencode=arch=compute_90a,code=sm_90a",)
    assert build.architecture_flags((10, 0)) == ("-gencode=arch=compute_100a,code=sm_100a",)
    assert build.architecture_flags((8, 6)) == ("-gencode=arch=compute_86,code=sm_86",)


x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one instruction set here")


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Operators of a library whose sources were changed so that it takes one way of several."""

    def make(name: str, isa: str, file: str, changes: Mapping[str, str]) -> Any:
        copy, directory = tmp_path / "csrc", tmp_path / "build"
        directory.mkdir()
        shutil.copytree(build.csrc(), copy)
        source = (copy / file).read_text()
        for old, new in changes.items():
            assert old in source
            source = source.replace(old, new)
        (copy / file).write_text(source)
        monkeypatch.setattr(build, "csrc", lambda: copy)
        recipe = build._cpu_recipe()
        library = f"fouroversix_{name}"
        commands = [tuple(word.replace("fouroversix_cpu", library) for word in command) for command in recipe.compile]
        # Of instruction sets that are not run only names are needed.
        others = {f"-DFOS_ISA={other}" for other in build._ISAS["x86_64"] if other != isa}
        commands = [(*command, "-O0") if others.intersection(command) else command for command in commands]
        torch.ops.load_library(build._compile(build._Recipe(tuple(commands), recipe.link), directory))
        return getattr(torch.ops, library)

    return make


@x86_64
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_an_instruction_set_gives_other_bytes(isa: str, forced: Callable[..., Any]) -> None:
    # Forced by a header that knows no better; the other tests run the best one.
    better = {f"return {name}::kernels;": f"return {isa}::kernels;" for name in ("avx512", "avx2")}
    operators = forced(isa, isa, "cpu.h", better)
    x = mixed_magnitudes(65, 1040, seed=0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = reference.quantize(x.to(dtype), fos.Recipe(), "token")
        packed, scale, decode = operators.quantize(x.to(dtype), None, None, False, 1, 0, 0, True, 1536.0, 0)
        assert_same_bytes(fos.NVFP4Tensor(packed, scale.view(torch.float8_e4m3fn), decode), expected)


@x86_64
@pytest.mark.parametrize(("way", "needed"), [("none", "avx512bw"), ("pairs", "avx512_bf16"), ("tiles", "amx_bf16")])
def test_a_way_to_multiply_bf16_is_off_by_more_than_fp32_rounding(
    way: str, needed: str, forced: Callable[..., Any]
) -> None:
    """Each that the processor has; the other tests run the best one."""
    if f" {needed}" not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {needed}")
    changes = {} if way == "tiles" else {"  return found;": f"  return found, Bf16Products::{way};"}
    operators = forced(way, "avx512", "cpu_bf16.cpp", changes)
    for rows, columns in ((16, 16), (129, 1040), (40, 4112)):
        g = torch.Generator().manual_seed(rows)
        q = fos.quantize(torch.randn(rows, columns, generator=g), granularity="token")
        strips = cpu.to_strips(q.packed, q.block_scale.view(torch.uint8))
        for tokens in (5, 8, 16, 17, 33, 70):
            x = torch.randn(tokens, columns, generator=g).bfloat16()
            y = operators.linear(x, *strips, q.decode_scale, None, None, torch.float32)
            weight = reference.dequantize(q).double()
            error = (y.double() - x.double() @ weight.T).abs()
            assert bool((error <= 1.2e-7 * (columns / 2 + 16) * (x.double().abs() @ weight.abs().T)).all())
