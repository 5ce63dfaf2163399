"""scripts/check_machine_code.py: what it must see, and that the sources pass it where there is an nvcc."""

import check_machine_code
import pytest
from check_machine_code import Kernel, Object

from fouroversix_plugin.kernels import build

REPORT = """ptxas info    : Compiling entry function '_Z3oneP' for 'sm_90a'
ptxas info    : Function properties for _Z3oneP
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z3twoP' for 'sm_90a'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 72 registers
"""
CODE = " ".join((*check_machine_code.NATIVE[9, 0], "LDG.E STG.E"))
ONE, TWO = Kernel("_Z3oneP", 64, 0, 0), Kernel("_Z3twoP", 72, 8, 16)


def quantize(*kernels: Kernel, code: str | None = CODE, notes: tuple[str, ...] = ()) -> list[str]:
    return list(Object((9, 0), "quantize.cu", ("bf16",), kernels, code, notes).faults())


def test_a_spill_local_memory_or_a_missing_conversion_passes() -> None:
    assert check_machine_code.kernels_of(REPORT) == (ONE, TWO)
    assert quantize(ONE) == []
    assert quantize(ONE, TWO) == ["sm_90a quantize.cu bf16: _Z3twoP has 8 bytes of stack, 16 spilled"]
    assert quantize(ONE, code=CODE + " LDL R1") == ["sm_90a quantize.cu bf16: local memory is read or written"]
    assert quantize(ONE, code=CODE.replace("E5M2", "")) == ["sm_90a quantize.cu bf16: no F2FP.SATFINITE.E5M2.F32"]
    assert quantize(code=None) == ["sm_90a quantize.cu bf16: ptxas reported no kernel"]
    assert list(Object((9, 0), "launch_sm90.cpp", (), (), None).faults()) == []
    with pytest.raises(ValueError, match="reports a kernel in a way"):
        check_machine_code.kernels_of("Compiling entry function 'x'")


def test_serialized_multiplications_pass() -> None:
    serialized = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "insufficient register resources for the wgmma pipeline in the function '_Z3oneP'"
    )
    assert check_machine_code.serialized(REPORT) == ()
    assert check_machine_code.serialized(f"{REPORT}{serialized}\n") == (serialized,)
    assert quantize(ONE, notes=(serialized,)) == [f"sm_90a quantize.cu bf16: {serialized}"]


