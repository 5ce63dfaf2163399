"""What works on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import traceback
from typing import Any

from fouroversix_plugin import __version__


def examine() -> dict[str, Any]:
    """Versions, devices, backends and engines of this machine; ``ok`` is False where something installed is broken."""
    import torch

    from fouroversix_plugin.kernels import backends

    gpus = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    vllm = examine_vllm()
    return {
        "schema_version": 1,
        "ok": vllm["error"] is None,
        "fouroversix_plugin": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "backends": backends(),
        "engines": {"vllm": vllm, "sglang": examine_sglang()},
    }


def examine_sglang() -> dict[str, Any]:
    """Whether SGLang is installed; this release has no plugin for it."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        version = None
    warning = None if version is None else "planned, not in this release"
    return {"version": version, "warning": warning, "registers": False, "error": None}


def examine_vllm() -> dict[str, Any]:
    """Whether vLLM is installed, in the checked range, and takes the plugin; ``error`` is the whole traceback if not.

    vLLM itself only logs a plugin's failure and then calls the quantization method unknown.
    """
    found: dict[str, Any] = {"version": None, "warning": None, "registers": False, "error": None}
    if importlib.util.find_spec("vllm") is None:
        return found
    try:
        entry = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "fouroversix"]
        if not entry:
            raise RuntimeError(
                "no entry point `fouroversix` in the group vllm.general_plugins; install the package (pip install -e .)"
            )
        entry[0].load()()
        import vllm
        from vllm.model_executor.layers.quantization import get_quantization_config

        from fouroversix_plugin.recipe import QUANT_METHOD
        from fouroversix_plugin.serving.vllm import moe, version_warning  # noqa: F401 (the MoE half loads late)

        found["version"] = vllm.__version__
        found["warning"] = version_warning()
        found["registers"] = get_quantization_config(QUANT_METHOD).get_name() == QUANT_METHOD
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
    vllm = report["engines"]["vllm"]
    if vllm["error"] is not None:
        lines.append("  vllm        the plugin does not load:")
        lines += [f"    {line}" for line in vllm["error"].rstrip().splitlines()]
    elif vllm["version"] is None:
        lines.append("  vllm        not installed")
    else:
        lines.append(f"  vllm        {vllm['version']}: --quantization nvfp4_4over6 is registered")
    if vllm["warning"]:
        lines.append(f"              {vllm['warning']}")
    sglang = report["engines"]["sglang"]
    lines.append(
        f"  sglang      {sglang['version'] or 'not installed'}"
        + (f": {sglang['warning']}" if sglang["warning"] else "")
    )
    return "\n".join(lines)
