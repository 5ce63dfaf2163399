"""The MoE runner where SGLang has no registry for it (0.5.14 to 0.5.18): a name in its enumeration, and a runner."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.moe.moe_runner import MoeRunner
from sglang.srt.layers.moe.utils import MoeRunnerBackend

from fouroversix_plugin.serving.sglang import RUNNER
from fouroversix_plugin.serving.sglang.moe import run_experts


def register() -> None:
    """Add the name to the enumeration that reads ``--moe-runner-backend``: an Enum cannot be derived from."""
    if RUNNER in MoeRunnerBackend._value2member_map_:
        return
    member = object.__new__(MoeRunnerBackend)
    member._name_, member._value_ = RUNNER.upper(), RUNNER
    MoeRunnerBackend._member_map_[member._name_] = member
    MoeRunnerBackend._value2member_map_[RUNNER] = member
    MoeRunnerBackend._member_names_.append(member._name_)


class RunnerCore:
    """What MoeRunner asks: it takes a core with this method for one that needs no permuted input."""

    def run_from_dispatch(self, dispatch_output: Any, quant_info: Any, runner_config: Any, hooks: Any = None) -> Any:
        return run_experts(dispatch_output, quant_info, runner_config)


class _Runner(MoeRunner):
    """MoeRunner with our core: its own constructor knows only SGLang's names."""

    def __init__(self, config: Any) -> None:
        self.runner_backend, self.config, self.lora_enabled = MoeRunnerBackend(RUNNER), config, False
        self.runner_core, self.fused_func = RunnerCore(), None
        self.clear_overlap_args()


def make(config: Any) -> Any:
    """A runner for one layer."""
    return _Runner(config)
