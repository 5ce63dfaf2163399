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


def test_a_spill_local_memory_or_a_missing_conversion_passes() -> None:
    one, two = check_machine_code.kernels_of(REPORT)
    assert (one, two) == (Kernel("_Z3oneP", 64, 0, 0), Kernel("_Z3twoP", 72, 8, 16))
    assert list(Object((9, 0), "bf16", (one,), CODE).faults()) == []
    assert list(Object((9, 0), "bf16", (one, two), CODE).faults()) == [
        "sm_90 bf16: _Z3twoP has 8 bytes of stack, 16 spilled"
    ]
    assert list(Object((9, 0), "bf16", (one,), CODE + " LDL R1").faults()) == [
        "sm_90 bf16: local memory is read or written"
    ]
    assert list(Object((9, 0), "bf16", (one,), CODE.replace("E5M2", "")).faults()) == [
        "sm_90 bf16: no F2FP.SATFINITE.E5M2.F32"
    ]
    assert list(Object((9, 0), "bf16", (), None).faults()) == ["sm_90 bf16: ptxas reported no kernel"]
    with pytest.raises(ValueError, match="reports a kernel in a way"):
        check_machine_code.kernels_of("Compiling entry function 'x'")


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
