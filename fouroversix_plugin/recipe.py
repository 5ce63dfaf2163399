"""What to compute: the recipe of one tensor, and the scheme of a model (the ``quantization_config`` block).

This is the only home of the numbers 6, 256 and 448. Pure Python: importable without torch.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

QUANT_METHOD: Final = "nvfp4_4over6"
FORMAT_VERSION: Final = 1
BLOCK_SIZE: Final = 16
"""Values that share one E4M3 block scale (``group_size`` on disk)."""
E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0

Metric = Literal["mse", "mae", "abs_max"]
ErrorDomain = Literal["amax", "decode_scale", "scaled"]
ScaleMax = Literal[256, 448]
Granularity = Literal["tensor", "token"]
InputScale = Literal["token", "static"]

_PLAIN: Final = "plain"
_REGEX: Final = "re:"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the values of one tensor become NVFP4.

    Args:
        metric: what the two candidates of a block are compared by: the sum of squared errors (``mse``), of
            absolute errors (``mae``), or the largest absolute error (``abs_max``).
        scale_max: the E4M3 block scale that the tensor's (or row's) amax maps to. 256 leaves room for a block
            at the amax to choose 4: its scale is then 256 * 1.5 = 384.
        adaptive: ``False`` is plain NVFP4: every block maps its largest value to 6.
        error: where errors are measured: ``amax`` (input domain through the amax), ``decode_scale`` (input domain
            through the rounded decode scale) or ``scaled`` (the scaled domain, before the global scale).

    Sources: arXiv 2512.02010; the defaults are those of the paper and of the fouroversix reference.
    """

    metric: Metric = "mse"
    scale_max: ScaleMax = 256
    adaptive: bool = True
    error: ErrorDomain = "amax"

    def __post_init__(self) -> None:
        _one_of("metric", self.metric, get_args(Metric))
        _one_of("scale_max", self.scale_max, get_args(ScaleMax))
        _one_of("adaptive", self.adaptive, (True, False))
        _one_of("error", self.error, get_args(ErrorDomain))

    @property
    def encoded_amax(self) -> float:
        """The e2m1 * block_scale product that the amax maps to: scale_max * 6 (1536 or 2688)."""
        return self.scale_max * E2M1_MAX

    @property
    def largest_block_scale(self) -> float:
        """The largest E4M3 block scale of a tensor scaled for its own amax (384 for an adaptive 256)."""
        return min(self.scale_max * 1.5, E4M3_MAX) if self.adaptive else float(self.scale_max)

    @property
    def key(self) -> str:
        """The recipe as one word, such as ``mse_256_amax``: how operators receive it. See :meth:`from_key`."""
        word = f"{self.metric}_{self.scale_max}_{self.error}"
        return word if self.adaptive else f"{word}_{_PLAIN}"

    @staticmethod
    def from_key(key: str) -> Recipe:
        """The recipe whose :attr:`key` is ``key``."""
        recipe = _recipes_by_key().get(key)
        if recipe is None:
            raise ValueError(f"recipe key: got {key!r}, needed one of {', '.join(sorted(_recipes_by_key()))}")
        return recipe

    def to_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "scale_max": self.scale_max, "adaptive": self.adaptive, "error": self.error}

    @staticmethod
    def from_dict(config: object, where: str = "recipe") -> Recipe:
        """Read a recipe strictly: exactly the four keys, exactly their types."""
        config = mapping_at(config, where)
        _exact_keys(config, where, required=("metric", "scale_max", "adaptive", "error"))
        return _recipe_at(config, where)

    def __str__(self) -> str:
        return f"{self.metric} {self.scale_max} {self.error}" if self.adaptive else f"plain NVFP4 {self.scale_max}"


