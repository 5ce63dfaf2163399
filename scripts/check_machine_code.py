"""Compile the CUDA sources as the first use on a GPU would, and look at the machine code. Needs nvcc, no GPU.

python scripts/check_machine_code.py [--architecture 9.0 --architecture 10.0]

For each object: nothing spilled and no local memory. Of quantize.cu: the chip's own conversions are used. Of the
products for Hopper (with 9.0): every kernel multiplies in the chip's matrix units, ptxas lets multiplications run
beside unpacking, and the main loop takes no more instructions a weight than its budget. Exits with 1 where that does
not hold, and with 0 and a word where there is no nvcc.
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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fouroversix_plugin.kernels import build

NATIVE = {
    (9, 0): ("F2FP.SATFINITE.E5M2.F32", "F2FP.SATFINITE.E4M3.F32"),
    (10, 0): ("F2FP.SATFINITE.E2M1.F32", "F2FP.F16.E2M1.UNPACK", "F2FP.SATFINITE.E4M3.F32"),
    (12, 0): ("F2FP.SATFINITE.E2M1.F32", "F2FP.F16.E2M1.UNPACK", "F2FP.SATFINITE.E4M3.F32"),
}
"""Conversions that quantize.cu must have, by compute capability."""

MULTIPLICATIONS = {"gemm_sm90.cu": "HGMMA", "few_sm90.cu": "HMMA"}
"""What every kernel of a product multiplies with."""

BUDGETS: Mapping[tuple[str, str], Mapping[int, float]] = {
    ("gemm_sm90.cu", "bf16"): {32: 3.5, 64: 3.5, 128: 3.85, 192: 3.8, 256: 4.0},
    ("gemm_sm90.cu", "fp16"): {32: 3.8, 64: 3.8, 128: 4.15, 192: 4.0, 256: 4.2},
    ("few_sm90.cu", "bf16"): {8: 3.05, 16: 3.4},
    ("few_sm90.cu", "fp16"): {8: 3.3, 16: 3.55},
}
"""Instructions a weight in the main loop, at most, for each kernel of a product by its tokens.

A weight is 9/16 of a byte: at 4.8 TB/s and 1.98 GHz, memory gives each of an H200's 132 multiprocessors 33 weights a
cycle, and one issues instructions for 128 threads a cycle. Beyond about 3.9 instructions a weight, products of few
tokens would wait for instructions and no longer for memory. fp16 takes a few more than bf16, where fewer fields need a
shift. Budgets are 7 to 10 % above what ptxas of CUDA 13.0 makes of the sources, 1 to 3 % for tiles of 128 tokens and
more, which wait for the matrix units.
"""

OF_ONE_WEIGHT, OF_EXPERTS = {16, 256}, {192}
"""Tokens of kernels that there are for one weight alone, or for experts alone."""
WEIGHTS_AT_ONCE = 8
"""Weights of a thread in one multiplication: 64x16 of 128 threads in HGMMA, 16x16 of 32 in HMMA."""
HMMA_TOKENS = 8
"""An HMMA is for so many tokens, an HGMMA for all."""

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/ +(\S[^;\n]*)")
BRANCH = re.compile(r"(?P<guard>@!?U?P\w+ +)?BRA\S* +(?P<condition>[^,]+, *)?0x(?P<target>[0-9a-f]+)")
ENDS = re.compile(r"(EXIT|RET)\b")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")
SERIALIZED = "wgmma.mma_async instructions are serialized"
"""In ptxas's notes from C7510 on, whatever the cause."""


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack_bytes: int
    spilled_bytes: int


@dataclass(frozen=True)
class Loop:
    """What one pass takes at least."""

    instructions: int
    multiplications: int


