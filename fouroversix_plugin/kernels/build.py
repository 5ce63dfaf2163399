"""Compile ``csrc`` on first use, keep it, load it.

A library is compiled once for a machine: by the first process that needs it, while others that start at the same time
wait for it (a file lock), and it appears whole or not at all (a rename). It lies in the user's cache directory under a
key made of the sources, the compilers' options, the architectures and torch's version. Importing compiles nothing.

Where it cannot be compiled, :func:`load` says why, once in the log; whoever asked computes the same bytes another way.
The environment chooses where things lie (``XDG_CACHE_HOME``, ``CUDA_HOME``, ``PATH``), never what is computed.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

logger = logging.getLogger(__name__)

Name = Literal["cpu", "cuda"]
NAMES: Final[tuple[Name, ...]] = ("cpu", "cuda")

# The stable ABI as of the oldest torch we support: one binary would serve all later ones.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020B000000000000"
_CPP = ("-std=c++20", "-O3", "-fPIC")
# No fused multiply-add, nothing reordered. The last two only drop errno and floating-point exceptions, which nobody
# reads, and let the compiler turn branches into selections.
_STRICT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_TILES = ("-mamx-tile", "-mamx-bf16")
_ISAS: Final = {
    "x86_64": {"baseline": (), "avx2": ("-mavx2", "-mfma"), "avx512": (*_AVX512, *_TILES)},
}
NVCC_STRICT: Final = ("-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false")
_CUDA_DTYPES: Final = ("bf16", "fp16", "fp32")
_NVCC_OPTIONS: Final = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
LEAST_CAPABILITY: Final = (8, 0)
HOPPER: Final = (9, 0)


class BuildError(RuntimeError):
    """A library cannot be compiled or loaded; the message says why."""


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How one library is made: commands that make objects side by side, and the one that links them."""

    compile: tuple[tuple[str, ...], ...]
    link: tuple[str, ...]


def csrc() -> Path:
    """Where the sources lie: in the package once installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def cache_directory() -> Path:
    """Where libraries are kept, whether it is there yet or not.

    Raises:
        BuildError: the user has no home, and XDG_CACHE_HOME names no place.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise BuildError(f"nowhere to keep compiled kernels: {error}; set XDG_CACHE_HOME") from error
    return cache / "fouroversix" / "kernels"


def reason(name: Name) -> str | None:
    """Why the library ``name`` is not to be had here, or None. Compiles nothing and loads nothing."""
    if name in _failures:
        return _failures[name]
    try:
        path = _path(name, _recipe(name))
        directory = _first_existing(path.parent)
        if path.exists() or os.access(directory, os.W_OK):
            return None
    except (BuildError, OSError) as error:
        return str(error)
    return f"{directory} is not writable, so there is nowhere to keep compiled kernels"


def load(name: Name) -> str | None:
    """Have the operators of ``torch.ops.fouroversix_<name>``: compile them if nobody has yet, load them once.

    Returns:
        None, or the reason why they are not to be had: said once in the log, and for good in this process.
    """
    if name in _loaded:
        return None
    with _lock:
        if name not in _loaded and name not in _failures:
            try:
                path = _path(name, _recipe(name))
                build(name, path)
                torch.ops.load_library(path)
                _loaded.add(name)
            except (BuildError, OSError) as error:
                _failures[name] = str(error)
                logger.warning("fouroversix: no compiled %s kernels, the same bytes come slower: %s", name, error)
        return _failures.get(name)


def build_all(progress: Callable[[str], None]) -> dict[Name, str | None]:
    """Compile whatever this machine can use, telling ``progress`` line by line.

    Returns:
        For every library None, or the reason why it cannot be compiled here.
    """
    found: dict[Name, str | None] = {}
    for name in NAMES:
        try:
            path = _path(name, _recipe(name))
            compiled = build(name, path)
        except (BuildError, OSError) as error:
            found[name] = str(error)
            progress(f"{name}: {error}")
        else:
            found[name] = None
            progress(f"{name}: {'compiled into' if compiled else 'already at'} {path}")
    return found


def build(name: Name, path: Path) -> bool:
    """Make ``path``; False where it was there already, made by any process."""
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if path.exists():
            return False
        logger.info("fouroversix: compiling the %s kernels, once for this machine, into %s", name, path)
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.stem}.") as directory:
            made = _compile(_recipe(name), Path(directory))
            made.replace(path)
        logger.info("fouroversix: compiled the %s kernels in %.0f s", name, time.monotonic() - started)
    return True


