"""``fouroversix``: the command line. Results on stdout; exit 0 fine, 1 a check failed, 2 usage."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
import traceback
from typing import Any

from fouroversix_plugin import __version__


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fouroversix", description="NVFP4 with Four over Six block scaling.")
    parser.add_argument("--version", action="version", version=f"fouroversix {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what works on this machine, and why the rest does not")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    report = examine()
    print(json.dumps(report, indent=2) if options.json else describe(report))
    return 0 if report["ok"] else 1


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
        "engines": {"vllm": vllm},
    }


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
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
