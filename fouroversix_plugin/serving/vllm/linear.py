"""Linear layers in vLLM: stored weights are loaded as they are, full-precision ones are quantized as they arrive."""

from __future__ import annotations

import functools
import weakref
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

from fouroversix_plugin.formats import Format, check_arriving
from fouroversix_plugin.kernels.ops import PreparedWeight
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Scheme
from fouroversix_plugin.serving import layer as neutral
from fouroversix_plugin.serving.module import (
    Unloaded,
    fill_all_shards,
    input_amax,
    installed,
    prepared_parameters,
    refuse_random_bytes,
    rows_in_checkpoint,
    take_stored,
    without_its_layer,
)
from fouroversix_plugin.weights import missing, quantize_weight

DONE = "_already_called_process_weights_after_loading"
"""vLLM calls the hook again after layerwise loading, and clears this attribute when it really reloads a layer."""

ONLINE_LOADER = "online_process_loader"
"""Name of what vLLM puts around the loader of a weight that is quantized while loading."""

LATENCY_GEMM = "_use_min_latency_gemm"
"""Whether DeepSeek's latent attention multiplies by ``layer.weight`` itself."""

BEFORE_NAMES = ("draft_model.", "model.")
"""What vLLM puts before a checkpoint's names: of a draft model, and of one that was saved without its head."""

OF_VLLM = ("sharded_state", "runai_streamer_sharded", "tensorizer")
"""Load formats whose files hold a model as an engine held it."""

FORMS = "fouroversix weights"
"""Where a vLLM config says in what forms weights were prepared."""


def spellings(prefix: str) -> list[str]:
    """The name of a module in vLLM, then those it may have in its checkpoint."""
    names = [prefix]
    for before in BEFORE_NAMES:
        if names[-1].startswith(before):
            names.append(names[-1].removeprefix(before))
    return names


class _LinearMethod(LinearMethodBase):
    def __init__(self, scheme: Scheme, report: neutral.LoadReport, prefix: str) -> None:
        self.scheme, self.report, self.prefix = scheme, report, prefix
        self.output_size = 0
        self.vllm_config: Any = None

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
        self.output_size, self.vllm_config = output_size, get_current_vllm_config()
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

    def _rows_of(self, layer: Any) -> Callable[..., int | None]:
        """N over all ranks of what the layer's loader is given."""
        known = weakref.ref(layer)
        return lambda *shard, **named: rows_in_checkpoint(known(), self.output_size, shard[0] if shard else None)

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, DONE, False):
            return
        q = self._quantized(layer)
        prepared = neutral.prepare_linear(self.prefix, q, self.scheme, self.report, layer.params_dtype)
        install(layer, "", prepared, self.vllm_config)
        setattr(layer, DONE, True)
        if hasattr(layer, LATENCY_GEMM):  # decided by the weight that was here
            setattr(layer, LATENCY_GEMM, False)

    def _quantized(self, layer: Any) -> NVFP4Tensor:
        raise NotImplementedError

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return neutral.apply_linear(x, installed(layer, ""), self.scheme.activations, bias, input_amax(layer, ""))


@register_weight_loader_v2_supported_method
class StoredLinearMethod(_LinearMethod):
    """Weights of a quantized checkpoint."""

    def __init__(self, scheme: Scheme, report: neutral.LoadReport, prefix: str, form: Format) -> None:
        super().__init__(scheme, report, prefix)
        self.form = form

    def _create(self, layer: Any, shape: neutral.WeightShape, dtype: torch.dtype, loader: Callable[..., Any]) -> None:
        check_loads_weights(self.prefix)
        static = self.scheme.activations is not None and self.scheme.input_scale == "static"
        if static and self.prefix.endswith("kv_b_proj"):
            # vLLM's latent attention takes the weight out of a product with the identity, which no static scale is for.
            raise ValueError(
                f"{self.prefix}: got static activations, needed others where vLLM unpacks a weight; serve with "
                '"recipe": "nvfp4_4over6" or "w4a16"'
            )
        loader, rows, unloaded = without_its_layer(loader), self._rows_of(layer), Unloaded(layer)
        for stored in shape.stored(self.form):
            whole = stored.part in ("packed", "block_scale")
            checked = stored.loader(
                loader if whole else fill_all_shards(loader), self.prefix, self.scheme.weights, rows
            )
            checked = unloaded.before(checked, stored.name, stored.empty)
            if whole:
                parameter = ModelWeightParameter(data=stored.empty, input_dim=1, output_dim=0, weight_loader=checked)
            else:
                parameter = PerTensorScaleParameter(data=stored.empty, weight_loader=checked)
            layer.register_parameter(stored.name, parameter)

    def _quantized(self, layer: Any) -> NVFP4Tensor:
        return take_stored(layer, "", self.prefix, self.form, self.scheme, layer.logical_widths)


@register_weight_loader_v2_supported_method
class OnlineLinearMethod(_LinearMethod):
    """Weights of a full-precision checkpoint, one layer's at a time: they live from arriving to being quantized."""

    uses_meta_device = True

    def _create(self, layer: Any, shape: neutral.WeightShape, dtype: torch.dtype, loader: Callable[..., Any]) -> None:
        check_loading(self.prefix, layer.tp_size)
        weight, columns = shape.full_precision(dtype), shape.full_columns
        checked = check_before(without_its_layer(loader), self.prefix, self._rows_of(layer), columns)
        parameter = _ArrivingParameter(weight, loader=checked, layer=layer, name=self.prefix, full_columns=columns)
        layer.register_parameter("weight", parameter)
        initialize_online_processing(layer)
        self.loads_weights = loads_weights()

    def _quantized(self, layer: Any) -> NVFP4Tensor:
        if self.loads_weights:
            check_all_loaded(layer, self.prefix, layer.weight.numel())
        reduce = reduce_max_over(get_tp_group()) if layer.tp_size > 1 else None
        return quantize_weight(self.prefix, layer.weight.data, self.scheme.weights, reduce)


