"""The check of the engines' releases finds what it is there for, on small made-up engines and plugins."""

import importlib.util
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_engines", ROOT / "scripts" / "check_engines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _script()
Check = Callable[..., list[str]]
EMPTY = script.Engine("eng", ("1.0",), "plugin", {}, {}, {}, {}, {}, ("self", "layer"), ("weight",))


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Problems of a package made of modules, given as path=text, checked against a table."""

    def run(table: dict[str, Any], **modules: str) -> list[str]:
        path = tmp_path / "eng.zip"
        with zipfile.ZipFile(path, "w") as package:
            package.writestr("eng/__init__.py", "")
            for name, text in modules.items():
                package.writestr(f"eng/{name}.py", text)
        return [str(problem) for problem in script.check(EMPTY._replace(**table), script.Sources(path))]

    return run


def imports(*rows: str, module: str = "eng.a") -> dict[str, Any]:
    return {"imports": {module: rows}}


def test_missing_module_and_missing_name(check: Check) -> None:
    assert check(imports("f"), b="") == ["f (eng.a): got no such module; needed f"]
    assert check(imports("f"), a="def g(): ...") == ["f (eng.a): got no such name; needed f"]
    assert check(imports("f"), a="if TYPE_CHECKING:\n    from eng.b import f", b="f = 1") != []
    assert check(imports("f"), a="f: int") != [], "an annotation alone defines nothing"
    assert check(imports("f"), a="g.f = 1") != []


@pytest.mark.parametrize(
    "text",
    [
        "from eng.sub.b import f",
        "from .sub.b import f",
        "from .sub.b import g as f",
        "from .sub import *",
        "from .sub import f",
        "from eng.sub import b\nf = 1",
        "try:\n    from .sub.b import f\nexcept ImportError:\n    f = None",
        "from .sub.b import g\nf = g",
        "from torch import f",
        "import torch as f",
    ],
)
def test_re_exports_are_followed(check: Check, text: str) -> None:
    sub = {"sub/__init__": "from .b import f\nfrom .b import g", "sub/b": "def f(x): ...\ndef g(x): ..."}
    assert check(imports("f"), a=text, **sub) == []


def test_re_exports_are_followed_to_the_parameters(check: Check) -> None:
    modules = {"a": "from .b import *", "b": "from .c import f", "c": "def f(x, y): ..."}
    assert check(imports("f(x, y)"), **modules) == []
    assert check(imports("f(x)"), **modules) == ["f (eng.c:1): got a required y: (x, y); needed (x)"]
    assert check(imports("f"), a="from .b import *", b="__all__ = ['g']\nf = g = 1") != []
    assert check(imports("f"), a="from .b import f", b="from .a import f") != [], "a circle ends"


def test_parameters_of_a_call(check: Check) -> None:
    f = "def f(a, b=1, *, c=2): ..."
    for fits in ("f(a)", "f(a, b)", "f(_, _)", "f(a, *, b, c)", "f(*, a)"):
        assert check(imports(fits), a=f) == []
    for row, got in {
        "f(a, d)": "b where d is passed",
        "f(a, b, c)": "2 positional parameters instead of 3",
        "f(a, *, d)": "no parameter d",
        "f()": "a required a",
    }.items():
        (problem,) = check(imports(row), a=f)
        assert f"got {got}: (a, b=…, *, c=…); needed" in problem
    assert check(imports("f(a, b, *, d)"), a="def f(*args, **kwargs): ...") == []
    assert check(imports("f()"), a="f = 1") == ["f (eng.a:1): got no function or class; needed f()"]


def test_inherited_parameters_of_a_constructor(check: Check) -> None:
    bases = (
        "class Base(Outside):\n    def __init__(self, data, loader): ...\n"
        "class Row(Base):\n    def __init__(self, input_dim, **kw):\n        super().__init__(**kw)\n"
        "class Column(Base):\n    def __init__(self, output_dim, **kw):\n        super().__init__(**kw)\n"
        "class Given(Row):\n    def __init__(self, **kw):\n        super().__init__(input_dim=1, **kw)\n"
    )
    modules = {"a": "from .b import Row, Column, Given\nclass Both(Column, Row): ...", "b": bases}
    assert check(imports("Both(*, data, loader, input_dim, output_dim)", "Given(*, data, loader)"), **modules) == []
    (problem,) = check(imports("Both(*, data, loader, input_dim)"), **modules)
    assert "a required output_dim" in problem
    (problem,) = check(imports("Both(*, data, loader, input_dim, output_dim, more)"), **modules)
    assert "no parameter more" in problem
    assert check(imports("C(x)"), a="from torch import T\nclass C(T): ...") == []
    assert check(imports("C(x)"), a="class C: ...") != []


def test_attributes_and_methods_of_handed_objects(check: Check) -> None:
    table = {"handed": {"eng.a:C": ("set_in_init", "field", "inherited(x)", "prop")}}
    base = "class B:\n    def inherited(self, x): ...\n"
    body = "    field: int\n    def __init__(self):\n        self.set_in_init = 1\n"
    prop = "    @property\n    def prop(self): ...\n"
    assert check(table, a=f"{base}class C(B):\n{body}{prop}") == []
    assert check(table, a=f"{base}class C(B):\n{body}C.prop = 1") == [
        "C.prop (eng.a:3): got no such attribute; needed prop"
    ]
    (problem,) = check(table, a=f"class B:\n    def inherited(self, y): ...\nclass C(B):\n{body}{prop}")
    assert problem == "C.inherited (eng.a:2): got y where x is passed: (y); needed (x)"


def test_overrides(check: Check) -> None:
    table = {"overrides": {"eng.a:C": ("m(layer, x=None, **rest)", "flag")}}
    flag = "class C:\n    flag = False\n"
    for fits in ("layer, x", "layer", "layer, x=1, *, key", "layer, **kw"):
        assert check(table, a=f"{flag}    def m(self, {fits}): ...") == []
    for name, text in {
        "renamed": "def n(self, layer): ...",
        "more by position": "def m(self, layer, x, y): ...",
        "other order": "def m(self, x, layer): ...",
        "less": "def m(self): ...",
        "open": "def m(self, layer, *args): ...",
        "attribute": "def m(self, layer): ...\nC.flag = 1",
    }.items():
        cls = flag if name != "attribute" else "class C:\n"
        assert len(check(table, a=f"{cls}    {text}")) == 1, name
    (problem,) = check(table, a=f"{flag}    def n(self): ...")
    assert problem == "C.m (eng.a:1): got no m to override; needed m(layer, x=…, **kwargs)"


def test_abstract_methods_need_an_override(check: Check) -> None:
    table = {"overrides": {"eng.a:C": ("m()",)}}
    abstract = (
        "class B:\n    @abc.abstractmethod\n    def m(self): ...\n    @abc.abstractmethod\n    def n(self): ...\n"
    )
    assert check(table, a=f"{abstract}class C(B):\n    def n(self): ...") == []
    (problem,) = check(table, a=f"{abstract}class C(B): ...")
    assert problem.startswith("C.n (eng.a:6): got an abstract method")


def test_calls_of_overrides(check: Check) -> None:
    table = {"overrides": {"eng.a:C": ("m(x, y, key=None)",)}, "callers": {"eng.b": ("C.m",)}}
    a = "class C:\n    def m(self, x, y, key): ..."
    for fits in ("1, 2", "1, y=2, key=3", "1, **rest", "*rest"):
        assert check(table, a=a, b=f"self.quant_method.m({fits})\nother.m()") == []
    for fails in ("1", "1, 2, more=3", "1, 2, 3, 4"):
        (problem,) = check(table, a=a, b=f"self.quant_method.m({fails})")
        assert problem.startswith(f"C.m (eng.b:1): got self.quant_method.m({fails}); needed a call that fits m(x, y,")
    assert check(table, a=a, b="") == ["C.m (eng.b): got no call; needed a call of m(x, y, key=…)"]


def test_rows_of_other_releases_are_left_out() -> None:
    table = {
        "imports": {"eng.a": ("f(x)", "g"), "eng.b": ("h",)},
        "overrides": {"eng.a:C": ("m()",)},
        "gates": (("eng.a:f", "1.10.0", ""), ("eng.b:h", "", "1.9.0"), ("eng.a:C", "1.10.0", "1.11.0")),
    }
    engine = EMPTY._replace(**table)
    assert engine.at("1.9.0").imports == {"eng.a": ("g",), "eng.b": ("h",)}
    assert engine.at("1.9.0").overrides == {}
    assert engine.at("1.10.0").imports == {"eng.a": ("f(x)", "g")}
    assert engine.at("1.11.1").overrides == {}


def test_strings(check: Check) -> None:
    table = {"strings": {"eng.a": ("block", "key")}}
    assert check(table, a="f(key='block')") == []
    assert check(table, a="block = key") == [
        "'block' (eng.a): got not mentioned; needed 'block'",
        "'key' (eng.a): got not mentioned; needed 'key'",
    ]


PLUGIN = """
from eng.a import Base, config

