"""``fouroversix``: exit codes that scripts can trust, and the traceback that an engine swallows."""

import importlib.metadata
import importlib.util
import json
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

import fouroversix_plugin as fos
from fouroversix_plugin import cli


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that vLLM is installed, or not, and that its plugin is registered by ``register``."""
    find_spec, entry_points = importlib.util.find_spec, importlib.metadata.entry_points

    def pretend(installed: bool, register: Callable[[], Any] | None = None) -> None:
        def spec(name: str, *rest: Any) -> Any:
            return (object() if installed else None) if name == "vllm" else find_spec(name, *rest)

        def points(**chosen: str) -> Any:
            if chosen.get("group") != "vllm.general_plugins":
                return entry_points(**chosen)
            return [] if register is None else [types.SimpleNamespace(name="fouroversix", load=lambda: register)]

        monkeypatch.setattr(importlib.util, "find_spec", spec)
        monkeypatch.setattr(importlib.metadata, "entry_points", points)

    return pretend


def doctor(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = cli.main(["doctor", *options])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out


def broken() -> None:
    raise ImportError("cannot import name 'LinearBase' from 'vllm'")


def test_doctor_is_content_without_an_engine(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine(installed=False)
    code, text = doctor(capsys)
    assert code == 0
    lines = text.splitlines()
    assert lines[0].startswith(f"fouroversix-plugin {fos.__version__}, Python 3.")
    assert "  cpu         ready" in lines
    assert "  cuda        planned, not in this release" in lines
    assert "  vllm        not installed" in lines


def test_doctor_prints_one_json_object_with_the_reasons(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine(installed=False)
    code, text = doctor(capsys, "--json")
    report = json.loads(text)
    assert (code, report["ok"], report["schema_version"]) == (0, True, 1)
    assert report["fouroversix_plugin"] == fos.__version__
    assert report["backends"] == fos.backends()
    assert report["engines"] == {"vllm": {"version": None, "warning": None, "registers": False, "error": None}}


def test_a_plugin_that_does_not_load_is_shown_with_its_traceback(
    engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine(installed=True, register=broken)
    code, text = doctor(capsys)
    assert code == 1
    assert "  vllm        the plugin does not load:" in text
    assert "Traceback (most recent call last):" in text
    assert 'test_cli.py", line' in text, "down to the line that fails"
    assert "ImportError: cannot import name 'LinearBase' from 'vllm'" in text
    code, text = doctor(capsys, "--json")
    report = json.loads(text)
    assert (code, report["ok"]) == (1, False)
    assert report["engines"]["vllm"]["error"].rstrip().endswith("cannot import name 'LinearBase' from 'vllm'")


def test_a_missing_entry_point_is_named(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine(installed=True, register=None)
    code, text = doctor(capsys)
    assert code == 1
    assert "no entry point `fouroversix` in the group vllm.general_plugins; install the package" in text


@pytest.mark.parametrize("warning", [None, "fouroversix: vLLM 9.9 is outside the checked range"])
def test_a_plugin_that_loads_is_fine(
    engine: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, warning: str | None
) -> None:
    called: list[str] = []
    engine(installed=True, register=lambda: called.append("register"))
    quantization = types.ModuleType("vllm.model_executor.layers.quantization")
    quantization.get_quantization_config = lambda name: types.SimpleNamespace(get_name=lambda: name)  # type: ignore[attr-defined]
    vllm = types.ModuleType("vllm")
    vllm.__version__ = "9.9.0"  # type: ignore[attr-defined]
    ours = types.ModuleType("fouroversix_plugin.serving.vllm")
    ours.moe, ours.version_warning = types.ModuleType("moe"), lambda: warning  # type: ignore[attr-defined]
    for module in (vllm, quantization, ours):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    code, text = doctor(capsys)
    assert (code, called) == (0, ["register"])
    assert "  vllm        9.9.0: --quantization nvfp4_4over6 is registered" in text
    assert ("outside the checked range" in text) is (warning is not None)


def test_doctor_leaves_the_log_alone(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger("fouroversix_plugin").parent
    engine(installed=False)
    doctor(capsys)
    assert logging.getLogger("fouroversix_plugin").parent is before


def test_version_needs_neither_torch_nor_an_engine() -> None:
    script = (
        "import sys; from fouroversix_plugin.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit as end: print(end.code, {'torch', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"fouroversix {fos.__version__}\n0 set()\n", "")


@pytest.mark.parametrize("arguments", [[], ["quantise"], ["doctor", "--jsno"]], ids=str)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: fouroversix" in captured.err


def test_the_command_and_the_plugin_are_installed_under_their_names() -> None:
    points = importlib.metadata.entry_points
    (command,) = points(group="console_scripts", name="fouroversix")
    assert command.load() is cli.main
    (plugin,) = points(group="vllm.general_plugins", name="fouroversix")
    assert plugin.value == "fouroversix_plugin.serving.vllm:register"
    assert callable(plugin.load()), "loading it imports no engine"
