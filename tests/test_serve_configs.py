"""configs/serve: every file is a command line that this machine's vLLM accepts and understands."""

from pathlib import Path

import pytest
from conftest import ROOT

CONFIGS = sorted((ROOT / "configs" / "serve").glob("vllm-*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_vllm_refuses_a_config(path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (scripts/setup.sh installs its CPU build)")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--host")  # the server's, not the engine's
    options = parser.parse_args(["--model", "MODEL", "--config", str(path)])
    arguments = AsyncEngineArgs.from_cli_args(options)
    overrides = arguments.hf_overrides.get("quantization_config", {})
    if path.stem != "vllm-cpu":  # whose flag stands in its command
        assert "nvfp4_4over6" in (arguments.quantization, overrides.get("quant_method"))
    assert overrides.get("recipe") == ("w4a16" if path.stem == "vllm-w4a16" else None)
