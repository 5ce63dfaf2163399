"""What the plugin tells vLLM without an engine, as JSON; in a process of its own, as vLLM imports much."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ReplicatedLinear

import fouroversix_plugin as fos
from fouroversix_plugin.formats import MODELOPT
from fouroversix_plugin.kernels.invariance import is_batch_invariant
from fouroversix_plugin.kernels.ops import PreparedWeight
from fouroversix_plugin.serving.layer import LoadReport
from fouroversix_plugin.serving.vllm import linear, moe
from fouroversix_plugin.serving.vllm.config import FourOverSixConfig


def method(ignore: str, prefix: str) -> str:
    config = FourOverSixConfig(fos.Scheme(ignore=(ignore,)))
    return type(config.get_quant_method(ReplicatedLinear.__new__(ReplicatedLinear), prefix)).__name__


def experts(ignore: str, prefix: str) -> str:
    names = {f"ckpt_{name}_proj_name": name for name in ("gate", "up", "down")}
    layer = SimpleNamespace(**names, global_num_experts=2, moe_config=None)
    originals = moe.UnquantizedFusedMoEMethod, moe.OnlineMoEMethod
    moe.UnquantizedFusedMoEMethod, moe.OnlineMoEMethod = (lambda *_: "left alone"), (lambda *_: "quantized")
    try:
        return str(moe.method_for(layer, prefix, fos.Scheme(ignore=(ignore,)), LoadReport(), None))
    finally:
        moe.UnquantizedFusedMoEMethod, moe.OnlineMoEMethod = originals


def cache_method(stored: bool, dtype: str) -> str:
    config, layer = FourOverSixConfig(), Attention.__new__(Attention)
    config.stored = MODELOPT if stored else None
    layer.kv_cache_dtype = dtype
    return type(config.get_quant_method(layer, "model.layers.0.self_attn.attn")).__name__


def key(*weights: PreparedWeight) -> str:
    config, layer = VllmConfig(), torch.nn.Module()
    for prepared in weights:
        linear.install(layer, "", prepared, config)
    return str(config.compute_hash())


def invariant(variable: str) -> bool:
    with mock.patch.dict(os.environ, {"VLLM_BATCH_INVARIANT": variable}):
        method("", "model.layers.0.mlp")
    return is_batch_invariant()


def refusal(call: Callable[[], Any], load_format: str = "auto") -> str:
    try:
        with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format=load_format))):
            call()
    except ValueError as error:
        return str(error)
    return ""


def with_options_of_vllm(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    config = FourOverSixConfig()
    config.online_quantization_config = object()  # where vLLM puts --quantization-config
    config.maybe_update_config(str(folder))


def main() -> dict[str, Any]:
    packed, expanded = torch.zeros(16, 8, dtype=torch.uint8), torch.zeros(16, 16, dtype=torch.bfloat16)
    scale, rows = torch.zeros(16, 1, dtype=torch.uint8), torch.zeros(16)
    one, other = PreparedWeight(packed, scale, rows), PreparedWeight(expanded, None, rows)
    tiles = PreparedWeight(packed.view(2, 8, 8), scale, rows)
    with TemporaryDirectory() as folder:
        return {
            "linear": [method(*names) for names in NAMES],
            "experts": [experts(*names) for names in NAMES],
            "cache": [
                *(cache_method(True, dtype) for dtype in ("fp8", "fp8_e5m2", "auto")),
                cache_method(False, "fp8"),
            ],
            "keys": [key(one), key(one, one), key(other), key(tiles), key(one, other)],
            "invariant": [invariant(variable) for variable in "01"],
            "online": refusal(lambda: linear.check_loading("layer", 1), "sharded_state"),
            "stored": refusal(lambda: linear.check_loads_weights("layer"), "sharded_state"),
            "usual": refusal(lambda: linear.check_loading("layer", 1)),
            "options": refusal(lambda: with_options_of_vllm(Path(folder))),
        }


NAMES = [
    ("model.layers.0.*", "model.layers.0.mlp"),
    ("model.layers.0.*", "draft_model.model.layers.0.mlp"),
    ("layers.0.*", "model.layers.0.mlp"),
    ("layers.0.*", "draft_model.model.layers.0.mlp"),
    ("layers.0.*", "language_model.layers.0.mlp"),
    ("model.layers.0.*", "draft_model.model.layers.1.mlp"),
]

if __name__ == "__main__":
    print(json.dumps(main()))
