"""Who writes NVFP4 checkpoints, and how: what each family of files calls the parts of a weight and how it stores them.

One weight is ``packed`` codes, a ``block_scale`` per 16 columns and a ``decode_scale``; families differ in the names,
in the direction of the fp32 scales and in padding. :meth:`Format.canonical` turns any of them into the parts of an
:class:`~fouroversix_plugin.nvfp4.NVFP4Tensor`, and :func:`stored_scheme` reads what a config claims.

Sources: the loaders of vLLM 0.32 (``modelopt.py``, ``compressed_tensors_w4a4_nvfp4.py``), compressed-tensors 0.17,
fouroversix's ``QuantizedTensor`` and transformers' ``FourOverSixConfig``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from fouroversix_plugin.nvfp4 import padded_scale_shape, scales_from_layout
from fouroversix_plugin.recipe import BLOCK_SIZE, QUANT_METHOD, Metric, Recipe, Scheme, mapping_at, strings_at
from fouroversix_plugin.reference import global_scales
from fouroversix_plugin.weights import check_full_precision

Part = Literal["packed", "block_scale", "decode_scale", "input_scale", "metadata"]


@dataclass(frozen=True, slots=True)
class Format:
    """The spelling of one family of files.

    Args:
        name: its ``quant_method`` in a config.
        names: what follows the module's name in the name of each part's tensor; a part that is not listed does not
            exist in this family.
        inverted: the fp32 scales are encode scales: reciprocals of what they decode with.
        padded: rows are padded to 128 and columns to 64, block scales lie flat in the 128x4 layout, and an amax stands
            in the place of the decode scale.
    """

    name: str
    names: Mapping[Part, str]
    inverted: bool = False
    padded: bool = False

    def tensors(self, module: str) -> Iterator[tuple[Part, str]]:
        """Each part with the full name of its tensor for ``module``."""
        return ((part, f"{module}.{name}") for part, name in self.names.items())

    def canonical(
        self, part: Part, name: str, tensor: Tensor, rows: int | None, columns: int, recipe: Recipe
    ) -> Tensor:
        """A part as it is stored, as an NVFP4Tensor wants it.

        Args:
            part: which.
            name: of the tensor, for errors.
            tensor: as stored.
            rows: N of the weight, of which ``tensor`` is a part; None believes the tensor, which padding forbids.
            columns: its K.
            recipe: the recipe of the weights, as claimed; its range turns an amax into a decode scale.

        Returns:
            packed uint8 [N, K/2]; block_scale float8_e4m3fn [N, K/16]; decode_scale and input_scale float32 [] (or [N],
            where a row has a decode scale of its own).

        Raises:
            ValueError: another dtype or shape.
        """
        if rows is None:
            if self.padded:
                raise ValueError(f"{name}: how many of its rows are padding is not known for this layer")
            rows = tensor.shape[0] if tensor.ndim else 1
        if part == "packed":
            tensor = as_dtype(name, tensor, torch.uint8, torch.int8, getattr(torch, "float4_e2m1fn_x2", torch.uint8))
            stored_rows = padded_rows(rows) if self.padded else rows
            check_shape(name, tensor, (stored_rows, (padded_columns(columns) if self.padded else columns) // 2))
            return tensor[:rows, : columns // 2]
        if part == "block_scale":
            tensor = as_dtype(name, tensor, torch.float8_e4m3fn, torch.uint8)
            if not self.padded:
                check_shape(name, tensor, (rows, columns // BLOCK_SIZE))
                return tensor
            check_shape(name, tensor, (padded_rows(rows) * padded_columns(columns) // BLOCK_SIZE,))
            blocks = padded_columns(columns) // BLOCK_SIZE
            return scales_from_layout(tensor, "128x4", padded_rows(rows), blocks)[:rows, : columns // BLOCK_SIZE]
        if part == "metadata":
            self._check_metadata(name, tensor, rows, columns)
            return tensor
        return self._scale(part, name, tensor, rows, recipe)

    def _scale(self, part: Part, name: str, tensor: Tensor, rows: int, recipe: Recipe) -> Tensor:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name}: got {tensor.dtype}, needed float32")
        tensor = tensor.float()
        if tensor.numel() == 1:
            tensor = tensor.reshape(())
        elif part == "input_scale" or tuple(tensor.shape) not in {(rows,), (rows, 1)}:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, needed one value")
        else:
            tensor = tensor.reshape(rows)
        if self.padded:
            if bool(tensor.isinf().any()):
                raise ValueError(f"{name}: got an infinite amax, needed finite; corrupt checkpoint")
            return global_scales(tensor, recipe)[1]
        return torch.reciprocal(tensor) if self.inverted else tensor

    def _check_metadata(self, name: str, tensor: Tensor, rows: int, columns: int) -> None:
        needed = [rows, columns, padded_rows(rows), padded_columns(columns), 1, 1]
        if tensor.is_floating_point() or tensor.tolist() != needed:
            raise ValueError(
                f"{name}: got {tensor.tolist()}, needed {needed} (rows, columns, both padded, then 1 and 1 for scales "
                "in the 128x4 layout)"
            )


_MODELOPT_NAMES: Final[Mapping[Part, str]] = {
    "packed": "weight",
    "block_scale": "weight_scale",
    "decode_scale": "weight_scale_2",
    "input_scale": "input_scale",
}
OURS: Final = Format(QUANT_METHOD, {part: name for part, name in _MODELOPT_NAMES.items() if part != "input_scale"})
MODELOPT: Final = Format("modelopt", _MODELOPT_NAMES)
COMPRESSED_TENSORS: Final = Format(
    "compressed-tensors",
    {
        "packed": "weight_packed",
        "block_scale": "weight_scale",
        "decode_scale": "weight_global_scale",
        "input_scale": "input_global_scale",
    },
    inverted=True,
)
FOUROVERSIX: Final = Format(
    "fouroversix",
    {
        "packed": "quantized_weight_values",
        "block_scale": "quantized_weight_scale_factors",
        "decode_scale": "quantized_weight_amax",
        "metadata": "quantized_weight_metadata",
    },
    padded=True,
)
FORMATS: Final = (OURS, MODELOPT, COMPRESSED_TENSORS, FOUROVERSIX)

_MOST_MTP_LAYERS: Final = 16
"""More of them are a mistake in a config."""

INPUT_SCALE_RANGE: Final = Recipe(scale_max=448).encoded_amax
"""ModelOpt's ``input_scale`` is the calibrated amax divided by this, whatever range the weights have."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What the config of a quantized checkpoint claims.

    Args:
        format: how its tensors are spelled.
        scheme: its recipes and ignore list. Where ``labelled`` is False the file does not say by which recipe its
            weights were made: the scheme's is plain NVFP4, which only sets the range a scale may have.
        labelled: whether the recipe of the weights is a claim that the scales can be held to.
    """

    format: Format
    scheme: Scheme
    labelled: bool


def quantization_block(
    config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The part of a checkpoint's config that says how it is quantized, or None for full precision.

    Args:
        config: ``config.json``.
        hf_quant_config: ``hf_quant_config.json`` of older ModelOpt exports, or None.
    """
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key) is not None:
                block: Mapping[str, Any] = mapping_at(holder[key], key)
                return block
    if hf_quant_config is None:
        return None
    return {"quant_method": "modelopt", **hf_quant_config}


