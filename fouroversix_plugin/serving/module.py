"""What stands on an engine's layer: the parts of a stored weight while it loads, the prepared weight afterwards.

Engines name the attributes of their merged layers alike; everything here reads only those.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fouroversix_plugin.formats import Format, Part
from fouroversix_plugin.kernels.ops import PreparedWeight
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.recipe import Recipe, Scheme
from fouroversix_plugin.serving.layer import WeightShape, check_input_size, static_amax
from fouroversix_plugin.weights import of_experts, stored_weight

NAMES: Final = ("weight", "weight_scale", "weight_scale_2")
"""Parameters of a prepared weight, after its stem: its fields in their order."""

_ASKED: Final = (
    "ColumnParallelLinear",
    "DCPGroupColumnParallelLinear",
    "DeepSeekV2FusedQkvAProjLinear",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RowParallelLinear",
)
"""Linear layers of engines, and those of models whose attributes mean the same."""

ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh")
"""Of gated experts."""


def prepared_parameters(prepared: PreparedWeight) -> list[tuple[str, Tensor | None]]:
    """The parameters that a layer holds for a prepared weight."""
    return list(zip(NAMES, (prepared.weight, prepared.block_scale, prepared.decode_scale), strict=True))


def installed(layer: Any, stem: str) -> PreparedWeight:
    """The prepared weight that stands under ``stem``."""
    return PreparedWeight(*(getattr(layer, stem + name) for name in NAMES))


def input_amax(layer: Any, stem: str) -> Tensor | None:
    """What the activations of a layer with static ones are scaled for."""
    amax: Tensor | None = getattr(layer, f"{stem}input_amax", None)
    return amax


def take_stored(layer: Any, stem: str, name: str, form: Format, scheme: Scheme, widths: Sequence[int]) -> NVFP4Tensor:
    """The loaded parts under ``stem`` as one checked weight; what a prepared weight does not replace leaves the layer.

    Args:
        name: of the weight, for errors.
        widths: rows of each shard with a decode scale of its own.
    """
    parts: dict[Part, Tensor] = {part: getattr(layer, stem + spelled).data for part, spelled in form.names.items()}
    for spelled in form.names.values():
        if spelled not in NAMES:
            delattr(layer, stem + spelled)
    if scheme.input_scale == "static" and scheme.activations is not None:
        amax = static_amax(name, parts["input_scale"])
        # As a buffer: it moves with the layer and compiled graphs read it. Persistent: of others, engines that load
        # weights again keep the old values.
        layer.register_buffer(f"{stem}input_amax", amax)
    return stored_weight(name, parts["packed"], parts["block_scale"], parts["decode_scale"], widths, scheme.weights)


def without_its_layer(loader: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's own loader that does not keep the layer: vLLM keeps what stands on its parameters for longer."""
    if not isinstance(loader, MethodType):
        return loader
    method = weakref.WeakMethod(loader)

    def load(*given: Any, **named: Any) -> Any:
        own = method()
        assert own is not None, "the layer that is loaded is gone"
        return own(*given, **named)

    load.__signature__ = inspect.signature(loader)  # type: ignore[attr-defined]
    return load


class Unloaded:
    """Has the parts of a stored weight begin as what no checkpoint holds, also where they are loaded again.

    For that, vLLM gives a layer new parameters: first on the meta device, where it counts what comes, then with memory
    that holds anything. Afterwards it puts back what is served, with the loaders of now, which must not touch it.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = weakref.ref(layer)
        self._announced = False
        self._values: dict[str, float] = {}

    def before(self, loader: Callable[..., object], name: str, empty: Tensor) -> Callable[..., object]:
        """The loader of the parameter ``name``, which begins as ``empty``: fills what is new of the layer first."""
        self._values[name] = float(_numbers(empty).flatten()[:1].sum())

        @functools.wraps(loader)
        def load(param: Tensor, *given: Any, **named: Any) -> object:
            if param.is_meta:
                self._announced = True
            elif self._announced:
                self._announced = False
                self._begin()
            return loader(param, *given, **named)

        return load

    def _begin(self) -> None:
        for name, value in self._values.items():
            parameter = getattr(self._layer(), name)
            if not parameter.is_meta:
                _numbers(parameter.data).fill_(value)


def _numbers(data: Tensor) -> Tensor:
    return data.view(torch.uint8) if data.dtype == torch.float8_e4m3fn else data


def rows_in_checkpoint(layer: Any, output_size: int, shard: Any) -> int | None:
    """N of a shard over all ranks, by what merged layers know of themselves; None where they know nothing.

    Layers of models' own are not asked: they may count what each rank has a copy of as often as there are ranks.

    ``output_size``: the engine's, which does so with key and value heads of which there are fewer than ranks.
    """
    if type(layer).__name__ not in _ASKED:
        return None
    if hasattr(layer, "total_num_kv_heads") and shard in (None, "q", "k", "v"):
        size, v_size = layer.head_size, getattr(layer, "v_head_size", layer.head_size)
        q, kv = layer.total_num_heads, layer.total_num_kv_heads
        rows = {"q": q * size, "k": kv * size, "v": kv * v_size}
        return int(rows[shard] if shard else sum(rows.values()))
    if shard is None:
        return output_size
    sizes = getattr(layer, "output_sizes", None)
    return int(sizes[shard]) if isinstance(shard, int) and sizes is not None else None


def fill_all_shards(loader: Callable[..., Any]) -> Callable[..., Any]:
    """One decode scale without a shard is that of a projection stored fused: engines would set only the first's."""

    def load(param: Tensor, loaded_weight: Tensor, *shard: Any) -> None:
        if shard and shard[0] is not None:
            loader(param, loaded_weight, *shard)
        else:
            param.data.fill_(loaded_weight.reshape(()))

    return load


