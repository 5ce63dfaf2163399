"""``fouroversix``: the command line.

Results go to stdout, progress and logs to stderr. Exit status: 0 fine, 1 a check failed or something cannot be read or
written, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fouroversix_plugin import __version__
from fouroversix_plugin.recipe import Scheme, load_scheme, preset, preset_names

if TYPE_CHECKING:
    from fouroversix_plugin.checkpoint.write import Progress

_UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != ord("\n")}
_HUB_FILES: Final = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.md", "*.py", "LICENSE*")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    _usable_streams()
    options = _parser().parse_args(arguments)
    _log_to_stderr()
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of stdout left: nothing more to say to anyone
        return 1
    except (ValueError, OSError, MemoryError) as error:
        print(f"fouroversix: error: {_printable(str(error)) or 'out of memory'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fouroversix: interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fouroversix", description="NVFP4 with Four over Six block scaling.")
    parser.add_argument("--version", action="version", version=f"fouroversix {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    quantize = _command(commands, "quantize", _quantize, "write a checkpoint with its linear weights quantized")
    quantize.add_argument("source", metavar="SRC", help="folder of BF16, FP16, FP32 or FP8 safetensors, or ORG/NAME")
    quantize.add_argument("target", metavar="DST", type=Path, help="folder to make")
    quantize.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        type=_scheme,
        default="nvfp4_4over6",
        help=f"a preset ({', '.join(preset_names())}) or a JSON file with a quantization_config block "
        "(default: nvfp4_4over6)",
    )
    quantize.add_argument(
        "--ignore",
        metavar="GLOB",
        type=_glob,
        nargs="+",
        action="extend",
        default=[],
        help="modules to leave alone besides the recipe's own list (lm_head, embeddings, routers, gates, vision, mtp)",
    )
    quantize.add_argument(
        "--format",
        default="nvfp4_4over6",
        choices=("nvfp4_4over6", "modelopt", "compressed-tensors"),
        help="whose config and tensor names to write; those of others need a W4A16 recipe (default: nvfp4_4over6)",
    )
    quantize.add_argument("--device", help="where to quantize, such as cpu or cuda:0 (default: a GPU if there is one)")
    quantize.add_argument(
        "--max-shard-size", metavar="SIZE", type=_size, default="5GB", help="of a file of tensors (default: 5GB)"
    )
    ways = quantize.add_mutually_exclusive_group()
    ways.add_argument("--resume", action="store_true", help="go on with an interrupted conversion")
    ways.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    quantize.add_argument("--overwrite", action="store_true", help="replace DST if it is a checkpoint")

    inspect = _command(
        commands, "inspect", _inspect, "what a checkpoint holds, layer by layer, and whether it is sound"
    )
    inspect.add_argument("checkpoint", metavar="CKPT", help="folder of safetensors, or ORG/NAME")

    compare = _command(commands, "compare", _compare, "errors of quantized weights against the source's, worst first")
    compare.add_argument("checkpoint", metavar="CKPT", help="quantized folder, or ORG/NAME")
    compare.add_argument("--to", metavar="SRC", required=True, help="what it was quantized from")
    compare.add_argument("--plot", metavar="DIR", type=Path, help="write plots (PNG) into this folder")
    compare.add_argument(
        "--limit", metavar="N", type=int, default=20, help="layers to list; JSON has all (default: 20)"
    )

    doctor = _command(commands, "doctor", _doctor, "what works on this machine, and why the rest does not")
    doctor.add_argument("--build", action="store_true", help="compile the kernels now, not when they are first needed")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    command.set_defaults(run=run)
    return command


# --- commands ---


def _quantize(options: argparse.Namespace) -> int:
    from fouroversix_plugin.checkpoint import partial_folder, plan_conversion, quantize_checkpoint
    from fouroversix_plugin.checkpoint.summary import summary_dict, summary_text

    scheme: Scheme = replace(options.recipe, ignore=(*options.recipe.ignore, *options.ignore))
    source, target = _folder(options.source), options.target
    device = _device(options.device)
    plan = plan_conversion(source, scheme, options.format, options.max_shard_size)
    seconds = None
    if not options.dry_run:
        started = time.monotonic()
        try:
            with _progress("quantizing", plan.source_nbytes) as progress:
                quantize_checkpoint(
                    source,
                    target,
                    scheme,
                    format=options.format,
                    device=device,
                    max_shard_size=options.max_shard_size,
                    resume=options.resume,
                    overwrite=options.overwrite,
                    progress=progress,
                )
        except KeyboardInterrupt:
            print(f"fouroversix: {partial_folder(target)} is kept: --resume goes on with it", file=sys.stderr)
            raise
        seconds = time.monotonic() - started
    if options.json:
        run = {"source": str(source), "target": str(target), "device": device, "seconds": seconds}
        _print_json({**summary_dict(plan), **run})
    else:
        print(_printable(summary_text(plan, target, seconds)))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from fouroversix_plugin.checkpoint import Checkpoint
    from fouroversix_plugin.inspection import inspect_checkpoint

    folder = _folder(options.checkpoint)
    with _progress("reading", _nbytes(Checkpoint.open(folder))) as progress:
        report = inspect_checkpoint(folder, progress)
    _print_json(report.to_dict()) if options.json else print(_printable(report.text()))
    return int(report.failed)


def _compare(options: argparse.Namespace) -> int:
    from fouroversix_plugin.checkpoint import Checkpoint
    from fouroversix_plugin.comparison import compare_checkpoints

    if options.plot is not None:
        import fouroversix_plugin.plots as plotting

        plotting.require_matplotlib()  # before the work, not after it
        options.plot.mkdir(parents=True, exist_ok=True)
    folder, source = _folder(options.checkpoint), _folder(options.to)
    with _progress("comparing", _nbytes(Checkpoint.open(source))) as progress:
        report = compare_checkpoints(folder, source, progress)
    plots: list[Path] = []
    if options.plot is not None:
        plots = plotting.plot_comparison(report, folder, options.plot)
    if options.json:
        _print_json({**report.to_dict(), "plots": [str(path) for path in plots]})
    else:
        print(_printable("\n".join([report.text(options.limit), *(f"plot: {path}" for path in plots)])))
    return int(report.failed)


def _doctor(options: argparse.Namespace) -> int:
    from fouroversix_plugin.doctor import describe, examine

    if options.build:
        from fouroversix_plugin.kernels import build

        build.build_all(lambda line: print(f"fouroversix: {line}", file=sys.stderr))
    report = examine()
    _print_json(report) if options.json else print(describe(report))
    return 0 if report["ok"] else 1


# --- arguments ---


def _scheme(text: str) -> Scheme:
    try:
        return load_scheme(Path(text)) if text.endswith(".json") or "/" in text else preset(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _glob(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("got '', needed the name of a module, or a pattern")
    return text


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([kmgt]?i?b?)", text.strip(), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    unit = unit if unit in _UNITS else f"{unit}B"
    nbytes = int(float(match[1]) * _UNITS[unit]) if match and unit in _UNITS else 0
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, needed a size such as 5GB, 500MB or 2GiB")
    return nbytes


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.empty(0, device=name).device.type
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: got {name!r}, which is not there: {str(error).splitlines()[0]}") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, needed cpu or cuda")
    return name


def _folder(name: str) -> Path:
    """A folder on the disk, or the snapshot of a model on the hub."""
    path = Path(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{name}: no such folder; to download it from the hub: pip install 'fouroversix-plugin[cli]'"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no such folder, and the hub says: {str(error).splitlines()[0]}") from error


# --- output ---


def _usable_streams() -> None:
    """A stream that was closed (`2>&-`) swallows what it is told; one that is not UTF-8 gets escapes, not an error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _printable(text: str) -> str:
    """Without the control characters that names in a checkpoint may have: a terminal would obey them."""
    return text.translate(_CONTROL)


def _log_to_stderr() -> None:
    """Our own lines only: what other libraries have to say is not about the command."""
    logger = logging.getLogger("fouroversix_plugin")
    if not logger.handlers:
        handler = logging.StreamHandler()
        logger.addHandler(handler)


@contextmanager
def _progress(what: str, nbytes: int) -> Iterator[Progress]:
    """A bar with rate and time left on a terminal's stderr; nothing elsewhere."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda name, done: None
        return
    with tqdm(total=nbytes, desc=what, unit="B", unit_scale=True, disable=None, file=sys.stderr, leave=False) as bar:

        def progress(name: str, done: int) -> None:
            bar.update(done)

        yield progress


def _nbytes(checkpoint: Any) -> int:
    return sum(stored.nbytes for stored in checkpoint.tensors.values())


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(main())