@functools.cache
def _recipes_by_key() -> dict[str, Recipe]:
    recipes = (
        Recipe(metric, scale_max, adaptive, error)
        for metric in get_args(Metric)
        for scale_max in get_args(ScaleMax)
        for adaptive in (True, False)
        for error in get_args(ErrorDomain)
    )
    return {recipe.key: recipe for recipe in recipes}


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a quantized model is: the ``quantization_config`` block of ``config.json``.

    Args:
        weights: the recipe of the weights (per tensor; merged projections share one amax).
        activations: the recipe of the activations, quantized while serving (W4A4), or ``None`` (W4A16).
        input_scale: what activations are scaled for: every ``token`` for its own amax, or all for a ``static`` one
            that calibration put into the checkpoint (``input_scale`` of ModelOpt, ``input_global_scale`` of
            compressed-tensors). On disk this is the ``granularity`` of ``activations``.
        ignore: modules left unquantized: names, globs (``*``, ``?``, ``[…]``, matched against the whole name), and
            regular expressions after ``re:`` (matched from the start of the name, as compressed-tensors does).
        producer: who wrote a checkpoint: free-form strings, empty for a scheme that is only a wish.
    """

    weights: Recipe = field(default_factory=Recipe)
    activations: Recipe | None = field(default_factory=Recipe)
    input_scale: InputScale = "token"
    ignore: tuple[str, ...] = ()
    producer: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _one_of("input_scale", self.input_scale, get_args(InputScale))
        ignore: object = self.ignore
        if isinstance(ignore, (list, tuple)):
            # What an engine's mapping of names leaves of one may be empty: it matches nothing, but no config has such.
            ignore = [pattern for pattern in ignore if pattern != ""]
        object.__setattr__(self, "ignore", strings_at(ignore, "ignore"))  # of a string, letters would be patterns
        for pattern in self.ignore:
            _check_pattern(pattern)

    @property
    def name(self) -> str:
        return "W4A4" if self.activations else "W4A16"

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` block; ``Scheme.from_dict`` reads it back to an equal scheme."""
        activations = None
        if self.activations is not None:
            activations = {**self.activations.to_dict(), "granularity": self.input_scale}
        block: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "group_size": BLOCK_SIZE,
            "weights": self.weights.to_dict(),
            "activations": activations,
            "ignore": list(self.ignore),
        }
        if self.producer:
            block["producer"] = dict(self.producer)
        return block

    @staticmethod
    def from_dict(config: object) -> Scheme:
        """Read a ``quantization_config`` block strictly.

        Raises:
            ValueError: an unknown or missing key, a wrong type or value; the message names the key. Nothing is
                guessed and nothing has a default, except ``producer``, which only a written checkpoint has.
        """
        where = "quantization_config"
        config = mapping_at(config, where)
        required = ("quant_method", "format_version", "group_size", "weights", "activations", "ignore")
        _exact_keys(config, where, required=required, optional=("producer",))
        _one_of(f"{where}.quant_method", config["quant_method"], (QUANT_METHOD,))
        _one_of(f"{where}.format_version", config["format_version"], (FORMAT_VERSION,))
        _one_of(f"{where}.group_size", config["group_size"], (BLOCK_SIZE,))
        activations, input_scale = _activations(config["activations"], f"{where}.activations")
        return Scheme(
            weights=Recipe.from_dict(config["weights"], f"{where}.weights"),
            activations=activations,
            input_scale=input_scale,
            ignore=strings_at(config["ignore"], f"{where}.ignore"),
            producer=_producer(config.get("producer", {}), f"{where}.producer"),
        )

    @staticmethod
    def from_options(config: object) -> Scheme:
        """Read what a user asks an engine for: a whole block, or the short form that names a preset.

        The short form is ``{"quant_method": "nvfp4_4over6", "recipe": NAME}``, with an optional ``ignore`` list that
        replaces the preset's. A checkpoint never holds it.
        """
        where = "quantization_config"
        config = mapping_at(config, where)
        if "recipe" not in config:
            return Scheme.from_dict(config)
        _exact_keys(config, where, required=("quant_method", "recipe"), optional=("ignore",))
        _one_of(f"{where}.quant_method", config["quant_method"], (QUANT_METHOD,))
        scheme = preset(config["recipe"])
        return replace(scheme, ignore=strings_at(config["ignore"], f"{where}.ignore")) if "ignore" in config else scheme

    def ignores(self, name: str, shards: Sequence[str] = ()) -> bool:
        """Whether the module ``name`` is left unquantized.

        Args:
            name: full module name as the engine or the checkpoint spells it.
            shards: for a fused module, the full names of what it is made of in the checkpoint.

        Raises:
            ValueError: only some of the shards are ignored, which a fused layer cannot do.
        """
        if self._matches(name):
            return True
        ignored = [shard for shard in shards if self._matches(shard)]
        if ignored and len(ignored) < len(shards):
            kept = next(shard for shard in shards if shard not in ignored)
            raise ValueError(
                f"{name}: `ignore` matches {ignored[0]!r} but not {kept!r}, which the engine fuses into one layer; "
                "ignore all of its parts or none"
            )
        return bool(ignored)

    def _matches(self, name: str) -> bool:
        return any(
            re.match(pattern.removeprefix(_REGEX), name)
            if pattern.startswith(_REGEX)
            else fnmatch.fnmatchcase(name, pattern)
            for pattern in self.ignore
        )