@dataclass(frozen=True)
class Object:
    architecture: tuple[int, int]
    source: str
    options: tuple[str, ...]
    """What it is compiled for: the dtype first, the output."""
    kernels: tuple[Kernel, ...]
    machine_code: str | None
    """None without a disassembler, and of host code."""
    notes: tuple[str, ...] = ()
    """ptxas's, where it serializes what should run side by side."""

    @property
    def chip(self) -> str:
        return build.architecture_flags(self.architecture)[0].rpartition("=")[2]

    def faults(self) -> Iterator[str]:
        where = " ".join((self.chip, self.source, *self.options))
        if not self.kernels and self.source.endswith(".cu"):
            yield f"{where}: ptxas reported no kernel"
        for kernel in self.kernels:
            if kernel.stack_bytes or kernel.spilled_bytes:
                yield f"{where}: {kernel.name} has {kernel.stack_bytes} bytes of stack, {kernel.spilled_bytes} spilled"
        for note in self.notes:
            yield f"{where}: {note}"
        if self.machine_code is None:
            return
        if LOCAL_MEMORY.search(self.machine_code):
            yield f"{where}: local memory is read or written"
        if self.source == "quantize.cu":
            for instruction in NATIVE.get(self.architecture, ()):
                if instruction not in self.machine_code:
                    yield f"{where}: no {instruction}"
        if self.source in MULTIPLICATIONS:
            for fault in self.faults_of_products():
                yield f"{where}: {fault}"

    def faults_of_products(self) -> Iterator[str]:
        multiplication, budgets = MULTIPLICATIONS[self.source], self.budgets()
        for name, code in functions(self.machine_code or "").items():
            if not any(multiplies(text, multiplication) for _, text in code):
                yield f"{name} has no {multiplication}"
        found = self.instructions_a_weight()
        for tokens in sorted(budgets.keys() | found.keys()):
            if tokens not in budgets:
                yield f"no budget for {tokens} tokens"
            elif tokens not in found:
                yield f"no kernel with a main loop for {tokens} tokens"
            elif found[tokens] > budgets[tokens]:
                yield f"{found[tokens]:.2f} instructions a weight for {tokens} tokens, budget {budgets[tokens]}"

    def budgets(self) -> Mapping[int, float]:
        if not self.options:
            return {}
        budgets = BUDGETS.get((self.source, self.options[0]), {})
        others = OF_EXPERTS if "linear" in self.options else OF_ONE_WEIGHT
        return {tokens: most for tokens, most in budgets.items() if tokens not in others}

    def instructions_a_weight(self) -> dict[int, float]:
        """Of the main loop of each kernel, by its tokens."""
        multiplication = MULTIPLICATIONS.get(self.source)
        if multiplication is None or self.machine_code is None:
            return {}
        found: dict[int, float] = {}
        for name, code in functions(self.machine_code).items():
            parameter = re.search(r"\d(?:gemm|few)I(?:\w*ShapeI)?Li(\d+)E", name)
            loop = main_loop(code, multiplication)
            if parameter is None or loop is None:
                continue
            tokens = int(parameter[1])
            for_same_weights = tokens / HMMA_TOKENS if multiplication == "HMMA" else 1
            weights = loop.multiplications * WEIGHTS_AT_ONCE / for_same_weights
            found[tokens] = max(found.get(tokens, 0), loop.instructions / weights)
        return found

    def row(self) -> str:
        most = max((str(kernel.registers) for kernel in self.kernels), key=int, default="")
        instructions = "" if self.source.endswith(".cpp") else "not looked at"
        if self.machine_code is not None:
            instructions = str(len(INSTRUCTION.findall(self.machine_code)))
        a_weight, budgets = self.instructions_a_weight(), self.budgets()
        tightest = max(
            a_weight.keys() & budgets.keys(), key=lambda tokens: a_weight[tokens] / budgets[tokens], default=0
        )
        budget = f"{a_weight[tightest]:.2f} of {budgets[tightest]} ({tightest} tokens)" if tightest else ""
        cells = (self.chip, self.source, " ".join(self.options), str(len(self.kernels)), most, instructions, budget)
        return f"| {' | '.join(cells)} |"


