"""NVFP4 with Four over Six block scaling: quantize, multiply, and serve through inference engines.

Importing the package imports nothing heavy: the public names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fouroversix_plugin.checkpoint import CheckpointError, load_checkpoint
    from fouroversix_plugin.functional import backends, dequantize, linear, moe, quantize
    from fouroversix_plugin.nvfp4 import NVFP4Tensor
    from fouroversix_plugin.recipe import Recipe, Scheme, preset

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "NVFP4Tensor",
    "Recipe",
    "Scheme",
    "backends",
    "dequantize",
    "linear",
    "load_checkpoint",
    "moe",
    "preset",
    "quantize",
]

_HOMES = {"CheckpointError": "checkpoint", "NVFP4Tensor": "nvfp4", "Recipe": "recipe"}
_HOMES |= {"Scheme": "recipe", "load_checkpoint": "checkpoint", "preset": "recipe"}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'functional')}")
    return getattr(home, name)
