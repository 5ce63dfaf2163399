"""Loads models with SGLang for the tests, in a process of its own: ``sglang_worker.py REQUEST OUT``.

REQUEST is JSON: {name: {"model": folder, "flags": of launch_server, "layers": names}}, and "draft", the folder of a
draft model to load for that model in its place. What loads is what a server loads, by SGLang's own arguments,
configuration and loader. OUT gets {name: {"log": our log lines, "most_held": full-precision weights held at once,
"cache": [scale of k, of v] of each layer whose cache has any} or {"error": text}}; NAME.safetensors beside it gets
what each of the layers was given and gave: LAYER/x, LAYER/y, and of experts LAYER/topk_weights and LAYER/topk_ids,
LAYER/each with every expert's own answer, LAYER/scaled, what a GPU's runner makes of routed_scaling_factor = 2.5, and
LAYER/on_input, that of one expert a token whose router weight goes onto the input.
"""

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from log_lines import Lines
from safetensors.torch import save_file
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.model_loader import get_model
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import prepare_server_args

from fouroversix_plugin.serving import arriving
from fouroversix_plugin.serving.sglang import moe

FLAGS = ["--device", "cpu", "--skip-tokenizer-init", "--attention-backend", "torch_native"]


class Watch:
    """Sees how many full-precision weights are in memory at once."""

    def __init__(self) -> None:
        self.most_held = 0
        original = arriving.quantize_weight

        def counting(*given: Any) -> Any:
            alive = sum(weight._data.untyped_storage().nbytes() > 0 for weight in self.weights)
            self.most_held = max(self.most_held, alive)
            return original(*given)

        arriving.quantize_weight = counting
        self.weights: list[Any] = []
        init = arriving.ArrivingWeight.__init__

        def noting(weight: Any, *given: Any) -> None:
            init(weight, *given)
            self.weights.append(weight)

        arriving.ArrivingWeight.__init__ = noting

    def start(self) -> None:
        self.weights, self.most_held = [], 0


def run(job: dict[str, Any], out: Path, watch: Watch, first: bool) -> dict[str, Any]:
    lines = Lines()
    logger = logging.getLogger("fouroversix_plugin")
    logger.addHandler(lines)
    watch.start()
    try:
        args = prepare_server_args(["--model-path", job["model"], *FLAGS, *job.get("flags", [])])
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        draft = job.get("draft")
        config = ModelConfig.from_server_args(args, model_path=draft, is_draft_model=draft is not None)
        if first:
            bootstrap.init_parallel_runtime(server_args=args, device="cpu", dist_port=0)
        bootstrap.init_layer_runtime(model_config=config)
        initialize_moe_config()
        load = LoadConfig(load_format=args.load_format)
        model = get_model(model_config=config, load_config=load, device_config=DeviceConfig("cpu"))
        captured = {}
        for name in job.get("layers", ()):
            captured |= apply(name, model.get_submodule(name))
        if captured:
            save_file(captured, out)
        caches = [part for part in model.modules() if getattr(part, "k_scale_float", None) is not None]
        cache = [[part.k_scale_float, part.v_scale_float] for part in caches]
        return {"log": lines.lines, "most_held": watch.most_held, "cache": cache}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        logger.removeHandler(lines)


TOKENS = 7


@torch.no_grad()
def apply(name: str, layer: Any) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    if not hasattr(layer, "moe_runner_config"):
        x = torch.randn(TOKENS, layer.input_size, generator=random).to(layer.params_dtype)
        return {f"{name}/x": x, f"{name}/y": layer(x)[0]}
    x = torch.randn(TOKENS, layer.hidden_size, generator=random).to(layer.params_dtype)
    logits = torch.randn(TOKENS, layer.num_experts, generator=random)
    weights, ids = logits.softmax(-1).topk(layer.top_k)
    ids = ids.to(torch.int32)
    ids[-1, -1] = -1
    seen = {"x": x, "topk_weights": weights, "topk_ids": ids, "y": layer(x, StandardTopKOutput(weights, ids, logits))}

    def changed(weights: torch.Tensor, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        config = dataclasses.replace(layer.moe_runner_config, **settings)
        layer.quant_method.create_moe_runner(layer, config)
        y = layer(x, StandardTopKOutput(weights, ids, logits))
        layer.quant_method.create_moe_runner(layer, layer.moe_runner_config)
        return y

    seen["each"] = changed(weights, ids, no_combine=True, inplace=False)
    one = [part[:, :1].contiguous() for part in (weights, ids)]
    seen["on_input"] = changed(*one, top_k=1, apply_router_weight_on_input=True)
    moe.RUNNERS_SCALE = True
    seen["scaled"] = changed(weights, ids, routed_scaling_factor=2.5)
    moe.RUNNERS_SCALE = False
    return {f"{name}/{key}": tensor for key, tensor in seen.items()}


def main(request_file: Path, out: Path) -> None:
    load_plugins()
    watch = Watch()
    results: dict[str, Any] = {}
    for name, job in json.loads(request_file.read_text()).items():
        results[name] = run(job, out.with_name(f"{name}.safetensors"), watch, first=not results)
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