class _ArrivingParameter(ModelWeightParameter):
    """A full-precision weight whose arriving vLLM counts, also by a loader that a model sets later.

    Mamba-2 does so where ranks share one group: a copy past the count would go nowhere.

    Args:
        data: [N, K] on the meta device.
        loader: of the layer, checked.
        layer: whose ``weight`` this is.
        name: of the layer, for errors.
        full_columns: K over all ranks.
    """

    def __init__(self, data: Tensor, *, loader: Callable[..., Any], layer: Any, name: str, full_columns: int) -> None:
        super().__init__(data=data, input_dim=1, output_dim=0, weight_loader=loader)
        self._checked, self._layer, self._where = loader, weakref.ref(layer), (name, full_columns)

    def _set_loader(self, loader: Callable[..., Any]) -> None:
        own = loader is not self._checked and getattr(loader, "__name__", "") != ONLINE_LOADER
        if own:
            name, full_columns = self._where
            # How many rows it takes, of which some go to several ranks, it alone knows.
            loader = self._checked = check_before(loader, name, lambda *shard, **named: None, full_columns)
        ModelWeightParameter.weight_loader.fset(self, loader)
        if own:
            initialize_online_processing(self._layer())

    weight_loader = ModelWeightParameter.weight_loader.setter(_set_loader)


def loads_weights() -> bool:
    """Whether weights come from a checkpoint; ``--load-format dummy`` fills the memory itself. Known while building."""
    load_format: object = get_current_vllm_config().load_config.load_format
    return load_format != "dummy"


def check_load_format(name: str) -> None:
    """Refuse files of weights as they were prepared: for which kernels, no file says."""
    load_format = str(get_current_vllm_config().load_config.load_format)
    if load_format in OF_VLLM:
        raise ValueError(
            f"{name}: got --load-format {load_format}, whose files hold weights as one machine prepared them, needed "
            "the checkpoint they were loaded from; leave the flag out"
        )


def check_loading(name: str, ranks: int) -> None:
    """Refuse ways of loading in which a layer's weights cannot be quantized meanwhile, by so many ranks together."""
    check_load_format(name)
    load_config = get_current_vllm_config().load_config
    neutral.check_loading_order(name, ranks, str(load_config.load_format), load_config.model_loader_extra_config)
    offload = getattr(get_current_vllm_config(), "offload_config", None)
    if offload is not None:
        uva, prefetch = offload.uva.cpu_offload_gb, offload.prefetch.offload_group_size
        neutral.refuse_offloading(name, {"--cpu-offload-gb": uva, "--offload-group-size": prefetch})


def check_loads_weights(name: str) -> None:
    """Refuse to fill a stored weight with random bytes, which are no block scales, or with prepared ones."""
    check_load_format(name)
    if not loads_weights():
        refuse_random_bytes(name)


def check_before(
    loader: Callable[..., Any], name: str, rows: Callable[..., int | None], full_columns: int
) -> Callable[..., Any]:
    """An engine's loader of a full-precision weight that checks what it is given: engines cast and cut."""

    @functools.wraps(loader)
    def load(param: Tensor, loaded_weight: Tensor, *shard: Any, **named: Any) -> Any:
        check_arriving(name, loaded_weight, rows(*shard, **named), full_columns)
        return loader(param, loaded_weight, *shard, **named)

    return load


def check_all_loaded(layer: Any, name: str, values: int) -> None:
    """Refuse a layer whose weights came only in part, or not at all: vLLM would hand over uninitialized memory.

    It counts values; what came twice, from files that overlap, would stand for what never came.
    """
    if get_layerwise_info(layer).load_numel < values:
        raise ValueError(missing(name, "weight"))
    seen: set[tuple[str, str]] = set()
    for parameter, given in get_layerwise_info(layer).loaded_weights:
        shard = repr([value for value in given.arguments.values() if not isinstance(value, Tensor)])
        if (parameter, shard) in seen:
            raise ValueError(
                f"{name}.{parameter}: got a tensor twice before all had come, needed each once; the checkpoint's files "
                "overlap: give it an index, or remove the copy"
            )
        seen.add((parameter, shard))


def reduce_max_over(group: Any) -> Callable[[Tensor], Tensor]:
    """The largest of a tensor over the ranks of a vLLM group, so that all of them scale for the same amax."""

    def reduce(amax: Tensor) -> Tensor:
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group.device_group)
        return amax

    return reduce


def install(layer: Any, stem: str, prepared: PreparedWeight, vllm_config: Any) -> None:
    """Replace what was loaded under ``stem`` by the prepared weight, as parameters that vLLM can reload in place.

    vLLM's cache of compiled code does not look at weights. It asks ``vllm_config``, which tells it here for which
    kernels they were prepared: those change with a compiler, and with versions of this package.
    """
    more = vllm_config.additional_config
    for name, tensor in prepared_parameters(prepared):
        replace_parameter(layer, stem + name, tensor)
        if isinstance(more, dict):
            form = f"{stem}{name} {None if tensor is None else (tensor.dtype, *tensor.shape)}"
            more[FORMS] = sorted({*more.get(FORMS, []), form})
