"""Fused mixture-of-experts layers in vLLM; see ``linear`` for stored and online weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_ep_group
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from fouroversix_plugin.formats import Format
from fouroversix_plugin.kernels import ops
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Scheme
from fouroversix_plugin.serving import layer as neutral
from fouroversix_plugin.serving.module import (
    ACTIVATIONS,
    create_stored_experts,
    expert_shapes,
    full_expert_rows,
    input_amax,
    installed,
    refuse_experts,
    take_stored_experts,
    without_its_layer,
)
from fouroversix_plugin.serving.vllm.linear import (
    DONE,
    check_all_loaded,
    check_before,
    check_loading,
    check_loads_weights,
    install,
    loads_weights,
    reduce_max_over,
    spellings,
)
from fouroversix_plugin.weights import of_experts, quantize_weight


def method_for(
    layer: Any, prefix: str, scheme: Scheme, report: neutral.LoadReport, form: Format | None
) -> FusedMoEMethodBase:
    """The method of a RoutedExperts layer: ours, or the unquantized one where all its experts are ignored.

    ``form`` is how a quantized checkpoint spells its weights, None for a full-precision one.
    """
    base = prefix.removesuffix(".routed_experts")
    projections = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    for name in spellings(base):
        experts = [f"{name}.{e}.{w}" for e in range(layer.global_num_experts) for w in projections if w]
        if scheme.ignores(name, experts) or scheme.ignores(f"{name}{prefix.removeprefix(base)}"):
            return UnquantizedFusedMoEMethod(layer.moe_config)
    if form is None:
        return OnlineMoEMethod(layer, scheme, report, base)
    return StoredMoEMethod(layer, scheme, report, base, form)


class _MoEMethod(FusedMoEMethodBase):
    def __init__(self, layer: Any, scheme: Scheme, report: neutral.LoadReport, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.scheme, self.report, self.prefix = scheme, report, prefix
        self.vllm_config = get_current_vllm_config()
        self._refuse_unsupported(layer)

    def _refuse_unsupported(self, layer: Any) -> None:
        activation = layer.activation.value
        reasons = []
        if activation not in ACTIVATIONS:
            reasons.append(f"activation {activation!r} (needed one of {', '.join(ACTIVATIONS)})")
        if self.moe.has_bias:
            reasons.append("expert biases")
        if self.moe.moe_backend != "auto":
            # Others quantize activations their own way, some by what they find in the environment.
            reasons.append(
                f"--moe-backend {self.moe.moe_backend} (needed auto: the recipe is known to our kernels alone)"
            )
        if get_current_vllm_config().lora_config is not None:
            reasons.append("--enable-lora (vLLM adapts experts inside of its own kernels alone)")
        reasons += [
            f"{name} = {getattr(layer, name)}"
            for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
            if getattr(layer, name, None) is not None
        ]
        refuse_experts(self.prefix, reasons)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        inner = intermediate_size_per_partition
        full_inner = inner * self.moe.moe_parallel_config.tp_size
        shapes = expert_shapes(self.prefix, num_experts, hidden_size, inner, full_inner)
        self.report.expect(self.prefix)
        for stem, shape in shapes.items():
            self._create(layer, stem, shape, params_dtype, extra_weight_attrs)

    def _create(
        self, layer: Any, stem: str, shape: neutral.WeightShape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, DONE, False):
            return
        w13, w2 = self._quantized(layer, "w13_"), self._quantized(layer, "w2_")
        prepared = neutral.prepare_experts(self.prefix, w13, w2, self.scheme, self.report, layer.params_dtype)
        install(layer, "w13_", prepared[0], self.vllm_config)
        install(layer, "w2_", prepared[1], self.vllm_config)
        setattr(layer, DONE, True)

    def _quantized(self, layer: Any, stem: str) -> NVFP4Tensor:
        raise NotImplementedError

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """No modular kernel of vLLM's runs here, so there is nothing to configure."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        # Shared experts are run by vLLM's MoE runner: only its own modular kernels overlap them.
        return ops.moe(
            x,
            installed(layer, "w13_"),
            installed(layer, "w2_"),
            topk_weights,
            neutral.local_expert_ids(topk_ids, layer.expert_map),
            self.scheme.activations,
            layer.activation.value,
            layer.apply_router_weight_on_input,
            input_amax(layer, "w13_"),
            input_amax(layer, "w2_"),
        )


class StoredMoEMethod(_MoEMethod):
    """Experts of a quantized checkpoint."""

    def __init__(self, layer: Any, scheme: Scheme, report: neutral.LoadReport, prefix: str, form: Format) -> None:
        super().__init__(layer, scheme, report, prefix)
        self.form = form

    def _create(
        self, layer: Any, stem: str, shape: neutral.WeightShape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        check_loads_weights(self.prefix)
        rows = full_expert_rows(stem, shape, self.moe.moe_parallel_config.tp_size)
        create_stored_experts(
            layer, stem, self.prefix, self.form, shape, self.scheme.weights, attributes, rows, set_weight_attrs
        )

    def _quantized(self, layer: Any, stem: str) -> NVFP4Tensor:
        return take_stored_experts(layer, stem, self.prefix, self.form, self.scheme)


class OnlineMoEMethod(_MoEMethod):
    """Experts of a full-precision checkpoint, one layer's at a time."""

    uses_meta_device = True

    def create_weights(self, layer: Any, *sizes: Any, **named: Any) -> None:
        check_loading(self.prefix, self.moe.moe_parallel_config.tp_size)
        super().create_weights(layer, *sizes, **named)
        initialize_online_processing(layer)
        self.loads_weights = loads_weights()

    def _create(
        self, layer: Any, stem: str, shape: neutral.WeightShape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        parameter = torch.nn.Parameter(shape.full_precision(dtype), requires_grad=False)
        layer.register_parameter(f"{stem}weight", parameter)
        loader = without_its_layer(attributes["weight_loader"])
        if getattr(attributes["weight_loader"], "__qualname__", "") == "RoutedExperts.weight_loader":
            # Models' own take matrices of other shapes.
            rows = full_expert_rows(stem, shape, self.moe.moe_parallel_config.tp_size)
            loader = check_before(loader, of_experts(self.prefix, stem), rows, shape.full_columns)
        set_weight_attrs(parameter, {**attributes, "weight_loader": loader})

    def _quantized(self, layer: Any, stem: str) -> NVFP4Tensor:
        if self.loads_weights:
            check_all_loaded(layer, self.prefix, layer.w13_weight.numel() + layer.w2_weight.numel())
        reduce: Callable[[Tensor], Tensor] | None = None
        if self.moe.moe_parallel_config.tp_size > 1:
            # The ranks that hold parts of the same expert are those of vLLM's expert-parallel group.
            reduce = reduce_max_over(get_ep_group())
        weight = getattr(layer, f"{stem}weight").data
        return quantize_weight(f"{self.prefix} ({stem}weight)", weight, self.scheme.weights, reduce)
