"""vLLM: ``--quantization nvfp4_4over6``. Only this package imports vLLM, and only once vLLM asks for the plugin."""

from __future__ import annotations

import logging

OLDEST, NEWEST = (0, 26), (0, 33)
"""Minor versions whose interfaces were checked."""


def register() -> None:
    """Entry point of ``vllm.general_plugins``: make the method known. Idempotent; runs in every process of a server."""
    from vllm.model_executor.layers.quantization import (
        _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
        register_quantization_config,
    )

    from fouroversix_plugin.recipe import QUANT_METHOD
    from fouroversix_plugin.serving.vllm.config import FourOverSixConfig

    if _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(QUANT_METHOD) is FourOverSixConfig:
        return
    register_quantization_config(QUANT_METHOD)(FourOverSixConfig)
    _log_through_vllm()
    warning = version_warning()
    if warning is not None:
        logging.getLogger("fouroversix_plugin").warning(warning)


def version_warning() -> str | None:
    """What to say about an engine outside the checked range, or None."""
    from vllm.version import __version_tuple__ as version

    # A source checkout without tags calls itself 0.0: there is nothing to compare.
    if version[:2] == (0, 0) or OLDEST <= tuple(version[:2]) <= NEWEST:
        return None
    found = ".".join(str(part) for part in version[:3])
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    return f"fouroversix: vLLM {found} is outside the checked range {oldest} to {newest}; it may work"


def _log_through_vllm() -> None:
    """vLLM configures its own logger only, and later than this: our lines go where its lines go."""
    logging.getLogger("fouroversix_plugin").parent = logging.getLogger("vllm")
