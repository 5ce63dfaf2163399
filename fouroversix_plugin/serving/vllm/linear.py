"""Linear layers in vLLM: stored weights are loaded as they are, full-precision ones are quantized as they arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter, PerTensorScaleParameter
from vllm.model_executor.utils import replace_parameter

from fouroversix_plugin.formats import Format, Part
from fouroversix_plugin.kernels import select
from fouroversix_plugin.kernels.ops import PreparedWeight, prepare_weight
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Scheme
from fouroversix_plugin.serving import layer as neutral
from fouroversix_plugin.weights import missing, quantize_weight, stored_weight

DONE = "_already_called_process_weights_after_loading"
"""vLLM calls the hook again after layerwise loading, and clears this attribute when it really reloads a layer."""


class _LinearMethod(LinearMethodBase):
    def __init__(self, scheme: Scheme, report: neutral.LoadReport, prefix: str) -> None:
        self.scheme, self.report, self.prefix = scheme, report, prefix
        self.output_size = 0

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        neutral.check_input_size(self.prefix, input_size_per_partition, input_size)
        self.report.expect(self.prefix)
        self.output_size = output_size
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = input_size_per_partition
        layer.output_size_per_partition = sum(output_partition_sizes)
        shape = neutral.WeightShape(
            rows=sum(output_partition_sizes),
            columns=input_size_per_partition,
            full_columns=input_size,
            shards=len(output_partition_sizes),
        )
        self._create(layer, shape, params_dtype, extra_weight_attrs["weight_loader"])

    def _create(self, layer: Any, shape: neutral.WeightShape, dtype: torch.dtype, loader: Callable[..., Any]) -> None:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, DONE, False):
            return
        q = self._quantized(layer)
        select("linear", self.scheme.name, q.shape, q.device)
        prepared = prepare_weight(q, layer.params_dtype)
        self.report.loaded(self.prefix, [q], prepared)
        install(layer, "", prepared)
        setattr(layer, DONE, True)

    def _quantized(self, layer: Any) -> NVFP4Tensor:
        raise NotImplementedError

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return neutral.apply_linear(
            x, installed(layer, ""), self.scheme.activations, bias, getattr(layer, INPUT_AMAX, None)
        )


@register_weight_loader_v2_supported_method
class StoredLinearMethod(_LinearMethod):
    """Weights of a quantized checkpoint."""

    def __init__(self, scheme: Scheme, report: neutral.LoadReport, prefix: str, form: Format) -> None:
        super().__init__(scheme, report, prefix)
        self.form = form

    def _create(self, layer: Any, shape: neutral.WeightShape, dtype: torch.dtype, loader: Callable[..., Any]) -> None:
        check_loads_weights(self.prefix)

        def rows(*shard: Any, **named: Any) -> int | None:
            return _rows_in_checkpoint(layer, self.output_size, shard[0] if shard else None)

        for stored in shape.stored(self.form):
            whole = stored.part in ("packed", "block_scale")
            checked = stored.loader(
                loader if whole else _fill_all_shards(loader), self.prefix, self.scheme.weights, rows
            )
            if whole:
                parameter = ModelWeightParameter(data=stored.empty, input_dim=1, output_dim=0, weight_loader=checked)
            else:
                parameter = PerTensorScaleParameter(data=stored.empty, weight_loader=checked)
            layer.register_parameter(stored.name, parameter)

    def _quantized(self, layer: Any) -> NVFP4Tensor:
        parts = take_parts(layer, "", self.form)
        if self.scheme.input_scale == "static" and self.scheme.activations is not None:
            install_amax(layer, INPUT_AMAX, neutral.static_amax(self.prefix, parts["input_scale"]))
        return stored_weight(
            self.prefix,
            parts["packed"],
            parts["block_scale"],
            parts["decode_scale"],
            layer.logical_widths,
            self.scheme.weights,
        )


def _rows_in_checkpoint(layer: Any, output_size: int, shard: Any) -> int | None:
    """N of a shard over all ranks, by what vLLM's merged layers know of themselves; None where they know nothing."""
    if shard is None:
        return output_size
    if shard in ("q", "k", "v") and hasattr(layer, "total_num_kv_heads"):
        heads = layer.total_num_heads if shard == "q" else layer.total_num_kv_heads
        size = getattr(layer, "v_head_size", layer.head_size) if shard == "v" else layer.head_size
        return int(heads * size)
    sizes = getattr(layer, "output_sizes", None)
    return int(sizes[shard]) if isinstance(shard, int) and sizes is not None else None


