"""The Triton backend against the specification: interpreted here, compiled where there is a GPU, by the same tests.

Triton's interpreter runs a kernel's operations with numpy: what it computes is what the kernels say, not what a GPU's
compiler makes of it. The compiler is watched by :func:`test_machine_code_...`, which compile for GPUs without one; and
``test_kernels.py`` runs whole on a GPU, with millions of values.
"""

import math
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import triton as triton_compiler
from conftest import DTYPES, golden_cases, mixed_magnitudes
from test_kernels import (
    LAYOUTS,
    SOME,
    SPLITS,
    Implementation,
    assert_same,
    by_recipe,
    by_some,
    check,
    check_golden,
    hard_rows,
    implementation,
    no_cuda,
)
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_interpreter import INTERPRETED_OR_CUDA, interpreted

from fouroversix_plugin import kernels as kernel_package
from fouroversix_plugin import reference
from fouroversix_plugin.kernels import build, cuda, native, reference_operators, triton, triton_kernels
from fouroversix_plugin.recipe import Recipe


@pytest.fixture(params=INTERPRETED_OR_CUDA)
def kernels(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "cuda":
        return implementation("triton")
    return Implementation(interpreted(), "cpu")


# --- bytes ---


@by_recipe
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_values_become_other_bytes(kernels: Implementation, dtype: torch.dtype, recipe: Recipe) -> None:
    # One launch: rows scaled for their own amax, and for one that saturates, or leaves range unused, or is 0.
    x = hard_rows(dtype)[:32]
    amax = reference.row_amax(x) * torch.tensor([1.0, 0.25, 1.0, 3.0, 1.0, 1e-9, 1.0, 0.0]).repeat(4).roll(
        len(recipe.key)
    )
    expected = reference_operators.quantize(x, recipe, "token", amax, "row_major", False, None)
    assert_same(kernels.quantize(x, recipe, "token", amax), expected)


@by_some
def test_a_given_amax_is_another(kernels: Implementation, recipe: Recipe) -> None:
    x = hard_rows(torch.bfloat16)[:32]
    check(kernels, x, recipe, "tensor")
    check(kernels, x, recipe, "token")
    for factor in (0.0, 3.0, 1e9, 1e-9):
        check(kernels, x, recipe, "tensor", x.abs().max().float() * factor)
    for static in (0.0, 3.0):
        amax = torch.tensor(static)
        assert_same(kernels.quantize_values(x, recipe, amax), reference.quantize_values(x, recipe, amax))


@pytest.mark.parametrize("recipe", [SOME[0], SOME[-1]], ids=lambda recipe: recipe.key)
@pytest.mark.parametrize(("bad", "dtype"), list(zip((math.nan, math.inf, -math.inf), DTYPES, strict=True)), ids=str)
def test_non_finite_input_is_not_what_is_pinned(
    kernels: Implementation, bad: float, dtype: torch.dtype, recipe: Recipe
) -> None:
    x = mixed_magnitudes(9, 64, seed=2, spread=2).to(dtype)
    tensor_amax, row_amax = x.abs().max().float(), reference.row_amax(x)
    x[2, 17], x[7, 63], x[8] = bad, bad, 0
    for granularity, amax in (("tensor", tensor_amax), ("token", row_amax)):
        check(kernels, x, recipe, granularity)
        check(kernels, x, recipe, granularity, amax)
    row_amax[4] = abs(bad)
    check(kernels, x, recipe, "token", row_amax)
    check(kernels, x, recipe, "tensor", torch.tensor(abs(bad)))


def test_a_bit_pattern_is_rounded_otherwise(kernels: Implementation) -> None:
    # Every bf16 bit pattern, NaN too, among values of its magnitude, for block scales all over E4M3: the positive ones
    # in column 5, and a negative neighbour of each in column 10.
    bits = torch.arange(1 << 15, dtype=torch.int32)
    pattern = bits.to(torch.uint16).view(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(pattern), 16, generator=generator).clamp(-3, 3) / 3 * pattern.float().unsqueeze(1)
    x = x.bfloat16()
    x[:, 5], x[:, 10] = pattern, ((bits ^ 1) + (1 << 15)).to(torch.uint16).view(torch.bfloat16)
    amax = reference.row_amax(x) * torch.exp2(10 * torch.rand(len(pattern), generator=generator) - 1)
    expected = reference_operators.quantize(x, Recipe(), "token", amax, "row_major", False, None)
    assert_same(kernels.quantize(x, Recipe(), "token", amax), expected)


@by_some
def test_block_scales_at_the_midpoints_of_e4m3_go_elsewhere(kernels: Implementation, recipe: Recipe) -> None:
    # With global scales of 1, b is v / 6: every midpoint of E4M3, times 1 or 2/3 for the other candidate, and beside.
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    v = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2)) * 6
    v = torch.cat((v, v / 1.5))
    v = torch.cat((v, v.nextafter(torch.tensor(0.0)), v.nextafter(torch.tensor(9e9))))
    x = torch.randn(len(v), 16, generator=torch.Generator().manual_seed(4)).clamp(-1, 1) * v.unsqueeze(1)
    x[:, 5] = v
    check(kernels, x, recipe, "tensor", torch.tensor(recipe.encoded_amax))


