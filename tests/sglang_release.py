"""What the plugin is to a release of SGLang, for the tests: prints it as JSON, in the last line.

"registered": class and runner that SGLang finds by our names. "updates": by each method that loads new weights, what it
answers for a model with a layer of ours, and whether it goes on with one that has none.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt import server_args  # noqa: E402
from sglang.srt.layers.moe.moe_runner import MoeRunner, MoeRunnerConfig  # noqa: E402
from sglang.srt.layers.quantization import get_quantization_config  # noqa: E402
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater  # noqa: E402
from sglang.version import __version__  # noqa: E402

from fouroversix_plugin.serving.sglang import register, runner_module, updates  # noqa: E402
from fouroversix_plugin.serving.sglang.linear import DONE  # noqa: E402


def registered() -> list[str]:
    register()
    assert server_args.QUANTIZATION_CHOICES.count("nvfp4_4over6") == 1
    assert server_args.MOE_RUNNER_BACKEND_CHOICES.count("fouroversix") == 1
    runner = runner_module().make(MoeRunnerConfig())
    assert isinstance(runner, MoeRunner)
    assert runner.fused_func is None
    return [get_quantization_config("nvfp4_4over6").__name__, runner.runner_backend.value]


def updated() -> dict[str, list[Any]]:
    models = [torch.nn.Sequential(torch.nn.Linear(1, 1)) for _ in range(2)]
    setattr(models[0][0], DONE, "layer 7")
    ours, others = (SimpleNamespace(get_model=lambda model=model: model) for model in models)
    names = [name for name in dir(WeightUpdater) if name.startswith(("update_weights_from", "load_weights_from"))]
    on = updates.refuse_ours(lambda *given: "went on", others, "anything")
    return {name: [getattr(WeightUpdater, name)(ours, "anything"), on] for name in names}


if __name__ == "__main__":
    found = {"registered": registered(), "updates": updated()}
    print(json.dumps({"version": __version__, **found}))