def _fill_all_shards(loader: Callable[..., Any]) -> Callable[..., Any]:
    """One decode scale without a shard is that of a projection stored fused: vLLM would set only the first shard's."""

    def load(param: Tensor, loaded_weight: Tensor, *shard: Any) -> None:
        if shard and shard[0] is not None:
            loader(param, loaded_weight, *shard)
        else:
            param.data.fill_(loaded_weight.reshape(()))

    return load


@register_weight_loader_v2_supported_method
class OnlineLinearMethod(_LinearMethod):
    """Weights of a full-precision checkpoint, one layer's at a time: they live from arriving to being quantized."""

    uses_meta_device = True

    def _create(self, layer: Any, shape: neutral.WeightShape, dtype: torch.dtype, loader: Callable[..., Any]) -> None:
        weight = shape.full_precision(dtype)
        parameter = ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter("weight", parameter)
        initialize_online_processing(layer)
        self.loads_weights = loads_weights()

    def _quantized(self, layer: Any) -> NVFP4Tensor:
        if self.loads_weights:
            check_all_loaded(layer, self.prefix, layer.weight.numel())
        reduce = reduce_max_over(get_tp_group()) if layer.tp_size > 1 else None
        return quantize_weight(self.prefix, layer.weight.data, self.scheme.weights, reduce)


def loads_weights() -> bool:
    """Whether weights come from a checkpoint; ``--load-format dummy`` fills the memory itself. Known while building."""
    load_format: object = get_current_vllm_config().load_config.load_format
    return load_format != "dummy"


def check_loads_weights(name: str) -> None:
    """Refuse to fill a stored weight with random bytes, which are no block scales."""
    if not loads_weights():
        raise ValueError(
            f"{name}: got --load-format dummy for a quantized checkpoint, needed its weights; use a full-precision "
            "config.json with --quantization nvfp4_4over6, whose random weights are quantized"
        )


def check_all_loaded(layer: Any, name: str, values: int) -> None:
    """Refuse a layer whose weights came only in part, or not at all: vLLM would hand over uninitialized memory."""
    if get_layerwise_info(layer).load_numel < values:
        raise ValueError(missing(name, "weight"))


def reduce_max_over(group: Any) -> Callable[[Tensor], Tensor]:
    """The largest of a tensor over the ranks of a vLLM group, so that all of them scale for the same amax."""

    def reduce(amax: Tensor) -> Tensor:
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group.device_group)
        return amax

    return reduce


INPUT_AMAX = "input_amax"
"""The attribute of a layer with static activations: what they are scaled for."""


def take_parts(layer: Any, stem: str, form: Format) -> dict[Part, Tensor]:
    """The loaded parts of a stored weight; those that :func:`install` does not replace leave the layer."""
    parts = {part: getattr(layer, stem + name).data for part, name in form.names.items()}
    for name in form.names.values():
        if name not in _NAMES:
            delattr(layer, stem + name)
    return parts


def install_amax(layer: Any, name: str, amax: Tensor) -> None:
    """As a buffer: it moves with the layer and compiled graphs read it."""
    layer.register_buffer(name, amax, persistent=False)


_NAMES = ("weight", "weight_scale", "weight_scale_2")


def install(layer: Any, stem: str, prepared: PreparedWeight) -> None:
    """Replace what was loaded under ``stem`` by the prepared weight, as parameters that vLLM can reload in place."""
    for name, tensor in zip(_NAMES, (prepared.weight, prepared.block_scale, prepared.decode_scale), strict=True):
        replace_parameter(layer, stem + name, tensor)


def installed(layer: Any, stem: str) -> PreparedWeight:
    """The prepared weight that :func:`install` put there."""
    return PreparedWeight(*(getattr(layer, stem + name) for name in _NAMES))
