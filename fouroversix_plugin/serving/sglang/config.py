"""The quantization config SGLang asks about every layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import RadixAttention
from transformers.utils import cached_file

from fouroversix_plugin.checkpoint.files import HF_QUANT_CONFIG, read_json
from fouroversix_plugin.formats import Format
from fouroversix_plugin.recipe import QUANT_METHOD, Scheme, preset
from fouroversix_plugin.serving.layer import LoadReport, follow_batch_invariance, refuse_offloading
from fouroversix_plugin.serving.module import refuse_random_bytes
from fouroversix_plugin.serving.scheme import claims, fused_shards, served
from fouroversix_plugin.serving.sglang import server_args
from fouroversix_plugin.serving.sglang.linear import OnlineLinearMethod, StoredLinearMethod, spellings

_FUSED: Final[Mapping[str, list[str]]] = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj_with_mqa": ["q_a_proj", "kv_a_proj_with_mqa"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
}
"""What SGLang's models fuse; few of its classes say so themselves."""

_NOT_PACKED: Final[Mapping[str, str]] = {
    "*.kv_b_proj": "SGLang's latent attention multiplies by this weight itself; quantize with --ignore '*.kv_b_proj'",
    "*.fused_qkv_a_proj_with_mqa": "SGLang fuses q_a_proj and kv_a_proj_with_mqa and keeps the scale of one; quantize "
    "with --ignore '*.q_a_proj' --ignore '*.kv_a_proj_with_mqa'",
}
"""Globs of layers that cannot hold a checkpoint's packed weights, and why."""

_NOT_PACKED_IN: Final[Mapping[str, Mapping[str, str]]] = {
    "Llama4ForConditionalGeneration": {
        "language_model.*.self_attn.qkv_proj": "SGLang's model puts rows of q_proj and k_proj into another order, but "
        "only those of full precision; quantize with --ignore '*.self_attn.[qkv]_proj'",
    },
}
"""More of them in one architecture."""

_READ_WEIGHT: Final = {"Dots3NoteForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM"}
"""Models that read the dtype of `weight` of their shared experts, which not all who pack weights call so."""

