"""The config files of a quantized checkpoint, in the words of whose format it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fouroversix_plugin.checkpoint.plan import Plan
from fouroversix_plugin.formats import MODELOPT, OURS
from fouroversix_plugin.recipe import BLOCK_SIZE


def config(plan: Plan) -> dict[str, Any]:
    """``config.json``: the source's, with the block that the plan's format has for our weights."""

    def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: without_quantization(value) if key == "text_config" and isinstance(value, Mapping) else value
            for key, value in config.items()
            if key not in ("quantization_config", "compression_config")
        }

    blocks = {OURS.name: plan.scheme.to_dict, MODELOPT.name: lambda: _modelopt_block(plan)}
    block = blocks.get(plan.format.name, lambda: _compressed_tensors_block(plan))()
    return {**without_quantization(plan.source.checkpoint.config), "quantization_config": block}


def _left_alone(plan: Plan) -> list[str]:
    """Linear modules by name: what other loaders need, whose patterns mean other things than ours."""
    alone = [alone for alone in plan.left_alone if alone.linear]
    return sorted({a.name for a in alone} | {a.holder for a in alone if a.holder is not None})


def _modelopt_block(plan: Plan) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "group_size": BLOCK_SIZE, "dynamic": False}
    return {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4",
        "group_size": BLOCK_SIZE,
        "ignore": _left_alone(plan),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "producer": dict(plan.scheme.producer),
    }


def hf_quant_config(plan: Plan) -> dict[str, Any]:
    """``hf_quant_config.json``, where loaders of ModelOpt's older exports look."""
    return {
        "producer": dict(plan.scheme.producer),
        "quantization": {
            "quant_algo": "W4A16_NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": BLOCK_SIZE,
            "exclude_modules": _left_alone(plan),
        },
    }


def _compressed_tensors_block(plan: Plan) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": BLOCK_SIZE,
        "symmetric": True,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": _left_alone(plan),
    }
