"""Fused mixture-of-experts layers in SGLang; see ``linear`` for stored and online weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.utils import is_cuda, set_weight_attrs
from torch import Tensor

from fouroversix_plugin.formats import Format
from fouroversix_plugin.kernels import ops
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe, Scheme
from fouroversix_plugin.serving import layer as neutral
from fouroversix_plugin.serving.arriving import ArrivingWeight
from fouroversix_plugin.serving.module import (
    ACTIVATIONS,
    create_stored_experts,
    expert_shapes,
    full_expert_rows,
    input_amax,
    installed,
    refuse_experts,
    take_stored_experts,
)
from fouroversix_plugin.serving.sglang import RUNNER, runner_module
from fouroversix_plugin.serving.sglang.linear import DONE, install, spellings
from fouroversix_plugin.weights import quantize_weight

_SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What checkpoints call the three weights of an expert: SGLang's layers do not know."""

_SHARED = ("shared_experts", "shared_expert")
"""What they call experts that every token goes to; Qwen's have one."""


def method_for(
    layer: Any, prefix: str, scheme: Scheme, report: neutral.LoadReport, form: Format | None, random_weights: bool
) -> FusedMoEMethodBase:
    """The method of a FusedMoE layer: ours, or the unquantized one where all its experts are ignored.

    ``form`` is how a quantized checkpoint spells its weights, None for a full-precision one.
    """
    name = prefix or f"layers.{layer.layer_id}.experts"
    if any(
        scheme.ignores(spelled, [f"{spelled}.{e}.{weight}" for e in range(layer.num_experts) for weight in spelling])
        for spelled in spellings(name)
        for spelling in _SPELLINGS
    ):
        return UnquantizedFusedMoEMethod(layer.use_triton_kernels, layer.use_flashinfer_trtllm_moe, layer.use_deep_gemm)
    _refuse_unsupported(layer, name, scheme)
    if form is None:
        return OnlineMoEMethod(scheme, report, name, random_weights)
    return StoredMoEMethod(scheme, report, name, form)


def _refuse_unsupported(layer: Any, name: str, scheme: Scheme) -> None:
    backend, exchange = get_moe_runner_backend(), get_moe_a2a_backend()
    if backend.value not in ("auto", RUNNER):
        raise ValueError(
            f"{name}: got --moe-runner-backend {backend.value}, which cannot run experts of nvfp4_4over6, needed "
            f"{RUNNER}; pass --moe-runner-backend {RUNNER}"
        )
    if not exchange.is_none():
        raise ValueError(
            f"{name}: got --moe-a2a-backend {exchange.value}, which hands over tokens in another form, needed none; "
            "leave the flag out"
        )
    config = layer.moe_runner_config
    reasons = []
    if config.activation not in ACTIVATIONS:
        reasons.append(f"activation {config.activation!r} (needed one of {', '.join(ACTIVATIONS)})")
    if not config.is_gated:
        reasons.append("experts without a gate")
    reasons += [
        f"{setting} = {getattr(config, setting)}"
        for setting in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "swiglu_limit")
        if getattr(config, setting, None) is not None
    ]
    refuse_experts(name, reasons)
    parents = [spelled.rpartition(".")[0] for spelled in spellings(name)]
    for shared in (f"{parent}.{part}" for part in _SHARED for parent in parents):
        if layer.num_fused_shared_experts and scheme.ignores(shared, [f"{shared}.{w}" for w in _SPELLINGS[0]]):
            raise ValueError(
                f"{name}: `ignore` matches {shared!r}, which SGLang fuses with the quantized experts; pass "
                "--disable-shared-experts-fusion"
            )


class _MoEMethod(FusedMoEMethodBase):
    def __init__(self, scheme: Scheme, report: neutral.LoadReport, prefix: str) -> None:
        super().__init__()
        self.scheme, self.report, self.prefix = scheme, report, prefix
        self.dtype = torch.bfloat16

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        refuse_experts(self.prefix, ["expert biases"] * bool(extra_weight_attrs.get("with_bias")))
        self.dtype = params_dtype
        inner = intermediate_size_per_partition
        full_inner = inner * layer.moe_tp_size
        shapes = expert_shapes(self.prefix, num_experts, hidden_size, inner, full_inner)
        self.report.expect(self.prefix)
        for stem, shape in shapes.items():
            self._create(layer, stem, shape, extra_weight_attrs)

    def _create(self, layer: Any, stem: str, shape: neutral.WeightShape, attributes: dict[str, Any]) -> None:
        raise NotImplementedError

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        self.runner = runner_module().make(moe_runner_config)

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, DONE):
            return
        w13, w2 = self._quantized(layer, "w13_"), self._quantized(layer, "w2_")
        prepared = neutral.prepare_experts(self.prefix, w13, w2, self.scheme, self.report, self.dtype)
        install(layer, "w13_", prepared[0], self.prefix)
        install(layer, "w2_", prepared[1], self.prefix)
        setattr(layer, DONE, self.prefix)

    def _quantized(self, layer: Any, stem: str) -> NVFP4Tensor:
        raise NotImplementedError

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        experts = Experts(
            installed(layer, "w13_"),
            installed(layer, "w2_"),
            self.scheme.activations,
            input_amax(layer, "w13_"),
            input_amax(layer, "w2_"),
        )
        return self.runner.run(dispatch_output, experts)


