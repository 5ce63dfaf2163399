"""The shape of the package: imports go one way, engines stay at the edge, and no environment is read."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import fouroversix_plugin as fos

PACKAGE = ROOT / "fouroversix_plugin"
NAME = "fouroversix_plugin"

# From the bottom up. A module imports from the layers below its own, and from its own package.
LAYERS = (
    ("",),  # the package itself: its version
    ("recipe", "tables"),
    ("nvfp4",),
    ("reference",),
    ("kernels",),
    ("weights",),
    ("formats",),
    ("serving", "serving.layer", "serving.arriving", "serving.scheme", "checkpoint.files", "functional"),
    ("serving.module",),
    ("checkpoint.sources", "checkpoint.read"),
    ("checkpoint.plan",),
    ("checkpoint.card", "checkpoint.config", "checkpoint.summary", "checkpoint.target"),
    ("checkpoint.write",),
    ("checkpoint",),
    ("inspection_text",),
    ("inspection", "comparison"),
    ("plots",),
    ("serving.vllm", "serving.sglang", "doctor"),
    ("cli",),
)
ENGINES = ("serving.vllm", "serving.sglang")
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def modules() -> dict[str, Path]:
    """Every module of the package by its name within it, such as ``kernels.cpu``; a package is its ``__init__``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def part_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to: itself, or the nearest package it lies in."""
    while module not in LEVEL:
        module, _, last = module.rpartition(".")
        assert last, "the package itself is listed"
    return module


def imports(path: Path) -> Iterator[tuple[str, ast.stmt, list[ast.AST]]]:
    """(imported name, statement, what encloses it) of every import, at any depth."""

    def visit(node: ast.AST, above: list[ast.AST]) -> Iterator[tuple[str, ast.stmt, list[ast.AST]]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node, above) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            # `from package import x` may name a module or something in it.
            yield from ((f"{node.module}.{alias.name}", node, above) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, [*above, node])

    yield from visit(ast.parse(path.read_text()), [])


def own_module(imported: str) -> str | None:
    """The module of this package that an import names, or None for another package's."""
    if imported != NAME and not imported.startswith(f"{NAME}."):
        return None
    inner = imported.removeprefix(NAME).removeprefix(".")
    return inner if inner in modules() else inner.rpartition(".")[0]


def only_for_type_checkers(above: list[ast.AST]) -> bool:
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" for node in above)


def test_every_module_has_a_layer() -> None:
    homeless = [module for module in modules() if module and part_of(module) == ""]
    assert homeless == [], "a new module must be placed in LAYERS"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_one_way(module: str) -> None:
    here = part_of(module)
    upward = []
    for imported, statement, above in imports(modules()[module]):
        other = own_module(imported)
        if other is None or only_for_type_checkers(above):
            continue
        there = part_of(other)
        within = here == there and here in ("kernels", *ENGINES)
        # The doctor asks an engine's half what is wrong with it, once it is asked to.
        asked = here == "doctor" and there in ENGINES and any(isinstance(node, ast.FunctionDef) for node in above)
        if not (LEVEL[there] < LEVEL[here] or within or asked):
            upward.append(f"line {statement.lineno}: {module} imports {other or NAME}")
    assert upward == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_an_engine_is_imported_only_at_the_edge(module: str) -> None:
    misplaced = []
    for imported, statement, above in imports(modules()[module]):
        if imported.split(".")[0] not in ("vllm", "sglang", "flashinfer", "transformer_engine"):
            continue
        in_function = any(isinstance(node, ast.FunctionDef) for node in above)
        if part_of(module) not in ENGINES and not (module == "doctor" and in_function):
            misplaced.append(f"line {statement.lineno}: {imported}")
    assert misplaced == []


def test_starting_imports_a_compiler() -> None:
    script = "import sys, fouroversix_plugin.checkpoint; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n", "it costs every command a second"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_entry_point_imports_the_engine_only_when_called(engine: str) -> None:
    # Its `register` is loaded in every process of a server.
    at_top = [
        imported
        for imported, _, above in imports(PACKAGE / "serving" / engine / "__init__.py")
        if imported.startswith(engine) and not any(isinstance(node, ast.FunctionDef) for node in above)
    ]
    assert at_top == []


# kernels.build looks there for where compilers and compiled kernels lie, never for what is computed.
@pytest.mark.parametrize("module", sorted(set(modules()) - {"kernels.build"}))
def test_no_environment_variable_is_read(module: str) -> None:
    tree = ast.parse(modules()[module].read_text())
    reads = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb", "putenv"))
        or (
            isinstance(node, ast.ImportFrom)
            and {alias.name for alias in node.names} & {"environ", "getenv", "environb"}
        )
    ]
    assert reads == []


def test_the_checks_above_see_what_they_look_for(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("import os\ndef f():\n    if TYPE_CHECKING:\n        from vllm.a import b\n")
    found = [(imported, only_for_type_checkers(above)) for imported, _, above in imports(module)]
    assert found == [("os", False), ("vllm.a.b", True)]
    assert [own_module(name) for name in (f"{NAME}.kernels.cpu", f"{NAME}.recipe.Recipe", NAME, "torch.nn")] == [
        "kernels.cpu",
        "recipe",
        "",
        None,
    ]
    assert part_of("kernels.cpu") == "kernels"
    assert part_of("serving.vllm.moe") == "serving.vllm"


@pytest.mark.parametrize(
    "statement", ["import fouroversix_plugin", "import fouroversix_plugin.recipe, fouroversix_plugin.cli"]
)
def test_importing_the_package_imports_nothing_heavy(statement: str) -> None:
    script = f"import sys; {statement}; print({{'torch', 'vllm', 'numpy', 'safetensors'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_importing_the_kernels_imports_no_engine() -> None:
    script = (
        "import sys, fouroversix_plugin as fos; [getattr(fos, name) for name in fos.__all__]; "
        "import fouroversix_plugin.serving.layer, fouroversix_plugin.serving.vllm, fouroversix_plugin.serving.sglang; "
        "print([name for name in ('vllm', 'sglang', 'transformers', 'flashinfer') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_type_checkers_of_users_take_the_annotations() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_public_names_resolve_and_no_others() -> None:
    assert {getattr(fos, name).__name__ for name in fos.__all__} == set(fos.__all__)
    assert set(fos.__all__) <= set(dir(fos)), "for completion"
    with pytest.raises(AttributeError, match="module 'fouroversix_plugin' has no attribute 'quantise'"):
        fos.quantise  # noqa: B018