class Kind(NamedTuple):
    """What makes an engine's expert loader treat a part as what it is: a name and an attribute that it decides by."""

    name: str
    attributes: dict[str, str]


EXPERT_KINDS: Final[Mapping[Part, Kind]] = {
    "packed": Kind("weight", {}),
    "block_scale": Kind("weight_scale", {"quant_method": "block"}),
    "decode_scale": Kind("weight_scale_2", {"quant_method": "tensor"}),
    # Under its own name the scales of w1 and w3 would be written to the same place.
    "input_scale": Kind("weight_scale_2", {"quant_method": "tensor"}),
    "metadata": Kind("weight_scale_2", {}),
}


def under_name(loader: Callable[..., Any], name: str) -> Callable[..., Any]:
    """An engine's expert loader told another name than the checkpoint's.

    Granite 4 in SGLang asks, as in vLLM, whether an expert was loaded, and SGLang's loader does not say: it was, then.
    """
    says = "return_success" in inspect.signature(loader).parameters

    @functools.wraps(loader)
    def load(param: Tensor, loaded_weight: Tensor, weight_name: str, *shard: Any, **named: Any) -> Any:
        asked = not says and named.pop("return_success", False)
        return loader(param, loaded_weight, name, *shard, **named) or asked

    return load


def expert_shapes(name: str, experts: int, hidden_size: int, inner: int, full_inner: int) -> dict[str, WeightShape]:
    """The weights of ``experts`` on this rank, by the stems of their parameters.

    Args:
        name: of the layer, for errors.
        inner: intermediate size on this rank.
        full_inner: the same over all ranks.
    """
    check_input_size(name, hidden_size, hidden_size)
    check_input_size(name, inner, full_inner)
    lead = (experts,)
    return {
        "w13_": WeightShape(2 * inner, hidden_size, hidden_size, shards=2, lead=lead),
        "w2_": WeightShape(hidden_size, inner, full_inner, shards=1, lead=lead),
    }


def full_expert_rows(stem: str, shape: WeightShape, ranks: int) -> Callable[..., int]:
    """N of one of an expert's three weights over the ranks that share it, whatever the shard."""
    rows = shape.rows if stem == "w2_" else shape.rows // 2 * ranks
    return lambda *shard, **named: rows


def create_stored_experts(
    layer: Any,
    stem: str,
    name: str,
    form: Format,
    shape: WeightShape,
    recipe: Recipe,
    attributes: Mapping[str, Any],
    rows: Callable[..., int],
    set_attributes: Callable[[Tensor, dict[str, Any]], object],
) -> None:
    """Put on a layer what one stored weight of its experts is loaded into.

    Args:
        stem: of the parameters' names.
        name: of the layer, for errors.
        attributes: what the engine wants on expert parameters, its ``weight_loader`` among them.
        rows: as :func:`full_expert_rows` makes it.
        set_attributes: the engine's.
    """
    unloaded = Unloaded(layer)
    for stored in shape.stored(form):
        parameter = torch.nn.Parameter(stored.empty, requires_grad=False)
        layer.register_parameter(stem + stored.name, parameter)
        kind = EXPERT_KINDS[stored.part]
        loader = under_name(without_its_layer(attributes["weight_loader"]), stem + kind.name)
        checked = stored.loader(loader, of_experts(name, stem), recipe, rows)
        checked = unloaded.before(checked, stem + stored.name, stored.empty)
        set_attributes(parameter, {**attributes, **kind.attributes, "weight_loader": checked})


def take_stored_experts(layer: Any, stem: str, name: str, form: Format, scheme: Scheme) -> NVFP4Tensor:
    """:func:`take_stored` of experts: gate and up have decode scales of their own."""
    shards = 2 if stem == "w13_" else 1
    rows = getattr(layer, stem + form.names["packed"]).shape[1] // shards
    return take_stored(layer, stem, of_experts(name, stem), form, scheme, [rows] * shards)


def refuse_experts(name: str, reasons: Sequence[str]) -> None:
    """Raise ValueError where fused experts need something that ours do not do."""
    if reasons:
        raise ValueError(
            f"{name}: nvfp4_4over6 does not do {'; '.join(reasons)} in fused experts; add '{name}*' to `ignore` to "
            "serve them unquantized"
        )


def refuse_random_bytes(name: str) -> None:
    """Random bytes are no block scales."""
    raise ValueError(
        f"{name}: got --load-format dummy for a quantized checkpoint, needed its weights; use a full-precision "
        "config.json with --quantization nvfp4_4over6, whose random weights are quantized"
    )
