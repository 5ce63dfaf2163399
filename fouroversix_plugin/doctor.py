"""What works on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import traceback
from collections.abc import Callable
from typing import Any

from fouroversix_plugin import __version__
from fouroversix_plugin.recipe import QUANT_METHOD


def examine() -> dict[str, Any]:
    """Versions, devices, backends and engines of this machine; ``ok`` is False where something installed is broken."""
    import torch

    from fouroversix_plugin.kernels import backends

    gpus = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    engines = {"vllm": examine_vllm(), "sglang": examine_sglang()}
    return {
        "schema_version": 1,
        "ok": all(found["error"] is None for found in engines.values()),
        "fouroversix_plugin": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "backends": backends(),
        "engines": engines,
    }


def examine_vllm() -> dict[str, Any]:
    """Whether vLLM is installed, in the checked range, and takes the plugin; see :func:`_examine`."""

    def look(found: dict[str, Any]) -> None:
        import vllm
        from vllm.model_executor.layers.quantization import get_quantization_config

        from fouroversix_plugin.serving.vllm import moe, version_warning  # noqa: F401 (the MoE half loads late)

        found["version"] = vllm.__version__
        found["warning"] = version_warning()
        found["registers"] = get_quantization_config(QUANT_METHOD).get_name() == QUANT_METHOD

    return _examine("vllm", "vllm.general_plugins", look)


def examine_sglang() -> dict[str, Any]:
    """Whether SGLang is installed, in the checked range, and takes the plugin; see :func:`_examine`."""

    def look(found: dict[str, Any]) -> None:
        from sglang.srt.layers.quantization import QUANTIZATION_METHODS
        from sglang.version import __version__ as version

        from fouroversix_plugin.serving.sglang import version_refusal, version_warning

        found["version"] = version
        found["warning"] = version_refusal(version) or version_warning(version)
        found["registers"] = QUANT_METHOD in QUANTIZATION_METHODS

    return _examine("sglang", "sglang.srt.plugins", look)


def _examine(engine: str, group: str, look: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What ``look`` finds of an engine once the plugin was asked to register; ``error`` is the whole traceback if not.

    Engines themselves only log a plugin's failure and then call the quantization method unknown.
    """
    found: dict[str, Any] = {"version": None, "warning": None, "registers": False, "error": None}
    if importlib.util.find_spec(engine) is None:
        return found
    try:
        entry = [e for e in importlib.metadata.entry_points(group=group) if e.name == "fouroversix"]
        if not entry:
            raise RuntimeError(
                f"no entry point `fouroversix` in the group {group}; install the package (pip install -e .)"
            )
        entry[0].load()()
        look(found)
    except Exception:
        found["error"] = traceback.format_exc()
    return found


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"fouroversix-plugin {report['fouroversix_plugin']}, Python {report['python']}, torch {report['torch']}, "
        f"CUDA {report['cuda'] or 'none'}",
        f"GPUs: {', '.join(report['gpus']) or 'none'}",
        "backends:",
        *(f"  {name:12}{reason or 'ready'}" for name, reason in report["backends"].items()),
        "engines:",
    ]
    for name, found in report["engines"].items():
        if found["error"] is not None:
            lines.append(f"  {name:12}the plugin does not load:")
            lines += [f"    {line}" for line in found["error"].rstrip().splitlines()]
        elif found["version"] is None:
            lines.append(f"  {name:12}not installed")
        else:
            registered = "is" if found["registers"] else "is not"
            lines.append(f"  {name:12}{found['version']}: --quantization {QUANT_METHOD} {registered} registered")
        if found["warning"]:
            lines.append(f"              {found['warning']}")
    return "\n".join(lines)