HEADER = """\
| chip | source | for | kernels | most registers | instructions | a weight in the main loop, nearest its budget |
|---|---|---|---|---|---|---|"""


def functions(machine_code: str) -> dict[str, list[tuple[int, str]]]:
    """The instructions of each function with their addresses."""
    return {
        part.split(maxsplit=1)[0]: [(int(address, 16), text) for address, text in INSTRUCTION.findall(part)]
        for part in machine_code.split("Function : ")[1:]
    }


def multiplies(text: str, multiplication: str) -> bool:
    return re.search(rf"\b{multiplication}\.", text) is not None


def main_loop(code: Sequence[tuple[int, str]], multiplication: str) -> Loop | None:
    """Of all loops that multiply, the one with the fewest instructions for each multiplication.

    What one pass takes is counted along the shortest way from the loop's beginning to its end that has most
    multiplications: without what only some threads do now and then, and without the waiting of who has to wait. A
    branch back from code that is out of line closes no loop: from where it goes to, no way leads to it.
    """
    index_of = {address: index for index, (address, _) in enumerate(code)}
    counts = [multiplies(text, multiplication) for _, text in code]
    follows: list[tuple[int, ...]] = []
    back: list[tuple[int, int]] = []
    for index, (_, text) in enumerate(code):
        branch = BRANCH.match(text)
        if branch is None:
            follows.append(() if ENDS.match(text) else (index + 1,))
            continue
        target = index_of.get(int(branch["target"], 16), len(code))
        if target <= index:
            back.append((target, index))
        always = branch["guard"] is None and branch["condition"] is None
        follows.append((target,) if always else (index + 1, target))
    loops = [loop for first, last in back if (loop := one_pass(follows, counts, first, last)).multiplications]
    return min(loops, key=lambda loop: loop.instructions / loop.multiplications, default=None)


def one_pass(follows: Sequence[tuple[int, ...]], counts: Sequence[bool], first: int, last: int) -> Loop:
    """From ``first`` to ``last``, only forward; no multiplications where no way leads there."""
    best = {first: (0, 0)}  # multiplications, negative, and instructions on the way to an instruction
    for index in range(first, last):
        if index not in best:
            continue
        multiplications, instructions = best[index]
        so_far = (multiplications - counts[index], instructions + 1)
        for after in follows[index]:
            if index < after <= last and so_far < best.get(after, (1, 0)):
                best[after] = so_far
    multiplications, instructions = best.get(last, (0, 0))
    return Loop(instructions + 1, -multiplications)


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
    command: Sequence[str], architecture: tuple[int, int], target: Path, cuobjdump: str | None
) -> Object:
    done = subprocess.run([*command, "-Xptxas=-v", "-o", str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed with status {done.returncode}:\n{done.stderr}")
    source = Path(command[command.index("-c") + 1]).name
    machine_code = None
    if cuobjdump is not None and source.endswith(".cu"):
        dump = [cuobjdump, "--dump-sass", str(target)]
        machine_code = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    options = tuple(word.partition("=")[2] for word in command if word.startswith("-DFOS_"))
    return Object(architecture, source, options, kernels_of(done.stderr), machine_code, serialized(done.stderr))


def serialized(report: str) -> tuple[str, ...]:
    """ptxas's notes of multiplications that wait for one another."""
    return tuple(line.strip() for line in report.splitlines() if SERIALIZED in line)


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
    if build.HOPPER in architectures:
        jobs += [(line, build.HOPPER) for line in build.product_commands(compiler)]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        targets = (Path(directory) / f"{index}.o" for index in range(len(jobs)))
        objects = list(pool.map(lambda job, to: compile_object(job[0], job[1], to, cuobjdump), jobs, targets))
    print(HEADER)
    for each in objects:
        print(each.row())
    faults = [fault for each in objects for fault in each.faults()]
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
