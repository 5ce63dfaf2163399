"""Which scheme a model is served with: what its checkpoint holds, and what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fouroversix_plugin.formats import (
    FOUROVERSIX,
    OURS,
    Format,
    Stored,
    describe,
    layers_behind_the_last,
    quantization_block,
    stored_scheme,
)
from fouroversix_plugin.recipe import QUANT_METHOD, Recipe, Scheme, preset

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """What a model's layers are created for.

    Args:
        scheme: recipes and ignore list.
        stored: how a quantized checkpoint spells its weights, None for a full-precision one.
        claimed: what a checkpoint says its weights were quantized with, or None where it says nothing.
    """

    scheme: Scheme
    stored: Format | None = None
    claimed: Recipe | None = None


def claims(hf_quant_cfg: object, user_quant: str | None) -> bool:
    """Whether a checkpoint's quantization block is ours to serve: where the user asks for it, or no engine loads it.

    Engines ask this for every checkpoint, so it never raises: what is wrong with one is said when it is ours.
    """
    if not isinstance(hf_quant_cfg, Mapping):
        return False
    method = hf_quant_cfg.get("quant_method")
    if method == FOUROVERSIX.name and user_quant in (None, QUANT_METHOD):
        return True
    return user_quant == QUANT_METHOD and method != QUANT_METHOD


def served(
    model: str, asked: Scheme | None, config: Mapping[str, Any] | None, hf_quant_config: Mapping[str, Any] | None
) -> Served:
    """Tell a stored checkpoint from a full-precision one by what its own files say.

    An engine's ``from_config`` cannot: options of the user reach it like a checkpoint's block.

    Args:
        model: its name, for errors.
        asked: what the user's options say, or None.
        config: ``config.json`` as it lies in the checkpoint, or None where it has none.
        hf_quant_config: ``hf_quant_config.json`` of older ModelOpt exports, or None.

    Raises:
        ValueError: no config, a checkpoint quantized with something else, or options that do not fit it.
    """
    if config is None:
        raise ValueError(
            f"{model}: config.json not found, needed to see how the weights are stored; serve the checkpoint as "
            "transformers has it (Mistral's params.json is not read)"
        )
    scheme = preset(QUANT_METHOD) if asked is None else asked
    block = quantization_block(config, hf_quant_config)
    if block is None:
        if scheme.input_scale == "static":
            raise ValueError(
                f"{model}: got a full-precision checkpoint for static activations, needed one with calibrated input "
                "scales; quantize activations per token"
            )
        return Served(replace(scheme, ignore=scheme.ignore + layers_behind_the_last(config)))
    found = stored_scheme(block)
    if found is None:
        raise ValueError(
            f"{model}: already quantized ({describe(block)}), needed full precision or NVFP4 (nvfp4_4over6, modelopt, "
            f"compressed-tensors, fouroversix); serve it without --quantization {QUANT_METHOD}"
        )
    return _adopted(found, scheme, asked, model)


def _adopted(found: Stored, scheme: Scheme, asked: Scheme | None, model: str) -> Served:
    """Take the weights as they are stored; activations as asked for, else as the checkpoint says.

    A foreign W4A4 checkpoint says "static, plain NVFP4". Unless that is asked for (the preset ``nvfp4_static``), its
    activations are quantized per token with Four over Six.
    """
    ours = found.format is OURS
    if ours and scheme.weights != found.scheme.weights:
        raise ValueError(
            f"{model}: weights were quantized with {found.scheme.weights}, options ask for {scheme.weights}; only "
            "`activations` of a quantized checkpoint can be changed"
        )
    if asked is not None and asked.ignore != found.scheme.ignore:
        logger.info("fouroversix: the checkpoint's own `ignore` list applies, not the one of the options")
    activations = scheme
    if asked is None and (ours or found.format is FOUROVERSIX or found.scheme.activations is None):
        activations = found.scheme
    if activations.input_scale == "static" and "input_scale" not in found.format.names:
        raise ValueError(
            f"{model}: got static activations for a checkpoint of {found.format.name}, which has no input scales; "
            "quantize activations per token"
        )
    result = replace(found.scheme, activations=activations.activations, input_scale=activations.input_scale)
    logger.info(
        "fouroversix: weights as stored by %s%s; activations: %s",
        found.format.name,
        f" ({found.scheme.weights})" if found.labelled else "",
        _activations(result),
    )
    return Served(result, found.format, found.scheme.weights if found.labelled else None)


def _activations(scheme: Scheme) -> str:
    if scheme.activations is None:
        return "not quantized (W4A16)"
    how = "by the checkpoint's static input_scale" if scheme.input_scale == "static" else "per token"
    return f"{scheme.activations}, {how} (W4A4)"


def fused_shards(prefix: str, mapping: Mapping[str, list[str]]) -> list[str]:
    """Checkpoint names of what a fused layer is made of: …qkv_proj → …q_proj, …k_proj, …v_proj."""
    parent, _, name = prefix.rpartition(".")
    return [f"{parent}.{shard}" if parent else shard for shard in mapping.get(name, ())]
