"""scripts/accuracy.py: a table of configurations whose engines are made up, and how runs end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import accuracy
import accuracy_report
import accuracy_worker
import pytest
from accuracy_report import CONFIGURATIONS, Ratio
from conftest import ROOT
from divergence_statistics import Estimate

import fouroversix_plugin as fos
from fouroversix_plugin.recipe import Scheme

# As much of vLLM as is called. 4over6 is near BF16, plain NVFP4 is not, and mae 448 cannot be loaded or hangs.
VLLM = """
import os, sys, time
from types import SimpleNamespace
import torch
__version__ = "0.26.0"

def SamplingParams(**arguments):
    return arguments

def predicted(tokens, place, noise):
    base = torch.randn(40, generator=torch.Generator().manual_seed(sum(tokens[:place])))
    other = torch.randn(40, generator=torch.Generator().manual_seed(sum(tokens[:place]) + 1))
    return (3 * base + noise * other).log_softmax(0)

class LLM:
    def __init__(self, model, max_logprobs, hf_overrides={}, **arguments):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and arguments["enforce_eager"]
        weights = hf_overrides.get("quantization_config", {}).get("weights")
        if weights and weights["metric"] == "mae" and not os.path.exists(os.environ["FAKE_MENDED"]):
            if os.environ.get("FAKE_HANGS"):
                print("hanging", os.getpid(), flush=True)
                time.sleep(300)
            raise RuntimeError("no kernel for mae")
        self.noise = 0.0 if weights is None else 0.4 if weights["adaptive"] else 0.8
        config = SimpleNamespace(model=model, get_vocab_size=lambda: 40, quantization=None)
        self.llm_engine = SimpleNamespace(model_config=config)

    def get_tokenizer(self):
        encode = lambda text, add_special_tokens: [len(word) for word in text.split()]
        return SimpleNamespace(encode=encode)

    def generate(self, prompts, params, use_tqdm):
        if "stop" in params:
            given = [SimpleNamespace(text=f"#### {1000 + i % 7}", finish_reason="stop", token_ids=[1] * 5)
                     for i, _ in enumerate(prompts)]
            return [SimpleNamespace(outputs=[one]) for one in given]
        return [SimpleNamespace(prompt_logprobs=self.flat(prompt["prompt_token_ids"], params)) for prompt in prompts]

    def flat(self, tokens, params):
        flat = SimpleNamespace(start_indices=[0], end_indices=[0], token_ids=[], logprobs=[])
        for place in range(1, len(tokens)):
            row = predicted(tokens, place, self.noise)
            ids = [tokens[place], *row.topk(params["prompt_logprobs"]).indices.tolist()]
            flat.start_indices.append(len(flat.token_ids))
            flat.token_ids += ids
            flat.logprobs += row[ids].tolist()
            flat.end_indices.append(len(flat.token_ids))
        return flat
"""
# A server of SGLang's that gives the same.
SGLANG = """
import json, os, sys
sys.path[:0] = [{tests!r}]
import vllm
from fake_server import FakeServer, Reply, completion
words = sys.argv
flag = "--json-model-override-args"
config = json.loads(words[words.index(flag) + 1]) if flag in words else {{}}
engine = vllm.LLM("model", 6, config, enforce_eager=True)

def answer(path, body):
    if path == "/tokenize":
        return Reply({{"tokens": [len(word) for word in body["prompt"].split()]}})
    if path == "/v1/completions" and os.environ.get("FAKE_REFUSES", "nothing") in body["prompt"][-40:]:
        return Reply({{}}, 400)
    if path == "/v1/completions":
        return completion("#### 1000")
    tokens, start = body["input_ids"], body["logprob_start_len"]
    own, top = [[None, tokens[start], None]], [None]
    for place in range(start + 1, len(tokens)):
        row = vllm.predicted(tokens, place, engine.noise)
        own.append([row[tokens[place]].item(), tokens[place], None])
        top.append([[row[i].item(), i, None] for i in row.topk(body["top_logprobs_num"]).indices.tolist()])
    return Reply({{"text": "", "meta_info": {{"input_token_logprobs": own, "input_top_logprobs": top}}}})

