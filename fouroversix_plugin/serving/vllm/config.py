"""The quantization config vLLM asks about every layer."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from fouroversix_plugin.recipe import QUANT_METHOD, Scheme, preset
from fouroversix_plugin.serving.layer import LoadReport
from fouroversix_plugin.serving.vllm.linear import OnlineLinearMethod, StoredLinearMethod

logger = logging.getLogger(__name__)


class FourOverSixConfig(QuantizationConfig):
    """Scheme of the model, and whether its checkpoint holds packed weights (stored) or full-precision ones (online)."""

    def __init__(self, scheme: Scheme | None = None) -> None:
        super().__init__()
        self.scheme = preset(QUANT_METHOD) if scheme is None else scheme
        self.stored = False
        self.report = LoadReport()

    def __repr__(self) -> str:
        kind = "stored" if self.stored else "online"
        return f"FourOverSixConfig({self.scheme.name}, {kind}, weights {self.scheme.weights})"

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        # With none named, vLLM builds the default config for a checkpoint that has no quantization_config.
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FourOverSixConfig:
        return cls(Scheme.from_options(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Tell a stored checkpoint from a full-precision one by what its own config.json says.

        ``from_config`` cannot: options given by --hf-overrides reach it like a checkpoint's block.
        """
        on_disk = get_hf_file_to_dict("config.json", model_name, revision)
        if on_disk is None:
            raise ValueError(f"{model_name}: config.json not found, needed to see how the weights are stored")
        block = on_disk.get("quantization_config") or (on_disk.get("text_config") or {}).get("quantization_config")
        if block is None:
            self.stored = False
            return
        if block.get("quant_method") != QUANT_METHOD:
            raise ValueError(
                f"{model_name}: already quantized by {block.get('quant_method')!r}, needed a full-precision or "
                f"{QUANT_METHOD} checkpoint; serve it without --quantization {QUANT_METHOD}"
            )
        found = Scheme.from_dict(block)
        if self.scheme.weights != found.weights:
            raise ValueError(
                f"{model_name}: weights were quantized with {found.weights}, options ask for {self.scheme.weights}; "
                "only `activations` of a quantized checkpoint can be changed"
            )
        if self.scheme.ignore != found.ignore:
            logger.info("fouroversix: the checkpoint's own `ignore` list applies, not the one of the options")
        self.stored = True
        self.scheme = replace(self.scheme, ignore=found.ignore)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Spell the ignore list as this model's vLLM class spells its modules; both spellings stay."""
        mapped = tuple(hf_to_vllm_mapper.apply_list(list(self.scheme.ignore)))
        self.scheme = replace(self.scheme, ignore=tuple(dict.fromkeys(self.scheme.ignore + mapped)))

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            if self.scheme.ignores(prefix, _fused_shards(prefix, self.packed_modules_mapping)):
                return UnquantizedLinearMethod()
            return (StoredLinearMethod if self.stored else OnlineLinearMethod)(self.scheme, self.report, prefix)
        # Experts are known by the name of their class or a parent's, and the MoE half is imported where it is needed: a
        # class renamed there must not cost dense models the plugin.
        if all(parent.__name__ != "RoutedExperts" for parent in type(layer).__mro__):
            return None
        from fouroversix_plugin.serving.vllm import moe

        return moe.method_for(layer, prefix, self.scheme, self.report, self.stored)


def _fused_shards(prefix: str, mapping: dict[str, list[str]]) -> list[str]:
    """Checkpoint names of what a fused layer is made of: …qkv_proj → …q_proj, …k_proj, …v_proj."""
    parent, _, name = prefix.rpartition(".")
    return [f"{parent}.{shard}" if parent else shard for shard in mapping.get(name, ())]
