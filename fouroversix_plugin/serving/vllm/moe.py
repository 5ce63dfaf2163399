"""Fused mixture-of-experts layers in vLLM; see ``linear`` for stored and online weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_ep_group
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from fouroversix_plugin.formats import Format
from fouroversix_plugin.kernels import ops, select
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Scheme
from fouroversix_plugin.serving import layer as neutral
from fouroversix_plugin.serving.module import (
    ACTIVATIONS,
    EXPERT_KINDS,
    input_amax,
    installed,
    refuse_experts,
    take_stored,
    under_name,
)
from fouroversix_plugin.serving.vllm.linear import (
    DONE,
    check_all_loaded,
    check_loads_weights,
    install,
    loads_weights,
    reduce_max_over,
)
from fouroversix_plugin.weights import quantize_weight


def method_for(
    layer: Any, prefix: str, scheme: Scheme, report: neutral.LoadReport, form: Format | None
) -> FusedMoEMethodBase:
    """The method of a RoutedExperts layer: ours, or the unquantized one where all its experts are ignored.

    ``form`` is how a quantized checkpoint spells its weights, None for a full-precision one.
    """
    base = prefix.removesuffix(".routed_experts")
    projections = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    experts = [f"{base}.{e}.{name}" for e in range(layer.global_num_experts) for name in projections if name]
    if scheme.ignores(base, experts) or scheme.ignores(prefix):
        return UnquantizedFusedMoEMethod(layer.moe_config)
    if form is None:
        return OnlineMoEMethod(layer, scheme, report, base)
    return StoredMoEMethod(layer, scheme, report, base, form)


class _MoEMethod(FusedMoEMethodBase):
    def __init__(self, layer: Any, scheme: Scheme, report: neutral.LoadReport, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.scheme, self.report, self.prefix = scheme, report, prefix
        self._refuse_unsupported(layer)

    def _refuse_unsupported(self, layer: Any) -> None:
        activation = layer.activation.value
        reasons = []
        if activation not in ACTIVATIONS:
            reasons.append(f"activation {activation!r} (needed one of {', '.join(ACTIVATIONS)})")
        if self.moe.has_bias:
            reasons.append("expert biases")
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
        neutral.check_input_size(self.prefix, hidden_size, hidden_size)
        neutral.check_input_size(self.prefix, inner, full_inner)
        self.report.expect(self.prefix)
        lead = (num_experts,)
        w13 = neutral.WeightShape(2 * inner, hidden_size, hidden_size, shards=2, lead=lead)
        w2 = neutral.WeightShape(hidden_size, inner, full_inner, shards=1, lead=lead)
        self._create(layer, "w13_", w13, params_dtype, extra_weight_attrs)
        self._create(layer, "w2_", w2, params_dtype, extra_weight_attrs)

    def _create(
        self, layer: Any, stem: str, shape: neutral.WeightShape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, DONE, False):
            return
        w13, w2 = self._quantized(layer, "w13_"), self._quantized(layer, "w2_")
        select("moe", self.scheme.name, w13.shape, w13.device)
        prepared = ops.prepare_experts(w13, w2, layer.params_dtype)
        self.report.loaded(self.prefix, [w13, w2], prepared[0])
        install(layer, "w13_", prepared[0])
        install(layer, "w2_", prepared[1])
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
        full_rows = shape.rows if stem == "w2_" else shape.rows // 2 * self.moe.moe_parallel_config.tp_size
        for stored in shape.stored(self.form):
            parameter = torch.nn.Parameter(stored.empty, requires_grad=False)
            layer.register_parameter(stem + stored.name, parameter)
            kind = EXPERT_KINDS[stored.part]
            loader = stored.loader(
                under_name(attributes["weight_loader"], stem + kind.name),
                f"{self.prefix} ({stem}*)",
                self.scheme.weights,
                lambda *shard, **named: full_rows,
            )
            set_weight_attrs(parameter, {**attributes, **kind.attributes, "weight_loader": loader})

    def _quantized(self, layer: Any, stem: str) -> NVFP4Tensor:
        rows = getattr(layer, f"{stem}{self.form.names['packed']}").shape[1]
        shards = 2 if stem == "w13_" else 1
        return take_stored(layer, stem, f"{self.prefix} ({stem}*)", self.form, self.scheme, [rows // shards] * shards)


class OnlineMoEMethod(_MoEMethod):
    """Experts of a full-precision checkpoint, one layer's at a time."""

    uses_meta_device = True

    def create_weights(self, layer: Any, *sizes: Any, **named: Any) -> None:
        super().create_weights(layer, *sizes, **named)
        initialize_online_processing(layer)
        self.loads_weights = loads_weights()

    def _create(
        self, layer: Any, stem: str, shape: neutral.WeightShape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        parameter = torch.nn.Parameter(shape.full_precision(dtype), requires_grad=False)
        layer.register_parameter(f"{stem}weight", parameter)
        set_weight_attrs(parameter, attributes)

    def _quantized(self, layer: Any, stem: str) -> NVFP4Tensor:
        if self.loads_weights:
            check_all_loaded(layer, self.prefix, layer.w13_weight.numel() + layer.w2_weight.numel())
        reduce: Callable[[Tensor], Tensor] | None = None
        if self.moe.moe_parallel_config.tp_size > 1:
            # The ranks that hold parts of the same expert are those of vLLM's expert-parallel group.
            reduce = reduce_max_over(get_ep_group())
        weight = getattr(layer, f"{stem}weight").data
        return quantize_weight(f"{self.prefix} ({stem}weight)", weight, self.scheme.weights, reduce)
