"""The versions that a measured figure may depend on."""

import platform
from importlib import metadata

NAMES = ("fouroversix-plugin", "vllm", "sglang", "torch", "transformers", "httpx")


def installed() -> dict[str, str]:
    """Of Python and of what is installed beside it here; a server may run elsewhere and tells its own."""
    found = {"python": platform.python_version()}
    for name in NAMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
