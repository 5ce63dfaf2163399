"""The quantization config vLLM asks about every layer."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from fouroversix_plugin.checkpoint.files import HF_QUANT_CONFIG
from fouroversix_plugin.formats import FOUROVERSIX, OURS, Format, Stored, describe, quantization_block, stored_scheme
from fouroversix_plugin.recipe import QUANT_METHOD, Scheme, preset
from fouroversix_plugin.serving.layer import LoadReport
from fouroversix_plugin.serving.vllm.linear import OnlineLinearMethod, StoredLinearMethod

logger = logging.getLogger(__name__)


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
        """Claim NVFP4 checkpoints of others where the user asks for our method, and those no engine loads.

        vLLM asks this for every checkpoint, so it never raises: what is wrong with one is said when it is ours.
        """
        if not isinstance(hf_quant_cfg, dict):
            return None
        method = hf_quant_cfg.get("quant_method")
        if method == FOUROVERSIX.name and user_quant in (None, QUANT_METHOD):
            return QUANT_METHOD
        return QUANT_METHOD if user_quant == QUANT_METHOD and method != QUANT_METHOD else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Tell a stored checkpoint from a full-precision one by what its own config.json says.

        ``from_config`` cannot: options given by --hf-overrides reach it like a checkpoint's block.
        """
        on_disk = get_hf_file_to_dict("config.json", model_name, revision)
        if on_disk is None:
            raise ValueError(f"{model_name}: config.json not found, needed to see how the weights are stored")
        older = get_hf_file_to_dict(HF_QUANT_CONFIG, model_name, revision)
        block = quantization_block(on_disk, older)
        if block is None:
            self.stored = None
            if self.scheme.input_scale == "static":
                raise ValueError(
                    f"{model_name}: got a full-precision checkpoint for static activations, needed one with calibrated "
                    "input scales; quantize activations per token"
                )
            return
        found = stored_scheme(block)
        if found is None:
            raise ValueError(
                f"{model_name}: already quantized ({describe(block)}), needed full precision or NVFP4 (nvfp4_4over6, "
                f"modelopt, compressed-tensors, fouroversix); serve it without --quantization {QUANT_METHOD}"
            )
        self._adopt(found, model_name)

    def _adopt(self, found: Stored, model_name: str) -> None:
        """Take the weights as they are stored; activations as asked for, else as the checkpoint says.

        A foreign W4A4 checkpoint says "static, plain NVFP4". Unless that is asked for (the preset ``nvfp4_static``),
        its activations are quantized per token with Four over Six.
        """
        ours = found.format is OURS
        if ours and self.scheme.weights != found.scheme.weights:
            raise ValueError(
                f"{model_name}: weights were quantized with {found.scheme.weights}, options ask for "
                f"{self.scheme.weights}; only `activations` of a quantized checkpoint can be changed"
            )
        if self.asked is not None and self.asked.ignore != found.scheme.ignore:
            logger.info("fouroversix: the checkpoint's own `ignore` list applies, not the one of the options")
        activations = self.scheme
        if self.asked is None and (ours or found.format is FOUROVERSIX or found.scheme.activations is None):
            activations = found.scheme
        if activations.input_scale == "static" and "input_scale" not in found.format.names:
            raise ValueError(
                f"{model_name}: got static activations for a checkpoint of {found.format.name}, which has no input "
                "scales; quantize activations per token"
            )
        self.stored = found.format
        self.report.claimed = found.scheme.weights if found.labelled else None
        self.scheme = replace(found.scheme, activations=activations.activations, input_scale=activations.input_scale)
        logger.info(
            "fouroversix: weights as stored by %s%s; activations: %s",
            found.format.name,
            f" ({found.scheme.weights})" if found.labelled else "",
            _activations(self.scheme),
        )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Spell the ignore list as this model's vLLM class spells its modules; both spellings stay."""
        mapped = tuple(hf_to_vllm_mapper.apply_list(list(self.scheme.ignore)))
        self.scheme = replace(self.scheme, ignore=tuple(dict.fromkeys(self.scheme.ignore + mapped)))

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            if self.scheme.ignores(prefix, _fused_shards(prefix, self.packed_modules_mapping)):
                return UnquantizedLinearMethod()
            if self.stored is None:
                return OnlineLinearMethod(self.scheme, self.report, prefix)
            return StoredLinearMethod(self.scheme, self.report, prefix, self.stored)
        # Experts are known by the name of their class or a parent's, and the MoE half is imported where it is needed: a
        # class renamed there must not cost dense models the plugin.
        if all(parent.__name__ != "RoutedExperts" for parent in type(layer).__mro__):
            return None
        from fouroversix_plugin.serving.vllm import moe

        return moe.method_for(layer, prefix, self.scheme, self.report, self.stored)


def _activations(scheme: Scheme) -> str:
    if scheme.activations is None:
        return "not quantized (W4A16)"
    how = "by the checkpoint's static input_scale" if scheme.input_scale == "static" else "per token"
    return f"{scheme.activations}, {how} (W4A4)"


def _fused_shards(prefix: str, mapping: dict[str, list[str]]) -> list[str]:
    """Checkpoint names of what a fused layer is made of: …qkv_proj → …q_proj, …k_proj, …v_proj."""
    parent, _, name = prefix.rpartition(".")
    return [f"{parent}.{shard}" if parent else shard for shard in mapping.get(name, ())]