_lock = threading.Lock()
_loaded: set[Name] = set()
_failures: dict[Name, str] = {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among all processes of this machine; the kernel lets go for one that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(recipe: _Recipe, directory: Path) -> Path:
    objects = [str(directory / f"{index}.o") for index in range(len(recipe.compile))]
    commands = [(*command, "-o", target) for command, target in zip(recipe.compile, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    library = directory / "library.so"
    _run((*recipe.link[:1], *objects, *recipe.link[1:], "-o", str(library)))
    return library


def _run(command: Sequence[str]) -> None:
    # nvcc adds what it finds there to its options, and they could ask for other arithmetic.
    environment = {name: value for name, value in os.environ.items() if name not in _NVCC_OPTIONS}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        first = next((line for line in said if "error" in line.lower()), said[-1] if said else "no message")
        raise BuildError(f"{Path(command[0]).name} failed with status {done.returncode}: {first.strip()}")


def _path(name: Name, recipe: _Recipe) -> Path:
    """Where the library lies: its name holds everything that could change what is in it."""
    digest = hashlib.sha256()
    for source in sorted(csrc().iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for word in (
        torch.__version__,
        platform.machine(),
        *recipe.link,
        *(word for line in recipe.compile for word in line),
    ):
        digest.update(word.encode() + b"\0")
    return cache_directory() / f"{name}-{digest.hexdigest()[:24]}.so"


def _first_existing(path: Path) -> Path:
    return path if path.exists() else _first_existing(path.parent)


@functools.cache
def _recipe(name: Name) -> _Recipe:
    if not (csrc() / "nvfp4.cuh").is_file():
        raise BuildError(f"the sources are missing: no {csrc() / 'nvfp4.cuh'}")
    return _cpu_recipe() if name == "cpu" else _cuda_recipe()


def _torch_flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Options to compile against this torch, and to link."""
    root = Path(torch.__file__).parent
    return (_TORCH_TARGET, "-isystem", str(root / "include")), (f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")


def _cpu_recipe() -> _Recipe:
    compiler = next((path for path in map(shutil.which, ("g++", "clang++", "c++")) if path), None)
    if compiler is None:
        raise BuildError("no C++ compiler on the PATH: none of g++, clang++, c++")
    include, libraries = _torch_flags()
    kernels = [
        (compiler, *_CPP, *_STRICT, *flags, f"-DFOS_ISA={isa}", "-c", str(csrc() / source))
        for isa, flags in _ISAS.get(platform.machine(), {"baseline": ()}).items()
        for source in ("cpu.cpp", "cpu_linear.cpp", "cpu_bf16.cpp")
    ]
    bindings = [
        (compiler, *_CPP, *include, "-DFOS_LIBRARY=fouroversix_cpu", "-DFOS_KEY=CPU", "-c", str(csrc() / source))
        for source in ("bindings.cpp", "bindings_cpu.cpp")
    ]
    return _Recipe((*kernels, *bindings), (compiler, "-shared", *libraries))


def nvcc() -> str:
    """CUDA's compiler, or BuildError."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    candidates = (*(f"{home}/bin/nvcc" for home in homes), "nvcc")
    found = next((path for path in map(shutil.which, candidates) if path), None)
    if found is None:
        raise BuildError("no nvcc: neither in CUDA_HOME or /usr/local/cuda nor on the PATH")
    return found


def _check_driver(compiler: str) -> None:
    """Raises BuildError where the driver is of an older major version of CUDA than ``compiler``: no call would work."""
    said = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    toolkit, driver = re.search(r"release (\d+)\.(\d+)", said.stdout), _driver_version()
    if toolkit is not None and driver is not None and int(toolkit[1]) > driver[0]:
        raise BuildError(
            f"{compiler} is of CUDA {toolkit[1]}.{toolkit[2]}, and the driver, of CUDA {driver[0]}.{driver[1]}, runs "
            f"nothing of a newer major version: needed a toolkit of CUDA {driver[0]} (CUDA_HOME names one), or a newer "
            "driver"
        )


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows, or None where it does not say."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    failed = driver.cuDriverGetVersion(ctypes.byref(version))
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def _host_compiler() -> tuple[str, ...]:
    """nvcc's options for the host's compiler, where the environment gives some, as conda and distributions do."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-ccbin", "--compiler-bindir")
    parser.add_argument("-allow-unsupported-compiler", "--allow-unsupported-compiler", action="store_true")
    try:
        words = [word for name in _NVCC_OPTIONS for word in shlex.split(os.environ.get(name, ""))]
        found, others = parser.parse_known_args(words)
    except (argparse.ArgumentError, ValueError) as error:
        raise BuildError(f"{' or '.join(_NVCC_OPTIONS)}: {error}") from error
    if others:
        names = " and ".join(_NVCC_OPTIONS)
        logger.info("fouroversix: of %s only the host's compiler counts, not %s", names, shlex.join(others))
    options = ("-allow-unsupported-compiler",) if found.allow_unsupported_compiler else ()
    return options if found.compiler_bindir is None else (*options, "-ccbin", found.compiler_bindir)


def architecture_flags(capability: tuple[int, int]) -> tuple[str, ...]:
    """nvcc's options for machine code of a compute capability, with what is only in that very chip from 9.0 on."""
    number = f"{capability[0]}{capability[1]}{'a' if capability >= (9, 0) else ''}"
    return (f"-gencode=arch=compute_{number},code=sm_{number}",)


def kernel_commands(compiler: str, architectures: Sequence[tuple[int, int]]) -> list[tuple[str, ...]]:
    """Commands that compile ``quantize.cu``, one for each dtype of the input; they lack only ``-o``."""
    machine = tuple(flag for capability in architectures for flag in architecture_flags(capability))
    common = (compiler, "-std=c++20", "-O3", "-Xcompiler=-fPIC", *NVCC_STRICT, *machine)
    return [(*common, f"-DFOS_DTYPE={dtype}", "-c", str(csrc() / "quantize.cu")) for dtype in _CUDA_DTYPES]


def product_commands(compiler: str) -> list[tuple[str, ...]]:
    """Commands that compile the products for Hopper, the only chip they are for; they lack only ``-o``."""
    common = (compiler, "-std=c++20", "-O3", "-Xcompiler=-fPIC", *NVCC_STRICT, *architecture_flags(HOPPER), "-c")
    outputs = {"gemm": ("linear", "gated", "fp32"), "few": ("linear", "gated", "fp32"), "slices": ("linear",)}
    kernels = [
        (*common, str(csrc() / f"{source}_sm90.cu"), f"-DFOS_DTYPE={dtype}", f"-DFOS_OUTPUT={output}")
        for source in outputs
        for dtype in ("bf16", "fp16")
        for output in outputs[source]
    ]
    return [
        *kernels,
        *(
            (*common, str(csrc() / source))
            for source in ("tiles_sm90.cu", "experts.cu", "chip_sm90.cu", "launch_sm90.cpp")
        ),
    ]


def too_old(capability: tuple[int, int]) -> str:
    """Of the oldest GPU that is visible: kernels are for all of them."""
    hide = "" if torch.cuda.device_count() == 1 else " (CUDA_VISIBLE_DEVICES hides a GPU)"
    return f"compute capability {capability[0]}.{capability[1]}, needed 8.0 or above{hide}"


def _cuda_recipe() -> _Recipe:
    if torch.version.cuda is None:
        raise BuildError("this torch is built without CUDA")
    if not torch.cuda.is_available():
        raise BuildError("no CUDA device")
    devices = range(torch.cuda.device_count())
    capabilities = sorted({torch.cuda.get_device_capability(index) for index in devices})
    if capabilities[0] < LEAST_CAPABILITY:
        raise BuildError(too_old(capabilities[0]))
    compiler = nvcc()
    _check_driver(compiler)
    include, libraries = _torch_flags()
    machine = tuple(flag for capability in capabilities for flag in architecture_flags(capability))
    bindings = (compiler, "-std=c++20", "-O2", "-Xcompiler=-fPIC", *include, "-DUSE_CUDA", "-DFOS_CUDA")
    commands = kernel_commands(compiler, capabilities)
    commands.append((*bindings, "-DFOS_LIBRARY=fouroversix_cuda", "-DFOS_KEY=CUDA", "-c", str(csrc() / "bindings.cpp")))
    if HOPPER in capabilities:
        commands += [*product_commands(compiler), (*bindings, "-c", str(csrc() / "bindings_sm90.cpp"))]
    host = _host_compiler()
    link = (compiler, *host, "-shared", "-cudart=static", *machine, *libraries, "-ltorch_cuda")
    return _Recipe(tuple((*command, *host) for command in commands), link)