def _recipe_directory() -> Path:
    package = Path(__file__).parent
    installed = package / "configs" / "recipes"
    return installed if installed.is_dir() else package.parent / "configs" / "recipes"


def preset_names() -> list[str]:
    """Names of the presets in ``configs/recipes``."""
    return sorted(path.stem for path in _recipe_directory().glob("*.json"))


def preset(name: object) -> Scheme:
    """The preset ``name`` of ``configs/recipes``."""
    _one_of("recipe", name, tuple(preset_names()))
    return load_scheme(_recipe_directory() / f"{name}.json")


def load_scheme(path: Path) -> Scheme:
    """Read a file that holds exactly one ``quantization_config`` block."""
    try:
        return Scheme.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _recipe_at(config: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe(config["metric"], config["scale_max"], config["adaptive"], config["error"])
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


def _activations(config: object, where: str) -> tuple[Recipe | None, InputScale]:
    if config is None:
        return None, "token"
    config = mapping_at(config, where)
    _exact_keys(config, where, required=("metric", "scale_max", "adaptive", "error", "granularity"))
    if config["granularity"] == "tensor":
        raise ValueError(
            f"{where}.granularity: got 'tensor', needed 'token' or 'static'; with one amax for the whole batch a "
            "request's answer would depend on its neighbours"
        )
    _one_of(f"{where}.granularity", config["granularity"], get_args(InputScale))
    return _recipe_at(config, where), config["granularity"]


def _check_pattern(pattern: str) -> None:
    if pattern.startswith(_REGEX):
        try:
            re.compile(pattern.removeprefix(_REGEX))
        except (re.error, RecursionError) as error:
            raise ValueError(f"ignore: {pattern!r} is no regular expression: {error}") from None


def _producer(value: object, where: str) -> dict[str, str]:
    producer = mapping_at(value, where)
    for key, text in producer.items():
        if not isinstance(text, str):
            raise ValueError(f"{where}.{key}: got {text!r}, needed a string")
    return dict(producer)


def mapping_at(value: object, where: str) -> Mapping[str, Any]:
    """``value``, which must be a JSON object; ``where`` it stands is for the error."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: got {value!r}, needed an object")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{where}: got the key {key!r}, needed strings as keys")
    return value


def strings_at(value: object, where: str) -> tuple[str, ...]:
    """``value``, which must be a list of non-empty strings; ``where`` it stands is for the error."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: got {value!r}, needed a list of non-empty strings")
    for item in value:
        if not isinstance(item, str) or not item:
            raise ValueError(f"{where}: got {item!r} in it, needed a list of non-empty strings")
    return tuple(value)


def _exact_keys(
    config: Mapping[str, Any], where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    unknown = [key for key in config if key not in required and key not in optional]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(required + optional)}")
    missing = [key for key in required if key not in config]
    if missing:
        raise ValueError(f"{where}: key {missing[0]!r} is missing; needed are {', '.join(required)}")


def _one_of(where: str, value: object, allowed: tuple[Any, ...]) -> None:
    # `type` as well as value: 256.0 and True compare equal to 256 and 1, but are not what the format says.
    if not any(type(value) is type(item) and value == item for item in allowed):
        raise ValueError(f"{where}: got {value!r}, needed {' or '.join(repr(item) for item in allowed)}")
