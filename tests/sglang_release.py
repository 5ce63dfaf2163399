"""What the plugin is to a release of SGLang, for the tests: prints it as JSON, in the last line.

"registered": class and runner that SGLang finds by our names. "ignored": the method of each layer that SGLang fuses
from parts of other names, all of which are ignored. "shared": what is said where an ignored expert that all tokens
share is fused with the others. "renamed": what a checkpoint ignores of a model that SGLang names otherwise, by either
name. "updates": by each method that loads new weights, what it answers for a model with a layer of ours, and whether
it goes on with one that has none.
"""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt import server_args  # noqa: E402
from sglang.srt.layers.linear import LinearBase  # noqa: E402
from sglang.srt.layers.moe.moe_runner import MoeRunner, MoeRunnerConfig  # noqa: E402
from sglang.srt.layers.moe.utils import MoeA2ABackend, MoeRunnerBackend  # noqa: E402
from sglang.srt.layers.quantization import get_quantization_config  # noqa: E402
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater  # noqa: E402
from sglang.srt.models.utils import WeightsMapper  # noqa: E402
from sglang.version import __version__  # noqa: E402

import fouroversix_plugin as fos  # noqa: E402
from fouroversix_plugin.serving.sglang import moe, register, runner_module, updates  # noqa: E402
from fouroversix_plugin.serving.sglang.config import FourOverSixConfig  # noqa: E402
from fouroversix_plugin.serving.sglang.linear import DONE  # noqa: E402


def ignoring(*patterns: str) -> fos.Scheme:
    return replace(fos.preset("w4a16"), ignore=patterns)


def registered() -> list[str]:
    register()
    assert server_args.QUANTIZATION_CHOICES.count("nvfp4_4over6") == 1
    assert server_args.MOE_RUNNER_BACKEND_CHOICES.count("fouroversix") == 1
    runner = runner_module().make(MoeRunnerConfig())
    assert isinstance(runner, MoeRunner)
    assert runner.fused_func is None
    return [get_quantization_config("nvfp4_4over6").__name__, runner.runner_backend.value]


def ignored() -> dict[str, str]:
    config = FourOverSixConfig(ignoring("*.[qkv]_proj", "*.in_proj_qkv", "*.in_proj_[abz]"))
    linear = LinearBase.__new__(LinearBase)
    fused = ("self_attn.qkv_proj", "linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba")
    return {name: type(config.get_quant_method(linear, f"model.layers.0.{name}")).__name__ for name in fused}


def renamed() -> dict[str, bool]:
    config = FourOverSixConfig()
    # In SGLang's order: the checkpoint comes last.
    config.apply_weight_name_mapper(
        WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."})
    )
    scheme = ignoring("model.language_model.layers.0.mlp.up_proj")
    config._adopt("model", {"quantization_config": scheme.to_dict()}, None)
    names = ("language_model.model", "model.language_model", "visual")
    return {name: config.scheme.ignores(f"{name}.layers.0.mlp.up_proj") for name in names}


def shared() -> dict[str, str]:
    moe.get_moe_runner_backend = lambda: MoeRunnerBackend("auto")
    moe.get_moe_a2a_backend = lambda: MoeA2ABackend("none")
    layer = SimpleNamespace(num_experts=5, num_fused_shared_experts=1, moe_runner_config=MoeRunnerConfig())
    said = {}
    for name in ("shared_experts", "shared_expert"):
        try:
            scheme = ignoring(f"*.{name}.*")
            moe.method_for(layer, "model.layers.0.mlp.experts", scheme, moe.neutral.LoadReport(), None, False)
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    return said


def updated() -> dict[str, list[Any]]:
    models = [torch.nn.Sequential(torch.nn.Linear(1, 1)) for _ in range(2)]
    setattr(models[0][0], DONE, "layer 7")
    ours, others = (SimpleNamespace(get_model=lambda model=model: model) for model in models)
    names = [name for name in dir(WeightUpdater) if name.startswith(("update_weights_from", "load_weights_from"))]
    on = updates.refuse_ours(lambda *given: "went on", others, "anything")
    return {name: [getattr(WeightUpdater, name)(ours, "anything"), on] for name in names}


if __name__ == "__main__":
    found = {"ignored": ignored(), "renamed": renamed(), "shared": shared(), "updates": updated()}
    print(json.dumps({"version": __version__, "registered": registered(), **found}))
