"""Compile the CUDA sources as the first use on a GPU would, and look at the machine code. Needs nvcc, no GPU.

python scripts/check_machine_code.py [--architecture 9.0 --architecture 10.0]

For each architecture and input dtype: nothing spilled, no local memory, and the chip's own conversions are used. Exits
with 1 where that does not hold, and with 0 and a word where there is no nvcc.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fouroversix_plugin.kernels import build

NATIVE = {
    (9, 0): ("F2FP.SATFINITE.E5M2.F32", "F2FP.SATFINITE.E4M3.F32"),
    (10, 0): ("F2FP.SATFINITE.E2M1.F32", "F2FP.F16.E2M1.UNPACK", "F2FP.SATFINITE.E4M3.F32"),
}
"""Conversions that must be there, by compute capability."""

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/ +\S")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack_bytes: int
    spilled_bytes: int


@dataclass(frozen=True)
class Object:
    architecture: tuple[int, int]
    dtype: str
    kernels: tuple[Kernel, ...]
    machine_code: str | None
    """None without a disassembler."""

    def faults(self) -> Iterator[str]:
        where = f"sm_{self.architecture[0]}{self.architecture[1]} {self.dtype}"
        if not self.kernels:
            yield f"{where}: ptxas reported no kernel"
        for kernel in self.kernels:
            if kernel.stack_bytes or kernel.spilled_bytes:
                yield f"{where}: {kernel.name} has {kernel.stack_bytes} bytes of stack, {kernel.spilled_bytes} spilled"
        if self.machine_code is None:
            return
        if LOCAL_MEMORY.search(self.machine_code):
            yield f"{where}: local memory is read or written"
        for instruction in NATIVE.get(self.architecture, ()):
            if instruction not in self.machine_code:
                yield f"{where}: no {instruction}"


def kernels_of(report: str) -> tuple[Kernel, ...]:
    """What ``-Xptxas=-v`` says of each kernel."""
    found = []
    for part in report.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if name is None or stack is None or registers is None:
            raise ValueError(f"ptxas reports a kernel in a way this script does not know: {part[:300]}")
        frame, stores, loads = (int(number) for number in stack.groups())
        found.append(Kernel(name[1], int(registers[1]), frame, stores + loads))
    return tuple(found)


def disassembler() -> str | None:
    """cuobjdump: on the PATH, beside nvcc, or in Triton's package."""
    beside = [str(Path(build.nvcc()).resolve().parent / "cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        beside.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((path for path in map(shutil.which, ("cuobjdump", *beside)) if path), None)


def compile_object(
    command: Sequence[str], architecture: tuple[int, int], directory: Path, cuobjdump: str | None
) -> Object:
    dtype = next(word for word in command if word.startswith("-DFOS_DTYPE=")).partition("=")[2]
    target = directory / f"{dtype}-{architecture[0]}{architecture[1]}.o"
    done = subprocess.run([*command, "-Xptxas=-v", "-o", str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed with status {done.returncode}:\n{done.stderr}")
    machine_code = None
    if cuobjdump is not None:
        dump = [cuobjdump, "--dump-sass", str(target)]
        machine_code = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return Object(architecture, dtype, kernels_of(done.stderr), machine_code)


def capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=capability, action="append", help="compute capability, such as 9.0")
    architectures: list[tuple[int, int]] = parser.parse_args().architecture or list(NATIVE)
    try:
        compiler = build.nvcc()
    except build.BuildError as error:
        print(f"machine code not checked: {error}")
        return 0
    cuobjdump = disassembler()
    if cuobjdump is None:
        print("no cuobjdump: only ptxas's own report is looked at")
    jobs = [(line, each) for each in architectures for line in build.kernel_commands(compiler, [each])]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_object(job[0], job[1], Path(directory), cuobjdump), jobs))
    print("| architecture | input | kernels | most registers | instructions |\n|---|---|---|---|---|")
    for each in objects:
        most = max((kernel.registers for kernel in each.kernels), default=0)
        architecture = f"sm_{each.architecture[0]}{each.architecture[1]}"
        instructions = len(INSTRUCTION.findall(each.machine_code)) if each.machine_code else "not looked at"
        print(f"| {architecture} | {each.dtype} | {len(each.kernels)} | {most} | {instructions} |")
    faults = [fault for each in objects for fault in each.faults()]
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