class _Shared(Base):
    def apply(self, layer, x): return self.moe.bias

class Method(_Shared):
    flag = True
    def apply(self, *args, **named): super().apply(*args, **named)
    def _own(self, layer):
        layer.mine = getattr(layer, "limit") + layer.size
        return layer.mine.real, layer.weight.data, config().load, self._own, "block"
"""
TABLE = EMPTY._replace(
    imports={"eng.a": ("Base", "config()")},
    handed={"eng.a:Layer": ("size", "limit"), "eng.a:Base": ("moe",), "eng.a:M": ("bias",), "eng.a:C": ("load",)},
    overrides={"eng.a:Base": ("apply(layer, x)", "flag")},
    strings={"eng.a": ("block", "eng.plugins")},
)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, ""),
        ({"imports": {"eng.a": ("Base",)}}, "eng.a.config"),
        ({"imports": {"eng.a": ("Base", "config()", "gone")}}, "eng.a.gone"),
        ({"handed": {**TABLE.handed, "eng.a:Layer": ("limit",)}}, "size"),
        ({"handed": {**TABLE.handed, "eng.a:C": ()}}, "load"),
        ({"handed": {**TABLE.handed, "eng.a:N": ("gone",)}}, "gone"),
        ({"overrides": {"eng.a:Base": ("apply(layer, x)",)}}, "Base.flag"),
        ({"overrides": {"eng.a:Base": ("apply(layer, y)", "flag")}}, "Base.apply"),
        ({"overrides": {"eng.a:Base": ("apply(layer, x)", "flag", "gone()")}}, "Base.gone"),
        ({"strings": {"eng.a": ("eng.plugins", "gone")}}, "gone"),
        ({"strings": {"eng.a": ("block",)}}, "eng.plugins"),
    ],
)
def test_incomplete_and_stale_tables(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    problems = script.check_table(TABLE._replace(**change), tmp_path, ["eng.plugins"])
    assert [problem.what for problem in problems] == ([what] if what else [])


def test_every_other_import_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "late.py").write_text("import torch\nfrom .b import c\ndef f():\n    import eng.b")
    (problem,) = script.check_table(EMPTY, tmp_path)
    assert (problem.what, problem.where) == ("eng.b", "deeper/late.py:4")


@pytest.mark.parametrize("engine", script.ENGINES.values(), ids=script.ENGINES)
def test_the_table_is_what_the_plugin_uses(engine: Any) -> None:
    assert script.check_table(engine, ROOT / engine.plugin, script.entry_points()) == []


def _pip(returncode: int, wheel: dict[str, str] | None = None) -> Callable[..., Any]:
    def run(command: list[str], **_: Any) -> Any:
        if wheel is not None:
            target = Path(command[command.index("--dest") + 1])
            target.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(target / "eng-1.0-py3-none-any.whl", "w") as archive:
                for name, text in wheel.items():
                    archive.writestr(name, text)
        return subprocess.CompletedProcess(command, returncode, "", "WARNING: slow\nERROR: No matching distribution\n")

    return run


def test_wheels_become_small_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = {"eng/a.py": "x = 1", "eng/big.so": "…", "eng-1.0.dist-info/METADATA": "…", "other/b.py": "…"}
    monkeypatch.setattr(script.subprocess, "run", _pip(0, wheel))
    path = script.fetch("eng", "1.0", tmp_path)
    assert zipfile.ZipFile(path).namelist() == ["eng/a.py"]
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()] == [Path("engines/eng-1.0.zip")]
    monkeypatch.setattr(script.subprocess, "run", _pip(1))
    assert script.fetch("eng", "1.0", tmp_path) == path, "the second time nothing is downloaded"


def test_a_package_is_sought_under_its_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> Any:
        assert command[-1] == "eng-python==1.0"
        target = Path(command[command.index("--dest") + 1])
        target.mkdir(parents=True)
        with zipfile.ZipFile(target / "eng_python-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("eng/a.py", "x = 1")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script.subprocess, "run", pip)
    path = script.fetch("eng", "1.0", tmp_path, "eng-python")
    assert (path.name, zipfile.ZipFile(path).namelist()) == ("eng-1.0.zip", ["eng/a.py"])


def test_what_is_left_alone_is_imported(tmp_path: Path) -> None:
    left_alone = EMPTY._replace(unused=True, strings={"eng.a": ("a reason",)}, imports={"eng.a": ("f(x)",)})
    (tmp_path / "a.py").write_text("import torch\nimport engine")
    assert script.check_table(left_alone, tmp_path) == []
    (tmp_path / "a.py").write_text("def f():\n    from eng.a import f")
    (problem,) = script.check_table(left_alone, tmp_path)
    assert str(problem) == "eng.a.f (a.py:2): got an import; needed none"


def test_a_broken_wheel_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "eng-1.0-py3-none-any.whl").write_text("half")
    with pytest.raises(script.UnavailableError, match="run this again"):
        script.fetch("eng", "1.0", tmp_path)
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


@pytest.mark.parametrize(("text", "status", "result"), [("f = 1", 0, "ok"), ("", 1, "1 problem")])
def test_report(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    status: int,
    result: str,
) -> None:
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "a.py").write_text("from eng.a import f")
    (tmp_path / "pyproject.toml").write_text("[project]")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "ENGINES", {"eng": EMPTY._replace(**imports("f"))})
    monkeypatch.setattr(script.subprocess, "run", _pip(0, {"eng/__init__.py": "", "eng/a.py": text}))
    assert script.main([]) == status
    assert capsys.readouterr().out.splitlines()[:2] == ["eng         table     ok", f"eng         1.0       {result}"]


def test_releases_that_cannot_be_had_are_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "ENGINES", {"eng": EMPTY})
    monkeypatch.setattr(script.subprocess, "run", _pip(1))
    assert script.main(["--engine", "eng", "--version", "1.0", "--version", "2.0"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "eng         table     ok",
        "eng         1.0       skipped: pip: No matching distribution",
        "eng         2.0       skipped: pip: No matching distribution",
        "No release of eng could be had: only the table was checked, against the plugin.",
    ]
