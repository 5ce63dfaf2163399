"""``fouroversix``: exit codes that scripts can trust, and the traceback that an engine swallows."""

import importlib.metadata
import importlib.util
import json
import logging
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fouroversix_plugin as fos
from fouroversix_plugin import cli
from fouroversix_plugin.checkpoint import Checkpoint, files, load_checkpoint
from fouroversix_plugin.doctor import examine_sglang
from fouroversix_plugin.kernels import build
from fouroversix_plugin.serving.sglang import register


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
    assert "  flashinfer  planned, not in this release" in lines
    assert "  vllm        not installed" in lines


def test_doctor_prints_one_json_object_with_the_reasons(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine(installed=False)
    code, text = doctor(capsys, "--json")
    report = json.loads(text)
    assert (code, report["ok"], report["schema_version"]) == (0, True, 1)
    assert report["fouroversix_plugin"] == fos.__version__
    assert report["backends"] == fos.backends()
    absent = {"version": None, "warning": None, "registers": False, "error": None}
    assert report["engines"] == {"vllm": absent, "sglang": absent}


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


@pytest.mark.parametrize(
    ("version", "registered", "said"),
    [
        ("0.5.23", True, None),
        ("0.5.24", True, "SGLang 0.5.24 is outside the checked range 0.5.14 to 0.5.23; it may work"),
        (
            "0.5.13.post1",
            False,
            "SGLang 0.5.13.post1 is too old for --quantization nvfp4_4over6, needed 0.5.14 or later",
        ),
        ("0.0.0.dev0", True, None),
    ],
)
def test_doctor_does_not_tell_releases_of_sglang_apart(
    monkeypatch: pytest.MonkeyPatch, version: str, registered: bool, said: str | None
) -> None:
    find_spec, entry_points = importlib.util.find_spec, importlib.metadata.entry_points
    entry = types.SimpleNamespace(name="fouroversix", load=lambda: lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "sglang" or find_spec(name, *rest))
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda **chosen: [entry] if chosen.get("group") == "sglang.srt.plugins" else entry_points(**chosen),
    )
    quantization = types.ModuleType("sglang.srt.layers.quantization")
    quantization.QUANTIZATION_METHODS = {"nvfp4_4over6": None} if registered else {}  # type: ignore[attr-defined]
    release = types.ModuleType("sglang.version")
    release.__version__ = version  # type: ignore[attr-defined]
    for module in (quantization, release, *map(types.ModuleType, ("sglang", "sglang.srt", "sglang.srt.layers"))):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found = examine_sglang()
    assert (found["version"], found["registers"], found["error"]) == (version, registered, None)
    assert (said or "") in (found["warning"] or "")
    assert (said is None) is (found["warning"] is None)