@pytest.mark.parametrize("metric", ["mse", "mae"])
def test_errors_are_added_in_another_order(kernels: Implementation, metric: Any) -> None:
    # Blocks whose choice turns when their columns change places: another order of the sum would find some of them.
    recipe, amax = Recipe(metric), torch.tensor(11.0)
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-48, 49, (50_000, 16), generator=generator) / 8  # many near ties
    scales = reference.quantize(x, recipe, "tensor", amax).block_scale.view(torch.uint8).squeeze(1)
    sensitive = torch.zeros_like(scales, dtype=torch.bool)
    for _ in range(6):
        shuffled = reference.quantize(x[:, torch.randperm(16, generator=generator)], recipe, "tensor", amax)
        sensitive |= shuffled.block_scale.view(torch.uint8).squeeze(1) != scales
    assert sensitive.sum() >= 10
    check(kernels, x[sensitive], recipe, "tensor", amax)


@pytest.mark.parametrize("case", golden_cases())
def test_bytes_of_the_public_references(
    case: dict[str, Any], golden: Mapping[str, Tensor], kernels: Implementation
) -> None:
    check_golden(kernels, case, golden)


# --- shapes, layouts, experts ---


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("columns", [16, 48, 4112])
def test_some_shape_is_special(kernels: Implementation, rows: int, columns: int) -> None:
    x = mixed_magnitudes(rows, columns, seed=7, spread=2).bfloat16()
    for granularity in ("tensor", "token"):
        check(kernels, x, Recipe(), granularity)
    static = torch.tensor(3.0)
    assert_same(kernels.quantize_values(x, Recipe(), static), reference.quantize_values(x, Recipe(), static))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "silu_and_mul"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 64), (1, 16), (7, 96), (130, 80)], ids=str)