def layers_behind_the_last(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Globs of the layers for multi-token prediction (MTP), which DeepSeek's models and their like keep there.

    vLLM calls those of other models so, too, however a checkpoint spells them; SGLang's draft models have a decoder.

    Args:
        config: ``config.json``.
    """
    for part in (config, config.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        layers, more = part.get("num_hidden_layers"), part.get("num_nextn_predict_layers")
        if type(layers) is int and type(more) is int and more > 0:
            numbers = range(layers, layers + min(more, _MOST_MTP_LAYERS))
            return (*(f"*.layers.{n}.*" for n in numbers), "model.decoder.*")
    return ()


def stored_scheme(block: Mapping[str, Any]) -> Stored | None:
    """What a ``quantization_config`` block says, or None where it is not one of NVFP4.

    Raises:
        ValueError: NVFP4, but with something that would change its meaning and is not supported; names the key.
    """
    method = block.get("quant_method")
    if method == QUANT_METHOD:
        return Stored(OURS, Scheme.from_dict(block), labelled=True)
    if method in ("modelopt", "modelopt_fp4"):
        return _modelopt(block)
    if method == "compressed-tensors":
        return _compressed_tensors(block)
    if method == "fouroversix":
        return _fouroversix(block)
    return None


def describe(block: Mapping[str, Any]) -> str:
    """A few words for a block in an error."""
    nested = block.get("quantization")
    inner = nested if isinstance(nested, Mapping) else {}
    words = [block.get("quant_method"), block.get("quant_algo", inner.get("quant_algo")), block.get("format")]
    return " ".join(str(word) for word in words if word) or "an unknown method"


_PLAIN: Final = Recipe(adaptive=False, scale_max=448)


def _modelopt(block: Mapping[str, Any]) -> Stored | None:
    where = "quantization_config"
    settings = block
    if "quantization" in block:
        settings, where = mapping_at(block["quantization"], "quantization"), "quantization"
    algorithm = settings.get("quant_algo")
    if algorithm not in ("NVFP4", "W4A16_NVFP4"):
        if "NVFP4" in str(algorithm) or algorithm == "MIXED_PRECISION":
            raise ValueError(f"{where}.quant_algo: got {algorithm!r}, needed 'NVFP4' or 'W4A16_NVFP4'")
        return None
    groups = settings.get("config_groups")
    weight_only = isinstance(groups, Mapping) and all(
        isinstance(group, Mapping) and group.get("input_activations") is None for group in groups.values()
    )
    size = settings.get("group_size", BLOCK_SIZE)
    if size != BLOCK_SIZE:
        raise ValueError(f"{where}.group_size: got {size!r}, needed {BLOCK_SIZE}")
    for unknown in ("pre_quant_scale", "has_zero_point"):
        if settings.get(unknown):
            raise ValueError(f"{where}.{unknown}: got {settings[unknown]!r}, needed none")
    key = "exclude_modules" if "exclude_modules" in settings else "ignore"
    scheme = Scheme(
        weights=_PLAIN,
        activations=None if algorithm == "W4A16_NVFP4" or (groups and weight_only) else _PLAIN,
        input_scale="static",
        ignore=_subtrees(strings_at(settings.get(key) or [], f"{where}.{key}")),
    )
    return Stored(MODELOPT, scheme, labelled=False)


def _compressed_tensors(block: Mapping[str, Any]) -> Stored | None:
    where = "quantization_config"
    groups = mapping_at(block.get("config_groups") or {}, f"{where}.config_groups")
    if block.get("format") != "nvfp4-pack-quantized":
        return None
    if block.get("transform_config"):
        raise ValueError(f"{where}.transform_config: got one, needed weights that are not transformed")
    if len(groups) != 1:
        raise ValueError(f"{where}.config_groups: got {sorted(groups)}, needed exactly one group, of NVFP4")
    (name, group), where = next(iter(groups.items())), f"{where}.config_groups"
    group = mapping_at(group, f"{where}.{name}")
    if group.get("targets") != ["Linear"]:
        raise ValueError(f"{where}.{name}.targets: got {group.get('targets')!r}, needed ['Linear']")
    needed = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK_SIZE, "symmetric": True}
    for part in ("weights", "input_activations"):
        arguments = group.get(part)
        if part == "input_activations" and arguments is None:
            continue
        arguments = mapping_at(arguments, f"{where}.{name}.{part}")
        for key, value in needed.items():
            if arguments.get(key, value) != value:
                raise ValueError(f"{where}.{name}.{part}.{key}: got {arguments[key]!r}, needed {value!r}")
    scheme = Scheme(
        weights=_PLAIN,
        activations=None if group.get("input_activations") is None else _PLAIN,
        input_scale="static",
        ignore=strings_at(block.get("ignore") or [], "quantization_config.ignore"),
    )
    return Stored(COMPRESSED_TENSORS, scheme, labelled=False)


def _fouroversix(block: Mapping[str, Any]) -> Stored:
    where = "quantization_config"
    for key, usual in (("dtype", "nvfp4"), ("keep_master_weights", False), ("module_config_overrides", None)):
        value = block.get(key, usual)
        if (value or usual) != usual:
            raise ValueError(f"{where}.{key}: got {value!r}, needed {usual!r}")
    for key in ("weight_dtype", "activation_dtype"):
        if (block.get(key) or "nvfp4") != "nvfp4":
            raise ValueError(f"{where}.{key}: got {block[key]!r}, needed 'nvfp4'")
    weights, activations = (
        _rule(block.get(key) or block.get("scale_rule", "mse"), f"{where}.{key}")
        for key in ("weight_scale_rule", "activation_scale_rule")
    )
    names = strings_at(block.get("modules_to_not_convert") or [], f"{where}.modules_to_not_convert")
    # transformers matches such a name as a whole or as the end of a longer one.
    ignore = _subtrees((*names, *(f"*.{name}" for name in names)))
    return Stored(FOUROVERSIX, Scheme(weights=weights, activations=activations, ignore=ignore), labelled=True)


def _rule(rule: object, where: str) -> Recipe:
    metrics: dict[str, Metric] = {"mse": "mse", "mae": "mae", "abs_max": "abs_max"}
    if isinstance(rule, str) and rule in metrics:
        return Recipe(metrics[rule])
    if rule == "static_6":
        return _PLAIN
    raise ValueError(f"{where}: got {rule!r}, needed mse, mae, abs_max or static_6")


def _subtrees(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Patterns that name a part of a model, as patterns for the modules in it: ``a`` and ``a.*`` are both a subtree."""
    whole = [pattern.removesuffix(".*") for pattern in patterns]
    return tuple(dict.fromkeys(name for pattern in whole for name in (pattern, f"{pattern}.*")))


def padded_rows(rows: int) -> int:
    return padded_scale_shape("128x4", rows, 1)[0]


def padded_columns(columns: int) -> int:
    return padded_scale_shape("128x4", 1, -(-columns // BLOCK_SIZE))[1] * BLOCK_SIZE


def as_dtype(name: str, tensor: Tensor, needed: torch.dtype, *same_bytes: torch.dtype) -> Tensor:
    """``tensor`` as ``needed``, which it is or whose bytes it holds under another dtype."""
    if tensor.dtype in same_bytes:
        return tensor.view(needed)
    if tensor.dtype != needed:
        raise ValueError(f"{name}: got {tensor.dtype}, needed {needed}; the tensor is not NVFP4")
    return tensor


def check_arriving(name: str, given: Tensor, rows: int | None, full_columns: int) -> None:
    """Raise ValueError unless ``given`` can be a part of the full-precision weight of the layer ``name``.

    Args:
        rows: N that it must have where it is a matrix, over all ranks, or None where that is not known.
        full_columns: K over all ranks.
    """
    check_full_precision(f"{name}.weight", given.dtype)
    if given.ndim == 2:
        check_shape(f"{name}.weight", given, (given.shape[0] if rows is None else rows, full_columns))


def check_shape(name: str, tensor: Tensor, needed: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` has the shape ``needed``."""
    if tuple(tensor.shape) != needed:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, needed {needed}")