server = FakeServer(answer, int(words[words.index("--port") + 1]))
server.routes["/v1/models"]["data"][0]["owned_by"] = "sglang"
server.serve()
"""
THREE = "bf16,nvfp4-w4a16,nvfp4_4over6-w4a16"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments: two models, questions, examples; and the engines where a process finds them."""
    for package, text in {"vllm": VLLM, "sglang": ""}.items():
        (tmp_path / "site" / package).mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").write_text(text)
    (tmp_path / "site" / "vllm" / "inputs.py").write_text("TokensPrompt = dict\n")
    (tmp_path / "site" / "sglang" / "launch_server.py").write_text(SGLANG.format(tests=str(ROOT / "tests")))
    paths = [str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("FAKE_MENDED", str(tmp_path / "mended"))
    files = {}
    for name, first in (("test", 0), ("train", 50)):
        rows = [
            {
                "question": f"{'q' * (i % 9)} {i} and {i}",
                "answer": " ".join("ab" * (1 + (i * k) % 5) for k in range(9)) + f" #### {i}",
            }
            for i in range(first, first + 30)
        ]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    sources = ["--data", str(files["test"]), "--shots-data", str(files["train"])]
    return [str(tmp_path / "small"), *sources, "--out", str(tmp_path / "out.json"), "--top", "6", "--jobs", "2"]


def result(tmp_path: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((tmp_path / "out.json").read_text())
    return {entry["configuration"]: entry for entry in found["configurations"]}


def test_a_table_and_that_nothing_is_measured_twice(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert accuracy.main([*data, "--configurations", THREE]) == 0
    found, printed = result(tmp_path), capsys.readouterr()
    assert [*found] == THREE.split(",")
    assert printed.err.count("started") == 3
    assert printed.out == (tmp_path / "out.md").read_text()
    assert "KL(BF16 || quantized) in nats over 330 positions of 30 solutions, the 6 most likely" in printed.out
    assert {*found["bf16"]["phases"]} == {"start", "divergence", "gsm8k"}
    plain, ours = (found[name]["divergence"]["figures"]["mean_kl"]["value"] for name in THREE.split(",")[1:])
    assert 0 < ours < 0.5 * plain
    (row,) = [line for line in printed.out.splitlines() if "small, W4A16, 4over6" in line and "at most" in line]
    assert f"{ours / plain:.3f} (" in row
    assert row.rstrip(" |").endswith("yes")
    assert all(entry["gsm8k"]["answered"] == 30 for entry in found.values())
    assert accuracy.main([*data, "--configurations", THREE]) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (printed.out, "")
    assert result(tmp_path) == found
    assert accuracy.main([*data, "--configurations", THREE, "--seed", "1"]) == 1
    assert "was measured with other settings" in capsys.readouterr().err


def test_one_that_fails_leaves_the_others_and_is_measured_alone_when_mended(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*data, "--configurations", "bf16,flashinfer-w4a4,nvfp4-w4a4", "--questions", "0"]
    assert accuracy.main(arguments) == 1
    printed = capsys.readouterr()
    assert "small, mae 448, W4A4: RuntimeError: no kernel for mae" in printed.out
    assert "small, mae 448, W4A4: failed: RuntimeError: no kernel for mae" in printed.err
    assert {name: "divergence" in entry for name, entry in result(tmp_path).items()} == {
        "bf16": False,
        "nvfp4-w4a4": True,
        "flashinfer-w4a4": False,
    }
    (tmp_path / "mended").touch()
    assert accuracy.main(arguments) == 0
    assert capsys.readouterr().err.count("started") == 1
    assert "divergence" in result(tmp_path)["flashinfer-w4a4"]


def test_what_there_is_when_the_time_is_over(tmp_path: Path, data: list[str]) -> None:
    assert accuracy.main([*data, "--configurations", THREE, "--seconds", "0.001"]) == 1
    assert {entry["failed"] for entry in result(tmp_path).values()} == {"0.001 s were over"}


@pytest.mark.parametrize(("engine", "said_in"), [("vllm", "log"), ("sglang", "server.log")])
def test_a_signal_ends_every_process(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch, engine: str, said_in: str
) -> None:
    monkeypatch.setenv("FAKE_HANGS", "1")
    command = [sys.executable, accuracy.__file__, *data, "--configurations", "bf16,flashinfer-w4a4", "--engine", engine]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out.work" / "small-flashinfer-w4a4" / said_in
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and "hanging" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert not Path("/proc", log.read_text().split()[-1]).exists()


def test_sglangs_server_gives_what_vllm_gives(tmp_path: Path, data: list[str]) -> None:
    arguments = [*data, "--configurations", "bf16,nvfp4-w4a16", "--questions", "5"]
    assert accuracy.main(arguments) == 0
    vllm = result(tmp_path)["nvfp4-w4a16"]
    out = tmp_path / "sglang" / "out.json"
    out.parent.mkdir()
    assert accuracy.main([*arguments, "--engine", "sglang", "--out", str(out)]) == 0
    sglang = result(out.parent)["nvfp4-w4a16"]
    assert sglang["divergence"]["documents_sha256"] == vllm["divergence"]["documents_sha256"]
    for name, figure in vllm["divergence"]["figures"].items():
        assert sglang["divergence"]["figures"][name] == pytest.approx(figure, rel=1e-4), name
    assert sglang["gsm8k"]["settings"]["prompt_sha256"] == vllm["gsm8k"]["settings"]["prompt_sha256"]


def test_questions_that_failed_are_asked_again(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*data, "--configurations", "bf16", "--questions", "5", "--engine", "sglang"]
    monkeypatch.setenv("FAKE_REFUSES", "qqqq")
    assert accuracy.main(arguments) == 1
    assert "of 5 requests failed" in capsys.readouterr().err
    assert "gsm8k" not in result(tmp_path)["bf16"]
    monkeypatch.delenv("FAKE_REFUSES")
    assert accuracy.main(arguments) == 0
    assert result(tmp_path)["bf16"]["gsm8k"]["answered"] == 5


@pytest.mark.parametrize("configuration", [name for name in CONFIGURATIONS if name != "bf16"])
def test_configurations_are_whole_schemes(configuration: str) -> None:
    recipe, _, scheme = configuration.rpartition("-")
    config = accuracy_worker.quantization_config(configuration)
    found = Scheme.from_dict(config)
    assert found.weights == fos.preset(recipe).weights
    assert found.activations == (fos.preset(recipe).activations if scheme == "w4a4" else None)


def test_an_aim_needs_a_ratio_and_its_significance() -> None:
    def met(recipe: str, *kl: float) -> bool | None:
        return Ratio("m", "w4a4", recipe, Estimate(*kl)).met

    assert met("nvfp4_4over6", 0.9, 0.8, 0.99) is True
    assert met("nvfp4_4over6", 0.91, 0.9, 0.92) is False
    assert met("nvfp4_4over6", 0.85, 0.6, 1.0) is False
    assert met("flashinfer", 0.85, 0.8, 0.9) is None


def test_orders_of_channels_are_judged_together() -> None:
    def ratio(model: str, kl: float) -> Ratio:
        return Ratio(model, "w4a4", "nvfp4_4over6", Estimate(kl, kl - 0.01, kl + 0.01))

    (found,) = accuracy_report.spreads([ratio("m", 0.64), ratio("m-order-1", 1.0), ratio("other", 0.5)])
    assert (found.model, found.ratios) == ("m", [0.64, 1.0])
    # Logarithms differ by 2 ln 1.25: their standard deviation over the root of two is ln 1.25.
    # Student's t of two values is 12.706.
    assert found.kl == pytest.approx((0.8, 0.8 / 1.25**12.706, 0.8 * 1.25**12.706))
    assert found.met is False, "the interval goes above 1"
    assert accuracy_report.spreads([ratio("m", 0.85), ratio("m-order-1", 0.87)])[0].met is True


def test_an_aim_that_is_not_met_is_said_and_fails(
    data: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy_report, "AIM", 0.01)
    assert accuracy.main([*data, "--configurations", THREE, "--questions", "0"]) == 1
    assert "|  NO |" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["--configurations nvfp4-w4a4", "--configurations bf16,other", "--out x.txt"])
def test_wrong_usage(data: list[str], change: str) -> None:
    with pytest.raises(SystemExit) as ended:
        accuracy.main([*data, *change.split()])
    assert ended.value.code == 2


@pytest.mark.parametrize("flag", ["--data", "--shots-data"])
def test_a_wrong_file_costs_the_start_of_engines_or_stands_in_the_way_of_the_right_one(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert accuracy.main([*data, flag, str(tmp_path / "tset.jsonl")]) == 1
    assert "tset.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out.work").exists()
    for seed in ("0", "1"):  # nothing was measured with the first
        assert accuracy.main([*data, "--seed", seed, "--configurations", "bf16", "--seconds", "0.001"]) == 1
        assert "other settings" not in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint_is_named(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert accuracy.main([str(tmp_path / "absent"), *data[1:]]) == 1
    assert f"{tmp_path / 'absent'} is no checkpoint" in capsys.readouterr().err
