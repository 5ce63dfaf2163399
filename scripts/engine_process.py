"""An engine in a process of its own: the plugin made known to it, its end, and what its log says of a failure."""

import os
import re
import signal
import subprocess
import time
import tomllib
from contextlib import suppress
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ("vllm.general_plugins", "sglang.srt.plugins")
ERROR = re.compile(r"\b\w*(?:Error|Exception): .*")
ELSEWHERE = "root cause"
"""What vLLM says in the error that ends a parent, where the child's own error stands above."""


def plugin_environment(folder: Path) -> dict[str, str]:
    """Makes a checkout's plugin known to engines, which look for it among what is installed; empty if it is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if all(any(point.name == "fouroversix" for point in metadata.entry_points(group=group)) for group in GROUPS):
        return {}
    described = folder / "installed" / f"fouroversix_plugin-{project['version']}.dist-info"
    described.mkdir(parents=True, exist_ok=True)
    (described / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines: list[str] = []
    for group in GROUPS:
        points = project["entry-points"][group].items()
        lines += [f"[{group}]", *(f"{name} = {place}" for name, place in points)]
    (described / "entry_points.txt").write_text("\n".join(lines) + "\n")
    paths = [str(described.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def end_group(process: subprocess.Popen[bytes], grace: float = 0) -> None:
    """The leader of a process group and all its children: an engine's are processes of their own.

    ``grace``: seconds the leader has, told by SIGTERM, to end what it started in groups of their own.
    """
    if grace:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    patience = time.monotonic() + 10
    with suppress(ProcessLookupError):
        while time.monotonic() < patience:
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()  # reaps the leader, which would otherwise count
            time.sleep(0.1)


def errors(said: str) -> list[str]:
    """The last lines of a log that name errors."""
    return list(dict.fromkeys(line for line in said.splitlines() if ERROR.search(line)))[-10:]


def why_failed(said: str) -> str | None:
    """The last error of the log that names a cause."""
    found = [match.group() for match in ERROR.finditer(said) if ELSEWHERE not in match.group()]
    return found[-1][:300] if found else None