def test_scales_lie_elsewhere_or_padding_is_not_zero(
    kernels: Implementation, shape: tuple[int, int], layout: Any, gated: bool
) -> None:
    x = mixed_magnitudes(shape[0], shape[1] * (2 if gated else 1), seed=8, spread=1)
    for dtype, granularity in ((torch.bfloat16, "token"), (torch.float32, "tensor")):
        expected = reference_operators.quantize(x.to(dtype), Recipe(), granularity, None, layout, gated, None)  # type: ignore[arg-type]
        assert_same(kernels.quantize(x.to(dtype), Recipe(), granularity, None, layout, gated), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_mul_is_another_function(kernels: Implementation, dtype: torch.dtype) -> None:
    edges = torch.tensor([0.0, -0.0, 88.8, 89.5, -103.5, -104.5, 1e30, -1e30])
    gates = torch.cat((torch.linspace(-120, 120, 4001), edges))
    gates = torch.cat((gates, gates.new_zeros(-len(gates) % 64))).view(-1, 64)
    x = torch.cat((gates, mixed_magnitudes(*gates.shape, seed=9, spread=1)), dim=1).to(dtype)
    x[3, 5], x[4, 70], x[5, 6] = math.nan, math.inf, -math.inf
    expected = reference_operators.quantize_values(x, Recipe(), None, True)
    assert_same(kernels.quantize_values(x, Recipe(), None, True), expected)


# More experts than a program looks at in one step, and than it writes decode scales of in one.
MANY = [0, *sorted((7 * e) % 65 for e in range(299)), 64]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", [*SPLITS, MANY], ids=lambda split: f"{len(split) - 1}-{sum(split)}")
def test_an_expert_gets_anothers_scale_or_place(kernels: Implementation, split: list[int], layout: Any) -> None:
    offsets = torch.tensor(split, dtype=torch.int32)
    x = mixed_magnitudes(64, 96, seed=10, spread=1) * torch.exp2(torch.arange(64.0) // 5 - 6).unsqueeze(1)
    x[3, 7] = math.nan
    for gated, amax in ((False, None), (True, torch.arange(1.0, len(split)))):
        expected = reference_operators.quantize(x, SOME[0], "tensor", amax, layout, gated, offsets)
        assert_same(kernels.quantize(x, SOME[0], "tensor", amax, layout, gated, offsets), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_is_dequantized_otherwise(kernels: Implementation, dtype: torch.dtype) -> None:
    # 256 block scales beside 256 bytes of codes, under decode scales that make numbers subnormal, infinite, halfway
    # between two of a 16-bit type, and NaN (that of GPUs, which rounding as an integer would turn into -0.0).
    packed = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scale = torch.arange(256, dtype=torch.uint8).unsqueeze(1).expand(256, 32).contiguous()
    decode = torch.rand(256, generator=torch.Generator().manual_seed(11))
    decode[::4], decode[1::4], decode[2::8], decode[3::8] = 1e-40, 1e36, 1 + 2**-8, 1 + 2**-11
    decode[100] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    expected = reference_operators.dequantize(packed, scale, decode, dtype)
    assert_same((kernels.dequantize(packed, scale, decode, dtype), decode), (expected, decode))
    flat = reference_operators.dequantize(packed[:1], scale[7:8], decode[6:7], dtype)
    experts = (t.view(1, 1, -1).expand(3, 1, -1) for t in (packed[0], scale[7]))
    again = kernels.dequantize(*experts, decode[6].expand(3, 1), dtype)
    assert_same((again, decode), (flat.expand(3, 1, -1), decode))
    assert kernels.dequantize(packed[:0], scale[:0], decode[:0], dtype).shape == (0, 512)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.t(), id="transposed"),
        pytest.param(lambda x: x[:, ::2], id="every-other-column"),
        pytest.param(lambda x: x[:1].expand(5, -1), id="expanded"),
        pytest.param(lambda x: x.flatten()[5 : 5 + 16 * 112].view(16, 112), id="odd-offset"),
    ],
)
def test_strides_change_something(kernels: Implementation, view: Callable[[Tensor], Tensor]) -> None:
    x = mixed_magnitudes(64, 128, seed=12, spread=2).bfloat16().to(kernels.device)
    contiguous = view(x).contiguous().cpu()
    expected = reference_operators.quantize(contiguous, Recipe(), "token", None, "row_major", False, None)
    assert_same(kernels.quantize(view(x), Recipe(), "token"), expected)


# --- what the compiler makes of it ---


INTEGERS = {"rows", "columns", "experts", "candidates"}
INTEGERS |= {"tokens", "words", "words_of_split", "strips", "slots_of_row", "splits"}


def machine_code(kernel: Any, capability: int, options: Mapping[str, Any] | None = None, **given: Any) -> Any:
    """``kernel`` compiled without a GPU. Arguments: a type for what is passed, a value for what is constant."""
    types: dict[str, str] = {}
    constants: dict[tuple[int], object] = {}
    hints: dict[tuple[int], list[list[object]]] = {}
    for index, name in enumerate(kernel.arg_names):
        value = given.get(name)
        if name in INTEGERS:
            types[name] = "i32"
        elif isinstance(value, str) and value.startswith("*"):
            types[name] = value
        else:
            types[name], constants[(index,)] = "constexpr", value
        # As at run time, where pointers are aligned and K is a multiple of 16.
        of_shape = name in ("rows", "columns") and not kernel.params[index].do_not_specialize
        if of_shape or types[name].startswith("*"):
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=constants, attrs=hints)
    return triton_compiler.compile(
        source, target=GPUTarget("cuda", capability, 32), options=dict(options or triton._options(triton_kernels))
    )


