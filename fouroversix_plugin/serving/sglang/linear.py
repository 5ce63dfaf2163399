"""Linear layers in SGLang: stored weights are loaded as they are, full-precision ones are quantized as they arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.linear import WEIGHT_LOADER_V2_SUPPORTED
from sglang.srt.layers.parameter import ModelWeightParameter, PerTensorScaleParameter
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.utils import set_weight_attrs
from torch import Tensor

from fouroversix_plugin.formats import Format
from fouroversix_plugin.kernels.ops import PreparedWeight
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Scheme
from fouroversix_plugin.serving import layer as neutral
from fouroversix_plugin.serving.arriving import ArrivingWeight
from fouroversix_plugin.serving.module import (
    fill_all_shards,
    input_amax,
    installed,
    prepared_parameters,
    rows_in_checkpoint,
    take_stored,
)
from fouroversix_plugin.weights import quantize_weight

_Loader = Callable[..., Any]
_Rows = Callable[..., int | None]

DONE = "fouroversix_done"
"""The attribute of a layer whose weight is prepared, with its name: SGLang may call the hook after loading again."""


def spellings(prefix: str) -> list[str]:
    """The names of a module to look for in an ignore list: some of SGLang's models leave out the leading ``model.``."""
    return [prefix, prefix.removeprefix("model.") if prefix.startswith("model.") else f"model.{prefix}"]


class _LinearMethod(LinearMethodBase):
    def __init__(self, scheme: Scheme, report: neutral.LoadReport, prefix: str) -> None:
        super().__init__()
        self.scheme, self.report, self.prefix = scheme, report, prefix

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
        layer.logical_widths = output_partition_sizes
        rows, shards = sum(output_partition_sizes), len(output_partition_sizes)
        shape = neutral.WeightShape(rows, input_size_per_partition, input_size, shards)

        def rows_of(*shard: Any, **named: Any) -> int | None:
            return rows_in_checkpoint(layer, output_size, shard[0] if shard else None)

        self._create(layer, shape, params_dtype, extra_weight_attrs["weight_loader"], rows_of)

    def _create(self, layer: Any, shape: neutral.WeightShape, dtype: torch.dtype, loader: _Loader, rows: _Rows) -> None:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, DONE):
            return
        q = self._quantized(layer)
        prepared = neutral.prepare_linear(self.prefix, q, self.scheme, self.report, layer.params_dtype)
        install(layer, "", prepared, self.prefix)
        setattr(layer, DONE, self.prefix)

    def _quantized(self, layer: Any) -> NVFP4Tensor:
        raise NotImplementedError

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return neutral.apply_linear(x, installed(layer, ""), self.scheme.activations, bias, input_amax(layer, ""))


class StoredLinearMethod(_LinearMethod):
    """Weights of a quantized checkpoint."""

    def __init__(self, scheme: Scheme, report: neutral.LoadReport, prefix: str, form: Format) -> None:
        super().__init__(scheme, report, prefix)
        self.form = form

    def _create(self, layer: Any, shape: neutral.WeightShape, dtype: torch.dtype, loader: _Loader, rows: _Rows) -> None:
        for stored in shape.stored(self.form):
            whole = stored.part in ("packed", "block_scale")
            filling = loader if whole else fill_all_shards(loader)
            checked = stored.loader(filling, self.prefix, self.scheme.weights, rows)
            if whole:
                parameter = ModelWeightParameter(data=stored.empty, input_dim=1, output_dim=0, weight_loader=checked)
            else:
                parameter = PerTensorScaleParameter(data=stored.empty, weight_loader=checked)
            layer.register_parameter(stored.name, parameter)

    def _quantized(self, layer: Any) -> NVFP4Tensor:
        return take_stored(layer, "", self.prefix, self.form, self.scheme, layer.logical_widths)


class OnlineLinearMethod(_LinearMethod):
    """Weights of a full-precision checkpoint, one layer's at a time; random ones stay until all are there."""

    def __init__(self, scheme: Scheme, report: neutral.LoadReport, prefix: str, random_weights: bool) -> None:
        super().__init__(scheme, report, prefix)
        self.random_weights = random_weights
        self.arriving: ArrivingWeight | None = None

    def _create(self, layer: Any, shape: neutral.WeightShape, dtype: torch.dtype, loader: _Loader, rows: _Rows) -> None:
        weight = torch.empty(shape.rows, shape.columns, dtype=dtype)
        if not self.random_weights:
            self.arriving = ArrivingWeight(self.prefix, weight, shape.full_columns, self.scheme.weights)
            loader = self.arriving.loader(loader, rows)
        parameter = ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter("weight", parameter)

    def _quantized(self, layer: Any) -> NVFP4Tensor:
        if self.arriving is not None:
            return self.arriving.take()
        return quantize_weight(self.prefix, layer.weight.data, self.scheme.weights)


# SGLang gives parameters that know their dimensions to methods of these names only.
WEIGHT_LOADER_V2_SUPPORTED += [method.__name__ for method in (StoredLinearMethod, OnlineLinearMethod)]


def install(layer: Any, stem: str, prepared: PreparedWeight, name: str) -> None:
    """Replace what was loaded under ``stem`` by the prepared weight."""
    for part, tensor in prepared_parameters(prepared):
        if hasattr(layer, stem + part):
            delattr(layer, stem + part)
        parameter = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
        if parameter is not None:
            set_weight_attrs(parameter, {"weight_loader": _refuse_to_reload(f"{name}.{stem}{part}")})
        layer.register_parameter(stem + part, parameter)


def reload_refusal(name: str) -> str:
    """Why what is installed takes no other weights."""
    return f"{name}: got new weights for a running server, which nvfp4_4over6 does not take; restart it"


def _refuse_to_reload(name: str) -> Callable[..., None]:
    def load(*given: Any, **named: Any) -> None:
        raise ValueError(reload_refusal(name))

    return load
