"""The MoE runner in SGLang's own registry (0.5.19 and later)."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.moe.moe_runner import MoeRunner, register_moe_runner_core
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore
from sglang.srt.layers.moe.utils import resolve_moe_runner_backend

from fouroversix_plugin.serving.sglang import RUNNER
from fouroversix_plugin.serving.sglang.moe import run_experts


class RunnerCore(DispatchMoeRunnerCore):
    """What SGLang's MoeRunner calls for ``--moe-runner-backend fouroversix``."""

    @property
    def runner_backend(self) -> Any:
        return resolve_moe_runner_backend(RUNNER)

    def run_from_dispatch(self, dispatch_output: Any, quant_info: Any, runner_config: Any, hooks: Any = None) -> Any:
        return run_experts(dispatch_output, quant_info, runner_config)


def register() -> None:
    """Make the name known."""
    register_moe_runner_core(RUNNER, RunnerCore)


def make(config: Any) -> Any:
    """A runner for one layer."""
    return MoeRunner(resolve_moe_runner_backend(RUNNER), config)
