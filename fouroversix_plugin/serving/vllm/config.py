"""The quantization config vLLM asks about every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm import envs
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from fouroversix_plugin.checkpoint.files import HF_QUANT_CONFIG
from fouroversix_plugin.formats import Format
from fouroversix_plugin.recipe import QUANT_METHOD, Scheme, preset
from fouroversix_plugin.serving.layer import LoadReport, follow_batch_invariance
from fouroversix_plugin.serving.scheme import claims, fused_shards, served
from fouroversix_plugin.serving.vllm.linear import OnlineLinearMethod, StoredLinearMethod, spellings


class FourOverSixConfig(QuantizationConfig):
    """Scheme of the model, and whether its checkpoint holds packed weights (stored) or full-precision ones (online)."""

    def __init__(self, scheme: Scheme | None = None) -> None:
        super().__init__()
        self.asked = scheme
        self.scheme = preset(QUANT_METHOD) if scheme is None else scheme
        self.stored: Format | None = None
        self.report = LoadReport()

    def __repr__(self) -> str:
        kind = "online" if self.stored is None else f"stored by {self.stored.name}"
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
        # Another method's block is a checkpoint's own, not something asked for: maybe_update_config reads that.
        return cls(Scheme.from_options(config) if config.get("quant_method") == QUANT_METHOD else None)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        return QUANT_METHOD if claims(hf_quant_cfg, user_quant) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Look into the checkpoint's own files: options of --hf-overrides reach ``from_config`` like its block."""
        if getattr(self, "online_quantization_config", None) is not None:
            raise ValueError(
                f"{model_name}: got --quantization-config, needed none: it is for vLLM's own methods; options of "
                f"{QUANT_METHOD} go into --hf-overrides"
            )
        on_disk = get_hf_file_to_dict("config.json", model_name, revision)
        older = get_hf_file_to_dict(HF_QUANT_CONFIG, model_name, revision)
        found = served(model_name, self.asked, on_disk, older)
        self.scheme, self.stored, self.report.claimed = found.scheme, found.stored, found.claimed

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Spell the ignore list as this model's vLLM class spells its modules; both spellings stay."""
        mapped = tuple(hf_to_vllm_mapper.apply_list(list(self.scheme.ignore)))
        self.scheme = replace(self.scheme, ignore=tuple(dict.fromkeys(self.scheme.ignore + mapped)))

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        # Here, as nothing else of a config is called wherever layers are made: workers are given copies of it.
        follow_batch_invariance(envs.VLLM_BATCH_INVARIANT, "VLLM_BATCH_INVARIANT")
        if isinstance(layer, LinearBase):
            if any(self.scheme.ignores(n, fused_shards(n, self.packed_modules_mapping)) for n in spellings(prefix)):
                return UnquantizedLinearMethod()
            if self.stored is None:
                return OnlineLinearMethod(self.scheme, self.report, prefix)
            return StoredLinearMethod(self.scheme, self.report, prefix, self.stored)
        if isinstance(layer, (Attention, MLAAttention)):
            # Scales of a KV cache in FP8, which some checkpoints ask for. vLLM has e5m2 without any.
            cached_as = str(layer.kv_cache_dtype)
            scaled = cached_as.startswith("fp8") and cached_as != "fp8_e5m2"
            return BaseKVCacheMethod(self) if self.stored and scaled else None
        # Experts are known by the name of their class or a parent's, and the MoE half is imported where it is needed: a
        # class renamed there must not cost dense models the plugin.
        if all(parent.__name__ != "RoutedExperts" for parent in type(layer).__mro__):
            return None
        from fouroversix_plugin.serving.vllm import moe

        return moe.method_for(layer, prefix, self.scheme, self.report, self.stored)