_BUILT_UNQUANTIZED: Final[Mapping[str, tuple[str, ...]]] = {
    "FalconH1ForCausalLM": ("mamba", "in_proj", "out_proj"),
    "StableLmForCausalLM": ("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
}
"""A part of every layer that a model builds without asking for a method, and the linear layers in it."""


class _AskedByModels:
    """What some models ask every method for, although SGLang's own base class does not have it."""

    def get_cache_scale(self, name: str) -> None:
        """The scale of a KV cache that the tensor ``name`` is: none is one."""


class FourOverSixConfig(_AskedByModels, QuantizationConfig):
    """Scheme of the model, and whether its checkpoint holds packed weights (stored) or full-precision ones (online)."""

    def __init__(self, scheme: Scheme | None = None) -> None:
        super().__init__()
        self.asked = scheme
        self.scheme = preset(QUANT_METHOD) if scheme is None else scheme
        self.stored: Format | None = None
        self.random_weights = False
        self.packs_experts = False
        self.not_packed = _NOT_PACKED
        self._in_sglangs_names: Callable[[list[str]], list[str]] = list
        self.report = LoadReport()
        self._unnamed = itertools.count(1)

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
        # With none named, SGLang builds the default config for a checkpoint that has no quantization_config.
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FourOverSixConfig:
        # Another method's block is a checkpoint's own, not something asked for: see_checkpoint reads that.
        if config.get("quant_method") != QUANT_METHOD:
            return cls()
        return cls(Scheme.from_options({key: config[key] for key in config if key not in _ADDED}))

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None) -> str | None:
        return QUANT_METHOD if claims(hf_quant_cfg, user_quant) else None

    def _adopt(self, name: str, config: Mapping[str, Any] | None, older: Mapping[str, Any] | None) -> None:
        """Look into the checkpoint's own files: overrides of its config reach ``from_config`` like its block."""
        found = served(name, self.asked, config, older)
        self.stored, self.report.claimed = found.stored, found.claimed
        ignore = list(found.scheme.ignore)
        # Both spellings: SGLang's models do not agree on where a name begins.
        self.scheme = replace(found.scheme, ignore=tuple(dict.fromkeys([*ignore, *self._in_sglangs_names(ignore)])))

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Remember how this model's SGLang class spells modules: the checkpoint's ignore list is not known yet."""
        self._in_sglangs_names = hf_to_sglang_mapper.apply_list

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            mapping = {**_FUSED, **self.packed_modules_mapping}
            if any(self.scheme.ignores(name, fused_shards(name, mapping)) for name in spellings(prefix)):
                return UnquantizedLinearMethod()
            if self.stored is None and prefix.endswith("kv_b_proj"):
                return UnquantizedLinearMethod()
            if self.stored is not None:
                for glob, reason in self.not_packed.items():
                    if fnmatchcase(prefix, glob):
                        raise ValueError(f"{prefix}: got packed weights, needed full precision: {reason}")
            if self.packs_experts and ".experts." in prefix:
                raise ValueError(
                    f"{prefix}: SGLang's model packs its experts' weights itself, needed full precision; add "
                    "'*.experts.*' to `ignore`"
                )
            # Some models name none of their layers.
            name = prefix or f"{type(layer).__name__} {next(self._unnamed)}"
            if self.stored is None:
                return OnlineLinearMethod(self.scheme, self.report, name, self.random_weights)
            return StoredLinearMethod(self.scheme, self.report, name, self.stored)
        if isinstance(layer, RadixAttention):
            # Scales of a KV cache in FP8, which some checkpoints hold. SGLang has e5m2 without any.
            return BaseKVCacheMethod(self) if self.stored and server_args().kv_cache_dtype == "fp8_e4m3" else None
        # Experts are known by the name of their class or a parent's, and the MoE half is imported where it is needed: a
        # class renamed there must not cost dense models the plugin.
        if all(parent.__name__ != "FusedMoE" for parent in type(layer).__mro__):
            return None
        from fouroversix_plugin.serving.sglang import moe

        return moe.method_for(layer, prefix, self.scheme, self.report, self.stored, self.random_weights)


_FILL_THEMSELVES: Final = {"Qwen3NextForCausalLM", "Qwen3NextForCausalLMMTP"}
"""Models that copy into some of their weights, past the loader that sees what arrives."""

_PACK_EXPERTS: Final = {"AfmoeForCausalLM", "DeepseekForCausalLM", "XverseMoeForCausalLM"}
"""Models that put their experts' weights into one tensor as they are built, and multiply by that."""

_ADDED: Final = ("packed_modules_mapping", "hf_config")
"""What SGLang adds to a checkpoint's block for methods that need it."""


def see_checkpoint(made: Any, model_config: Any, load_config: Any) -> None:
    """After SGLang has made a quantization config, and before layers: tell one of ours which checkpoint it is for."""
    if not isinstance(made, FourOverSixConfig):
        return
    _refuse_tokenizer_workers()
    follow_batch_invariance(server_args().enable_deterministic_inference, "--enable-deterministic-inference")
    model = model_config.model_path
    where = {"revision": model_config.revision, "cache_dir": load_config.download_dir}
    config, older = (_json(model, name, **where) for name in ("config.json", HF_QUANT_CONFIG))
    made._adopt(model, config, older)
    config = config or {}
    if _is_head(made, model_config, config):
        made.scheme = replace(made.scheme, ignore=("*",))
        return
    made.random_weights = load_config.load_format == "dummy"
    architectures = {*(config.get("architectures") or ())}
    made.packs_experts = bool(architectures & _PACK_EXPERTS)
    if made.stored is None:
        _refuse_online(model, architectures)
    else:
        if made.random_weights:
            refuse_random_bytes(model)
        _refuse_built_unquantized(model, architectures, made.scheme)
        made.not_packed = _not_packed(architectures, made.stored)