def disassembly(name: str, *code: str) -> str:
    """As cuobjdump writes it. An instruction may begin with ``label:``, and name labels in braces."""
    labels = {}
    bare = []
    for index, text in enumerate(code):
        label, separator, rest = text.rpartition(": ")
        if separator:
            labels[label] = f"{index * 16:#x}"
        bare.append(rest)
    lines = [
        f"        /*{index * 16:04x}*/                   {text.format(**labels)} ;    /* 0x03e00008a4187df0 */\n"
        f"                                                                     /* 0x000fe20003800000 */"
        for index, text in enumerate(bare)
    ]
    return "\n".join((f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"', *lines, ""))


HGMMA = "HGMMA.64x64x16.F32.BF16 R24, R164, gdesc[UR8], R24, gsb0"
HMMA = "HMMA.16816.F32.BF16 R48, R60.reuse, R20, R48"
WORK = "LOP3.LUT R0, R0, 0x10, RZ, 0x3c, !PT"


def gemm(tokens: int, work: int = 100, multiplication: str = HGMMA) -> str:
    """A loop of ``work`` + 9 instructions with 4 multiplications for 32 weights, in another one."""
    return disassembly(
        f"_ZN3fos4cuda12_gemm_sm90_cu_0237f8544gemmINS1_5ShapeILi{tokens}ELi2ELi1EEELNS1_7ColumnsE0EEEvNS1_4MapsENS0_4GemmE",
        f"unit: {WORK}",
        f"step: {WORK}",
        "@!P0 BRA {wait}",
        f"ready: {WORK}",
        "@P1 BRA {multiply}",
        *["FADD R0, R1, R2"] * 500,  # what only some threads do
        f"multiply: {multiplication}",
        *[multiplication] * 3,
        *[WORK] * work,
        "@!P0 BRA {step}",
        *[WORK] * 100,
        "@!P2 BRA {unit}",
        "EXIT",
        f"wait: {WORK}",
        "BRA {ready}",
    )


def few(tokens: int, main: int, last: int) -> str:
    """Two loops of ``main`` and ``last`` instructions for 32 weights, one after the other, in a third."""
    multiplications = [HMMA] * (tokens // 8 * 4)
    return disassembly(
        f"_ZN3fos4cuda11_few_sm90_cu_4904fd143fewILi{tokens}EEEv14CUtensorMap_stNS0_4GemmE",
        f"unit: {WORK}",
        f"main: {WORK}",
        *multiplications,
        "BRA.DIV UR12, {end}",
        *[WORK] * (main - len(multiplications) - 3),
        "@!P1 BRA P4, {main}",
        f"last: {WORK}",
        *multiplications,
        *[WORK] * (last - len(multiplications) - 2),
        "@P1 BRA {last}",
        "@P2 BRA {unit}",
        "end: EXIT",
    )


def product(source: str, *codes: str) -> Object:
    return Object((9, 0), source, ("bf16", "linear"), (ONE,), "\n".join(codes))


def test_a_main_loop_is_not_found_or_counted_wrong() -> None:
    gemms = product("gemm_sm90.cu", *map(gemm, (32, 64, 128, 256)))
    assert gemms.instructions_a_weight() == dict.fromkeys((32, 64, 128, 256), 109 / 32)
    assert list(gemms.faults()) == []
    assert "| 3.41 of 3.5 (" in gemms.row()
    fews = product("few_sm90.cu", few(8, 86, 98), few(16, 93, 106))
    assert fews.instructions_a_weight() == {8: 86 / 32, 16: 93 / 32}
    assert list(fews.faults()) == []
    assert fews.row().endswith(f"| {86 / 32:.2f} of 3.05 (8 tokens) |")


def test_a_slow_main_loop_or_none_passes() -> None:
    where, rest = "sm_90a gemm_sm90.cu bf16 linear", [gemm(tokens) for tokens in (32, 64, 128)]
    slow = product("gemm_sm90.cu", *rest, gemm(256, work=120))
    assert list(slow.faults()) == [f"{where}: 4.03 instructions a weight for 256 tokens, budget 4.0"]
    missing = f"{where}: no kernel with a main loop for 256 tokens"
    assert list(product("gemm_sm90.cu", *rest).faults()) == [missing]
    unrolled = gemm(256).replace("@!P0 BRA 0x10 ", "NOP ").replace("@!P2 BRA 0x0 ", "NOP ")
    assert list(product("gemm_sm90.cu", *rest, unrolled).faults()) == [missing]
    without = list(product("gemm_sm90.cu", *rest, gemm(256, multiplication=HMMA)).faults())
    assert [fault.rpartition(" ")[0].rpartition(" ")[2] for fault in without] == ["no", "256"], without
    unknown = product("gemm_sm90.cu", *rest, gemm(256), gemm(512))
    assert list(unknown.faults()) == [f"{where}: no budget for 512 tokens"]
    # Both loops are slow: the faster one counts.
    fews = product("few_sm90.cu", few(8, 98, 106), few(16, 93, 106))
    assert list(fews.faults()) == [
        "sm_90a few_sm90.cu bf16 linear: 3.06 instructions a weight for 8 tokens, budget 3.05"
    ]


def test_the_sources_fail_the_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        build.nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("sys.argv", ["check_machine_code.py"])
    assert check_machine_code.main() == 0, capsys.readouterr().out


def test_no_nvcc_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none() -> str:
        raise build.BuildError("no nvcc: not here")

    monkeypatch.setattr(build, "nvcc", none)
    monkeypatch.setattr("sys.argv", ["check_machine_code.py"])
    assert check_machine_code.main() == 0
    assert capsys.readouterr().out == "machine code not checked: no nvcc: not here\n"
