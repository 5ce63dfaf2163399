"""SGLang: ``--quantization nvfp4_4over6``. Only this package imports SGLang, once it asks for the plugin."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

OLDEST, NEWEST = (0, 5, 14), (0, 5, 23)
"""Releases whose interfaces were checked."""

RUNNER = "fouroversix"
"""What ``--moe-runner-backend`` calls ours."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point of ``sglang.srt.plugins``: make method and MoE runner known. Idempotent; runs in every process.

    SGLang only logs what goes wrong here, so a choice of the command line comes after what it stands for.
    """
    from sglang.version import __version__

    _log_through_sglang()
    refusal, warning = version_refusal(__version__), version_warning(__version__)
    if refusal is not None:
        logger.error(refusal)
        return
    from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_moe_runner_backend_choices, add_quantization_method_choices

    from fouroversix_plugin.recipe import QUANT_METHOD
    from fouroversix_plugin.serving.sglang.config import FourOverSixConfig, see_checkpoint, with_fused_experts

    if QUANTIZATION_METHODS.get(QUANT_METHOD) is FourOverSixConfig:
        return
    HookRegistry.register("sglang.srt.model_loader.loader._get_quantization_config", see_checkpoint, HookType.AFTER)
    HookRegistry.register("sglang.srt.model_loader.utils.get_model_architecture", with_fused_experts, HookType.AFTER)
    # First: SGLang asks the methods in this order whose a checkpoint is, and its own ModelOpt ones take any of theirs.
    others = dict(QUANTIZATION_METHODS)
    QUANTIZATION_METHODS.clear()
    QUANTIZATION_METHODS.update({QUANT_METHOD: FourOverSixConfig, **others})
    CPU_QUANTIZATION_METHODS[QUANT_METHOD] = FourOverSixConfig
    add_quantization_method_choices([QUANT_METHOD])
    if warning is not None:
        logger.warning(warning)
    # Last: a name that is gone here must not cost dense models the plugin.
    _refuse_updates()
    runner_module().register()
    add_moe_runner_backend_choices([RUNNER])


def _refuse_updates() -> None:
    """Where a release has the place for it: in 0.5.14 a server that is given new weights ends with our error."""
    try:
        from fouroversix_plugin.serving.sglang import updates
    except ImportError as error:
        logger.info("fouroversix: new weights would end a running server here: %s", error)
        return
    updates.register()


def runner_module() -> ModuleType:
    """What knows SGLang's MoE runners: those of its own registry, which 0.5.19 brought, or those before it."""
    from sglang.srt.layers.moe import moe_runner

    if hasattr(moe_runner, "register_moe_runner_core"):
        from fouroversix_plugin.serving.sglang import runner

        return runner
    from fouroversix_plugin.serving.sglang import older

    return older


def server_args() -> Any:
    """The server's arguments; before 0.5.16 they stood elsewhere."""
    try:
        from sglang.srt.runtime_context import get_server_args
    except ImportError:
        from sglang.srt.server_args import get_global_server_args as get_server_args
    return get_server_args()


def version_refusal(found: str) -> str | None:
    """Why nothing is registered with this release, or None."""
    version = _release(found)
    if version is None or version >= OLDEST:
        return None
    return (
        f"fouroversix: SGLang {found} is too old for --quantization nvfp4_4over6, needed {_text(OLDEST)} or later; "
        "upgrade SGLang"
    )


def version_warning(found: str) -> str | None:
    """What to say about a release after the checked ones, or None."""
    version = _release(found)
    if version is None or version <= NEWEST:
        return None
    return f"fouroversix: SGLang {found} is outside the checked range {_text(OLDEST)} to {_text(NEWEST)}; it may work"


def _release(version: str) -> tuple[int, ...] | None:
    """The numbers of a version; None for a source checkout without tags, which calls itself 0.0: nothing to compare."""
    numbers = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers) if any(numbers[:2]) else None


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _log_through_sglang() -> None:
    """SGLang configures the root logger after plugins are loaded; until then only warnings would be seen."""
    logging.getLogger("fouroversix_plugin").setLevel(logging.INFO)