def test_a_release_of_sglang_that_is_too_old_takes_more_than_one_line(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    release = types.ModuleType("sglang.version")
    release.__version__ = "0.5.9.post1"  # type: ignore[attr-defined]
    for module in (types.ModuleType("sglang"), release):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    register()
    (record,) = log.records
    assert record.levelname == "ERROR"
    assert record.message == (
        "fouroversix: SGLang 0.5.9.post1 is too old for --quantization nvfp4_4over6, needed 0.5.14 or later; "
        "upgrade SGLang"
    )


def test_doctor_builds_ahead_when_asked(
    engine: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(installed=False)
    monkeypatch.setattr(build, "build_all", lambda progress: progress("cpu: compiled into the cache"))
    assert cli.main(["doctor", "--build"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "fouroversix: cpu: compiled into the cache\n"
    assert captured.out.startswith("fouroversix-plugin")
    assert doctor(capsys)[0] == 0, "without being asked it builds nothing, and says nothing on stderr"


def test_doctor_leaves_the_log_alone(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger("fouroversix_plugin").parent
    engine(installed=False)
    doctor(capsys)
    assert logging.getLogger("fouroversix_plugin").parent is before


# --- quantize, inspect, compare ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "lm_head": (64, 32),
        "model.embed_tokens": (64, 32),
        "model.layers.0.self_attn.q_proj": (32, 32),
        "model.layers.0.self_attn.k_proj": (16, 32),
        "model.layers.0.self_attn.v_proj": (16, 32),
        "model.layers.0.mlp.down_proj": (32, 40),  # no multiple of 16
        "model.layers.0.mlp.gate": (4, 32),
    }
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file({**tensors, "model.norm.weight": torch.ones(32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["TestForCausalLM"], "hidden_size": 32}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code, out, err = run(capsys, *arguments, "--json")
    assert err == ""
    content: dict[str, Any] = json.loads(out)
    assert content["schema_version"] == 1
    return code, content


def test_a_conversion_says_what_it_did(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "quantize", model, tmp_path / "out")
    assert (code, err) == (0, "")
    for text in (
        "scheme      W4A4: weights mse 256 amax; activations mse 256 amax, per token",
        "quantized   3 linear weights, 2048 values",
        f"written     {tmp_path / 'out'}: 1 file",
        "in `ignore`",
        "K = 40 is no multiple of 16",
        "not a linear weight (1-D)",
    ):
        assert text in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_dry_run_foretells_every_byte_and_writes_none(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("quantize", model, tmp_path / "out", "--max-shard-size", "2KB", "--recipe", "w4a16")
    code, foretold = report(capsys, *arguments, "--dry-run")
    assert (code, foretold["seconds"]) == (0, None)
    assert f"would write {tmp_path / 'out'}: " in run(capsys, *arguments, "--dry-run")[1]
    assert list(tmp_path.iterdir()) == []
    code, done = report(capsys, *arguments)
    assert (code, done.pop("seconds") > 0) == (0, True)
    assert {**foretold, "seconds": 0} == {**done, "seconds": 0}
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert {file["name"]: file["nbytes"] for file in foretold["files"]} == files
    assert len(files) > 1
    assert sum(files.values()) == foretold["nbytes"]
    q, k, v = (next(x for x in done["quantized"] if x["name"].endswith(n)) for n in ("q_proj", "k_proj", "v_proj"))
    assert (q["shape"], q["nbytes"]) == ([32, 32], 32 * 16 + 32 * 2 + 4)
    assert k["shares_amax_with"] == [q["name"], v["name"]]
    alone = {entry["name"]: entry["reason"] for entry in done["left_alone"]}
    assert alone["model.layers.0.mlp.down_proj"] == "K = 40 is no multiple of 16"


def test_ignore_adds_to_the_recipes_list(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--dry-run", "--ignore", "*.[kv]_proj", "*.q_proj")
    _, foretold = report(capsys, "quantize", model, tmp_path / "out", *arguments)
    assert foretold["quantized"] == []
    assert foretold["quantization_config"]["ignore"][:2] == ["lm_head", "*.lm_head"]
    assert foretold["quantization_config"]["ignore"][-3:-1] == ["*.[kv]_proj", "*.q_proj"]


def test_a_recipe_may_be_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = fos.preset("transformer_engine").to_dict()
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps(block))
    _, done = report(capsys, "quantize", model, tmp_path / "out", "--recipe", recipe)
    assert done["quantization_config"]["weights"] == block["weights"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == done["quantization_config"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{model}", "{model}"), "is the source itself"),
        (("{model}", "{tmp}/there"), "exists already; .* --overwrite"),
        (("{tmp}/none", "{tmp}/out"), "none: cannot be read: No such file or directory"),
        (("{model}", "{tmp}/out", "--resume"), "nothing to resume"),
        (("{model}", "{tmp}/out", "--format", "modelopt"), "calibration"),
        (("{model}", "{tmp}/out", "--device", "cuda:9"), "--device: got 'cuda:9', which is not there"),
        (("{model}", "{tmp}/out", "--device", "gpu"), "--device: got 'gpu'"),
        (("{model}", "{tmp}/out", "--device", "meta"), "--device: got 'meta', needed cpu or cuda"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_line_and_1(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "there").mkdir()
    code, out, err = run(capsys, "quantize", *(a.format(model=model, tmp=tmp_path) for a in arguments))
    assert (code, out) == (1, "")
    assert re.fullmatch(f"fouroversix: error: .*{message}.*\n", err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "fast"), "got 'fast', needed 'flashinfer'"),
        (("--recipe", "none/such.json"), "No such file"),
        (("--max-shard-size", "5XB"), "got '5XB', needed a size such as 5GB"),
        (("--max-shard-size", "0"), "got '0'"),
        (("--ignore", "lm_head", ""), "--ignore: got '', needed the name of a module"),
        (("--max-shard-size", "9" * 400), "needed a size such as 5GB"),
        (("--format", "gguf"), "invalid choice: 'gguf'"),
        (("--resume", "--dry-run"), "not allowed with"),
    ],
    ids=str,
)
def test_wrong_options_are_usage(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["quantize", str(model), str(tmp_path / "out"), *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "nbytes"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2GiB", 2 << 30), ("77", 77), ("3m", 3 * 10**6)]
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert cli._size(text) == nbytes


def test_an_interrupted_conversion_says_how_to_go_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("quantize", model, tmp_path / "out", "--max-shard-size", "2KB")
    calls = []

    @contextmanager
    def interrupting(what: str, nbytes: int) -> Iterator[Any]:
        def progress(name: str, done: int) -> None:
            calls.append(name)
            if len(calls) == 6:
                raise KeyboardInterrupt

        yield progress

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_progress", interrupting)
        code, out, err = run(capsys, *arguments)
    assert (code, out) == (130, "")
    assert "out.partial is kept: --resume goes on with it" in err
    assert not (tmp_path / "out").exists()
    assert run(capsys, *arguments, "--resume")[0] == 0
    assert run(capsys, "quantize", model, tmp_path / "whole", "--max-shard-size", "2KB")[0] == 0
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_bar_is_drawn_on_a_terminal_only(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fouroversix_plugin.cli", "quantize", str(model)]
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 100))
    done = subprocess.run([*command, str(tmp_path / "a")], stdout=subprocess.PIPE, stderr=child, timeout=60, check=True)
    os.close(child)
    drawn = ""
    with suppress(OSError):  # the terminal is gone
        while True:
            drawn += os.read(parent, 1 << 16).decode()
    os.close(parent)
    assert "quantizing" in drawn
    assert "B/s" in drawn
    assert b"quantizing" not in done.stdout
    piped = subprocess.run([*command, str(tmp_path / "b")], capture_output=True, timeout=60, check=True)
    assert piped.stderr == b""


def test_inspect_and_compare_pass_a_sound_checkpoint_and_fail_a_damaged_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(capsys, "quantize", model, out)[0] == 0
    code, text, err = run(capsys, "inspect", out)
    assert (code, err) == (0, "")
    assert "mse 256 amax" in text
    assert report(capsys, "inspect", out)[0] == 0
    assert report(capsys, "inspect", model)[0] == 0
    assert report(capsys, "compare", out, "--to", model)[0] == 0
    code, text, err = run(capsys, "compare", out, "--to", model)
    assert (code, err) == (0, "")
    assert "q_proj" in text
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_scale_2"] *= 1536 / 2688  # the other range
    save_file(tensors, out / "model.safetensors")
    assert report(capsys, "compare", out, "--to", model)[0] == 1
    tensors["model.layers.0.self_attn.q_proj.weight_scale_2"].reciprocal_()
    save_file(tensors, out / "model.safetensors")
    code, text, _ = run(capsys, "inspect", out)
    assert code == 1
    assert "encode scale" in text


def test_compare_draws_what_people_would_rather_look_at(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert run(capsys, "quantize", model, tmp_path / "out")[0] == 0
    code, content = report(capsys, "compare", tmp_path / "out", "--to", model, "--plot", tmp_path / "plots")
    assert code == 0
    assert len(content["plots"]) == 3
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in content["plots"])


def test_compare_finds_out_after_its_work_that_it_cannot_draw(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, "compare", tmp_path / "no checkpoint", "--to", model, "--plot", tmp_path / "file")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"fouroversix: error: .*File exists.*\n", err)


def test_version_needs_neither_torch_nor_an_engine() -> None:
    script = (
        "import sys; from fouroversix_plugin.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit as end: print(end.code, {'torch', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"fouroversix {fos.__version__}\n0 set()\n", "")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_a_stream_that_was_closed_takes_the_output_of_another_or_ends_the_command(
    model: Path, tmp_path: Path, closed: str
) -> None:
    command = f"{sys.executable} -m fouroversix_plugin.cli"
    script = f"{command} quantize --json {model} {tmp_path}/out {closed}; echo $? >&3; {command} inspect none {closed}"
    with (tmp_path / "status").open("w") as status:
        arguments = ["bash", "-c", f"exec 3>&{status.fileno()}; {script}; echo $? >&3"]
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=60, pass_fds=[status.fileno()], check=True
        )
    assert (tmp_path / "status").read_text() == "0\n1\n"
    assert "Traceback" not in done.stderr
    if closed == "2>&-":
        assert json.loads(done.stdout)["schema_version"] == 1, "no error of the second command either"
    load_checkpoint(tmp_path / "out")


def test_a_terminal_without_utf_8_gets_no_report(model: Path) -> None:
    command = [sys.executable, "-m", "fouroversix_plugin.cli", "inspect", str(model)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment, check=True)
    assert b" \\u2192 " in done.stdout


def test_a_terminal_obeys_the_names_in_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("model.layers.0.\x1b[2J\x9b31m.weight", "model.\rnorm.weight")
    (tmp_path / "evil").mkdir()
    save_file({names[0]: torch.ones(16, 16), names[1]: torch.ones(4)}, tmp_path / "evil" / "model.safetensors")
    (tmp_path / "evil" / "config.json").write_text("{}")
    texts = [
        *run(capsys, "quantize", tmp_path / "evil", tmp_path / "out"),
        *run(capsys, "inspect", tmp_path / "out"),
        *run(capsys, "compare", tmp_path / "out", "--to", tmp_path / "evil"),
        *run(capsys, "inspect", tmp_path / "\x1b[2J"),
    ]
    assert "model.layers.*.\\x1b[2J\\x9b31m" in texts[1]
    assert not any(set(str(text)) & set("\x1b\x9b\r") for text in texts)


def test_no_memory_is_a_traceback(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("unable to mmap 5000000000 bytes: Cannot allocate memory (12)")

    with monkeypatch.context() as patch:
        patch.setattr(files, "safe_open", full)
        code, _, err = run(capsys, "inspect", model)
    assert (code, err.count("\n")) == (1, 1)
    assert "model.safetensors: not a readable safetensors file: unable to mmap" in err

    def none(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Checkpoint, "open", none)
    assert run(capsys, "inspect", model) == (1, "", "fouroversix: error: out of memory\n")


def test_a_warning_has_the_name_of_the_command_once(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "orphan.safetensors").write_text("")
    index = {"weight_map": dict.fromkeys(Checkpoint.open(model).tensors, "model.safetensors")}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    command = [sys.executable, "-m", "fouroversix_plugin.cli", "quantize", tmp_path / "model", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == f"fouroversix: {tmp_path}/model: not in the index, ignored: orphan.safetensors\n"


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