class StoredMoEMethod(_MoEMethod):
    """Experts of a quantized checkpoint."""

    def __init__(self, scheme: Scheme, report: neutral.LoadReport, prefix: str, form: Format) -> None:
        super().__init__(scheme, report, prefix)
        self.form = form

    def _create(self, layer: Any, stem: str, shape: neutral.WeightShape, attributes: dict[str, Any]) -> None:
        rows = full_expert_rows(stem, shape, layer.moe_tp_size)
        create_stored_experts(
            layer, stem, self.prefix, self.form, shape, self.scheme.weights, attributes, rows, set_weight_attrs
        )

    def _quantized(self, layer: Any, stem: str) -> NVFP4Tensor:
        return take_stored_experts(layer, stem, self.prefix, self.form, self.scheme)


class OnlineMoEMethod(_MoEMethod):
    """Experts of a full-precision checkpoint, one layer's at a time; random ones stay until all are there."""

    def __init__(self, scheme: Scheme, report: neutral.LoadReport, prefix: str, random_weights: bool) -> None:
        super().__init__(scheme, report, prefix)
        self.random_weights = random_weights
        self.arriving: dict[str, ArrivingWeight] = {}

    def _create(self, layer: Any, stem: str, shape: neutral.WeightShape, attributes: dict[str, Any]) -> None:
        weight = torch.empty(*shape.lead, shape.rows, shape.columns, dtype=self.dtype)
        if not self.random_weights:
            arriving = ArrivingWeight(self._name(stem), weight, shape.full_columns, self.scheme.weights)
            loader = arriving.loader(attributes["weight_loader"], full_expert_rows(stem, shape, layer.moe_tp_size))
            self.arriving[stem] = arriving
            attributes = {**attributes, "weight_loader": loader}
        parameter = torch.nn.Parameter(weight, requires_grad=False)
        layer.register_parameter(f"{stem}weight", parameter)
        set_weight_attrs(parameter, attributes)

    def _quantized(self, layer: Any, stem: str) -> NVFP4Tensor:
        if stem in self.arriving:
            return self.arriving[stem].take()
        return quantize_weight(self._name(stem), getattr(layer, f"{stem}weight").data, self.scheme.weights)

    def _name(self, stem: str) -> str:
        return f"{self.prefix} ({stem}weight)"


RUNNERS_SCALE = is_cuda()
"""Whether routed experts are scaled by the runner: SGLang's models do it themselves on every other device."""


class Experts(NamedTuple):
    """What a runner gets of a layer: its weights and how activations are quantized."""

    w13: ops.PreparedWeight
    w2: ops.PreparedWeight
    activations: Recipe | None
    input_amax: Tensor | None
    inner_amax: Tensor | None


def run_experts(dispatch_output: Any, experts: Experts, config: Any) -> StandardCombineInput:
    """SGLang's contract for a runner: experts on tokens [M, K] with ids of this rank, -1 for experts of others."""
    x = dispatch_output.hidden_states
    weights, ids = dispatch_output.topk_output.topk_weights, dispatch_output.topk_output.topk_ids
    if config.no_combine:
        # Every expert's own answer [M, top_k, K], unweighted: each slot as a token of its own.
        y = _run(
            x.repeat_interleave(ids.shape[1], 0), torch.ones_like(weights).view(-1, 1), ids.view(-1, 1), experts, config
        )
        return StandardCombineInput(hidden_states=y.view(*ids.shape, -1))
    y = _run(x, weights, ids, experts, config)
    if RUNNERS_SCALE and config.routed_scaling_factor not in (None, 1.0):
        y = y * config.routed_scaling_factor
    return StandardCombineInput(hidden_states=y)


def _run(x: Tensor, weights: Tensor, ids: Tensor, experts: Experts, config: Any) -> Tensor:
    return ops.moe(
        x,
        experts.w13,
        experts.w2,
        weights,
        ids,
        experts.activations,
        config.activation,
        config.apply_router_weight_on_input,
        experts.input_amax,
        experts.inner_amax,
    )