def _is_head(made: FourOverSixConfig, model_config: Any, config: Mapping[str, Any]) -> bool:
    """Whether a draft model is the served checkpoint's head for multi-token prediction, and that is not quantized.

    SGLang's class for it calls its layers otherwise than the checkpoint, whose ignore list would not be found to match.
    """
    if not model_config.is_draft_model or model_config.model_path != server_args().model_path:
        return False
    if model_config.hf_config.architectures == config.get("architectures"):  # the same model again
        return False
    behind = (config.get("text_config") or config).get("num_hidden_layers")
    layers = ("mtp.layers.0", "model.mtp_layers.0", f"model.layers.{behind}")
    names = (f"{layer}.mlp.{part}down_proj" for layer in layers for part in ("", "experts.0."))
    return made.stored is None or any(map(made.scheme.ignores, names))


def _refuse_online(model: str, architectures: Set[str]) -> None:
    args = server_args()
    given = {"--cpu-offload-gb": args.cpu_offload_gb, "--offload-group-size": args.offload_group_size}
    refuse_offloading(model, given)
    if architectures & _FILL_THEMSELVES:
        raise ValueError(
            f"{model}: SGLang's model fills its weights itself, while they are quantized as they arrive; serve a "
            "checkpoint that `fouroversix quantize` wrote"
        )


def _refuse_built_unquantized(model: str, architectures: Set[str], scheme: Scheme) -> None:
    for architecture in architectures & _BUILT_UNQUANTIZED.keys():
        part, *names = _BUILT_UNQUANTIZED[architecture]
        for name in (f"model.layers.0.{part}.{name}" for name in names):
            if not scheme.ignores(name):
                raise ValueError(
                    f"{model}: {name}: got packed weights, needed full precision: SGLang's model builds this layer "
                    f"unquantized; quantize with --ignore '*.{part}.*'"
                )


def _not_packed(architectures: Set[str], stored: Format) -> Mapping[str, str]:
    """Globs of a model's layers that cannot hold its packed weights, and why."""
    found = dict(_NOT_PACKED)
    for architecture in architectures & _NOT_PACKED_IN.keys():
        found |= _NOT_PACKED_IN[architecture]
    if architectures & _READ_WEIGHT and stored.names["packed"] != "weight":
        found["*.shared_experts.gate_up_proj"] = (
            f"SGLang's model reads the `weight` of shared experts, which {stored.name} calls {stored.names['packed']}; "
            f"quantize with --format {QUANT_METHOD}, or with --ignore '*.shared_experts.*'"
        )
    return found


def with_fused_experts(found: tuple[Any, str], model_config: Any) -> tuple[Any, str] | None:
    """After SGLang has chosen a model's class: it knows by name for which methods Mixtral's experts can be fused."""
    if found[1] != "QuantMixtralForCausalLM" or model_config.quantization != QUANT_METHOD:
        return None
    # Here, because it imports every model.
    from sglang.srt.models.registry import ModelRegistry

    fused: tuple[Any, str] = ModelRegistry.resolve_model_cls(["MixtralForCausalLM"])
    return fused


def _refuse_tokenizer_workers() -> None:
    """SGLang loads no plugins in those processes."""
    args = server_args()
    if args.tokenizer_worker_num > 1:
        raise ValueError(
            f"--tokenizer-worker-num: got {args.tokenizer_worker_num}, needed 1 with --quantization {QUANT_METHOD}: "
            "SGLang loads no plugins in tokenizer workers, which would then not know the method; leave the flag out"
        )


def _json(model: str, file: str, **where: Any) -> dict[str, Any] | None:
    """A file of a checkpoint, in a folder or on the hub, or None where it has no such file."""
    path = cached_file(
        model,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    # Some architectures write Infinity into theirs.
    return None if path is None else read_json(Path(path), finite=file != "config.json")