def disassembled(compiled: Any, folder: Path) -> tuple[dict[str, int], str]:
    """Bytes of local memory and of the stack that a kernel uses, and its instructions."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tools = Path(triton_compiler.__file__).parent / "backends" / "nvidia" / "bin"
    run = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    used = {kind: int(number) for kind, number in re.findall(r"\b(STACK|LOCAL):(\d+)", run.stdout + run.stderr)}
    run = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True)
    return used, run.stdout


PLAIN = {"GATED": False, "ROWS": 1, "WIDTH": 8, "EXPERTS_AT_ONCE": 1}
CHOICE = {"SCOPE": "token", "SHARED_AMAX": False, "LAYOUT": "row_major", "TILE_ROWS": 1, "METRIC": "mse"}
CHOICE |= {"DOMAIN": "amax", "ADAPTIVE": True, "ENCODED_AMAX": 1536.0, "decode_scale": "*fp32", **PLAIN}
PACKED = {**CHOICE, "packed": "*u8", "block_scale": "*u8"}
EXPERTS = {"SCOPE": "expert", "amax": "*fp32", "offsets": "*i32", "LAYOUT": "128x4", "TILE_ROWS": 128}
KERNELS = {
    "bf16": (triton_kernels.quantize_rows, {**PACKED, "x": "*i16"}),
    "fp32-values": (triton_kernels.quantize_rows, {**CHOICE, "x": "*fp32", "values": "*fp32", "WIDTH": 4}),
    "gated-experts": (
        triton_kernels.quantize_rows,
        {**PACKED, **EXPERTS, "x": "*fp16", "GATED": True, "ROWS": 16, "EXPERTS_AT_ONCE": 256},
    ),
    "gated-few-columns": (triton_kernels.quantize_rows, {**PACKED, "x": "*i16", "GATED": True, "ROWS": 4}),
    "tensor": (
        triton_kernels.quantize_rows,
        {**PACKED, "x": "*i16", "amax": "*fp32", "SCOPE": "tensor", "ROWS": 2, "LAYOUT": "8x4", "TILE_ROWS": 8},
    ),
    "amax": (triton_kernels.find_largest, {**PLAIN, "x": "*i16", "amax": "*i32"}),
    "dequantize": (
        triton_kernels.dequantize_rows,
        {"packed": "*u8", "block_scale": "*u8", "decode_scale": "*fp32", "out": "*i16", "ROWS": 1, "WIDTH": 8},
    ),
}


# sm_90 has the larger code of the two, and is where registers are short: sm_80 gets one of each kind.
@pytest.mark.parametrize(
    ("capability", "kind"), [*((90, kind) for kind in KERNELS), (80, "bf16"), (80, "gated-experts"), (80, "dequantize")]
)
def test_machine_code_spills_fuses_flushes_or_moves_a_block_between_threads(
    capability: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel, arguments = KERNELS[kind]
    compiled = machine_code(kernel, capability, **arguments)
    ptx = compiled.asm["ptx"]
    assert re.findall(r"\bfma\.\S+|\S+\.ftz\S*|\bdiv\.(?!rn)\S+|\.approx\S*", ptx) == []
    used, instructions = disassembled(compiled, tmp_path)
    assert used == {"STACK": 0, "LOCAL": 0}
    assert re.search(r"\bLDG\.E\.(?:128|64)\b", instructions), "a block is not read in large pieces"
    assert re.findall(r"\b(?:LDL|STL)\b", instructions) == []
    # Shared memory only carries what rows have in common: a few words, where a tile has 16 KiB.
    assert compiled.metadata.shared <= 8192 if kind == "gated-experts" else compiled.metadata.shared <= 64


# --- where it runs ---


def test_cuda_tensors_have_other_kernels_where_these_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, needed in ((None, triton), ("no Triton", reference_operators)):
        monkeypatch.setattr(build, "load", lambda name: "no nvcc")
        monkeypatch.setattr(triton, "reason", lambda reason=reason: reason)
        assert cuda._operators() is needed
    monkeypatch.setattr(build, "load", lambda name: None)
    assert cuda._operators() is native


def test_the_named_backend_is_not_what_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a GPU only traced: one graph, of this backend's operators.
    monkeypatch.setattr(triton, "reason", lambda: None)
    backend = kernel_package.select("quantize", "", (2, 16), torch.device("cuda"), "triton")
    called = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        called.extend(str(node.target) for node in graph.graph.nodes if "fouroversix" in str(node.target))
        return lambda *inputs: (torch.zeros(2, 16),)

    def run(x: Tensor) -> Tensor:
        q = backend.quantize(x, Recipe(), "token")
        return backend.linear(backend.dequantize(q), q, Recipe(), None)

    torch._dynamo.reset()
    torch.compile(run, fullgraph=True, backend=look)(torch.ones(2, 16))
    torch._dynamo.reset()
    names = ("fouroversix_triton.quantize", "fouroversix_triton.dequantize", "fouroversix_triton.quantize_values")
    assert called == [*names, "fouroversix.linear"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: triton.quantize(torch.ones(16), *RAW), r"x: got shape \(16,\), needed \[M, K\]"),
        (lambda: triton.quantize(torch.ones(2, 24), *RAW), "x: got K = 24, needed a positive multiple of 16"),
        (lambda: triton.quantize(torch.ones(2, 16).double(), *RAW), "x: got torch.float64, needed bfloat16, float16"),
        (lambda: triton.quantize_values(torch.ones(2, 33), Recipe(), None, True), "x: got 33 columns"),
        (lambda: triton.quantize_values(torch.ones(2, 16), Recipe(), None, True), "x: got K = 8"),
        (
            lambda: triton.quantize_values(torch.ones(2, 16), Recipe(), torch.ones(3), False),
            "amax: got 3 numbers, needed 2",
        ),
        (
            lambda: triton.quantize_values(torch.ones(2, 16), Recipe(), torch.ones(()).double(), False),
            "amax: got torch.float64 on cpu, needed torch.float32 on cpu",
        ),
        (
            lambda: triton.quantize(torch.ones(2, 16), *RAW[:-1], torch.tensor([0, 2])),
            "expert_offsets: got torch.int64 on cpu, needed torch.int32 on cpu",
        ),
        (
            lambda: triton.quantize(torch.ones(2, 16), *RAW[:-1], torch.zeros(0, dtype=torch.int32)),
            r"expert_offsets: got shape \(0,\), needed \[E \+ 1\]",
        ),
        (
            lambda: triton.dequantize(torch.zeros(2, 8).byte(), torch.zeros(3).byte(), torch.ones(2), torch.float32),
            "block_scale: got 3 numbers, needed 2",
        ),
        (
            lambda: triton.dequantize(torch.zeros(2, 8).byte(), torch.zeros(2).byte(), torch.ones(2), torch.float64),
            "dtype: got torch.float64",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_taken(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# recipe, granularity, amax, layout, gated, expert_offsets
RAW: Any = (Recipe(), "tensor", None, "row_major", False, None)


@pytest.mark.parametrize(
    ("cuda", "capability", "driver", "needed"),
    [
        (None, (9, 0), None, "this torch is built without CUDA"),
        ("13.0", None, None, "no CUDA device"),
        ("13.0", (7, 5), None, "compute capability 7.5, needed 8.0 or above"),
        (
            "13.0",
            (9, 0),
            "Failed to find C compiler.\nmore",
            "Triton does not work: RuntimeError: Failed to find C compiler.",
        ),
        ("13.0", (8, 0), None, None),
    ],
)
def test_the_reason_why_not_is_another(
    cuda: str | None,
    capability: tuple[int, int] | None,
    driver: str | None,
    needed: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Driver:
        def get_current_target(self) -> None:
            if driver is not None:
                raise RuntimeError(driver)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(triton_compiler.runtime.driver, "_active", Driver())
    triton.reason.cache_clear()
    try:
        assert triton.reason() == needed
    finally:
        triton.reason.cache_clear()


OFFSETS = torch.tensor([0, 5, 5, 20, 33], dtype=torch.int32)


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("quantize", (None, "tensor", Recipe().key)),
        ("quantize", (None, "token", Recipe().key)),
        ("quantize_values", (None, Recipe().key)),
        ("quantize_to_layout", (None, "token", Recipe().key, "128x4")),
        ("quantize_experts", (OFFSETS, None, Recipe().key, "8x4")),
        ("silu_and_mul_quantize", (None, "token", Recipe().key, "row_major")),
    ],
)
def test_a_call_waits_for_the_gpu_or_capture_or_compilation_changes_a_byte(
    name: str, arguments: tuple[Any, ...]
) -> None:
    arguments = tuple(a.cuda() if isinstance(a, Tensor) else a for a in arguments)
    operator = getattr(torch.ops.fouroversix_triton, name)
    needed = getattr(torch.ops.fouroversix, name)  # on the CPU
    first, second = (mixed_magnitudes(33, 576, seed=seed, spread=2).bfloat16() for seed in (13, 14))
    at_home = tuple(a.cpu() if isinstance(a, Tensor) else a for a in arguments)
    x = first.cuda()
    operator(x, *arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(x, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(x, *arguments)
    x.copy_(second)
    graph.replay()
    assert_same(tuple(part.cpu() for part in captured), needed(second, *at_home))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: operator(x, *arguments), fullgraph=True)
    assert_same(tuple(part.cpu() for part in compiled(first.cuda())), needed(first, *at_home))


@pytest.mark.parametrize("module", sorted(Path(triton.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_triton_must_be_there_to_import_the_backends(module: Path) -> None:
    imports = re.findall(r"^(?:import|from) (triton\b|.*triton\w*_kernels).*", module.read_text(), re.MULTILINE)
    assert (imports != []) == (module.stem in ("triton_kernels", "triton_gemm_kernels"))


def test_the_interpreter_is_on_where_kernels_are_compiled() -> None:
    assert type(triton_kernels.quantize_rows) is triton_compiler.runtime.JITFunction
