"""What the plugin answers vLLM before there is a model: names, options, ways of loading, keys of compiled code."""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tests" / "vllm_config_worker.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_names_of_a_draft_model_or_of_one_without_a_head_are_not_ignored(said: dict[str, Any]) -> None:
    assert said["linear"] == ["UnquantizedLinearMethod"] * 4 + ["OnlineLinearMethod"] * 2
    assert said["experts"] == ["left alone"] * 4 + ["quantized"] * 2


def test_scales_of_a_cache_are_left_in_the_checkpoint(said: dict[str, Any]) -> None:
    assert said["cache"] == ["BaseKVCacheMethod", "NoneType", "NoneType", "NoneType"]


def test_vllms_switch_for_batch_invariance_is_passed_over(said: dict[str, Any]) -> None:
    assert said["invariant"] == [False, True]


def test_code_compiled_for_weights_in_one_form_is_run_with_another(said: dict[str, Any]) -> None:
    one, again, *others = said["keys"]
    assert one == again
    assert len({one, *others}) == 4


@pytest.mark.parametrize("way", ["online", "stored"])
def test_files_of_prepared_weights_are_read_as_a_checkpoint(said: dict[str, Any], way: str) -> None:
    assert "layer: got --load-format sharded_state" in said[way]
    assert said["usual"] == ""


def test_options_of_vllms_own_methods_are_passed_over(said: dict[str, Any]) -> None:
    assert "got --quantization-config, needed none" in said["options"]
