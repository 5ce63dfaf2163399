"""New weights for a running server: an error while loading them would have SGLang load the old ones, and end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from fouroversix_plugin.serving.sglang.linear import DONE, reload_refusal

_UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "update_weights_from_distributed",
    "load_weights_from_distributed",
)
"""Methods that load; of the last two a release has one."""


def register() -> None:
    """Stand before everything that loads weights into a running model."""
    for name in _UPDATES:
        if hasattr(WeightUpdater, name):
            HookRegistry.register(f"{WeightUpdater.__module__}.WeightUpdater.{name}", refuse_ours, HookType.AROUND)


def refuse_ours(update: Callable[..., tuple[bool, str]], updater: Any, *given: Any, **named: Any) -> tuple[bool, str]:
    """In place of an update: what SGLang answers, with the name of a layer, where the model has one of ours."""
    for layer in updater.get_model().modules():
        if (name := getattr(layer, DONE, None)) is not None:
            return False, reload_refusal(name)
    return update(updater, *given, **named)
