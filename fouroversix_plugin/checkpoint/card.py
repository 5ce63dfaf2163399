"""The model card of a quantized checkpoint: what was done to which model, and how to serve it."""

from __future__ import annotations

from typing import Final

from fouroversix_plugin import __version__
from fouroversix_plugin.checkpoint.files import CheckpointError, checked_path
from fouroversix_plugin.checkpoint.plan import Plan
from fouroversix_plugin.formats import OURS

CARD: Final = "README.md"
_LARGEST_CARD: Final = 1 << 20

_SERVE_OURS: Final = """\
```bash
pip install fouroversix-plugin
vllm serve THIS_FOLDER
```

The tensors carry ModelOpt's names and meaning (`weight`, `weight_scale`, `weight_scale_2`)."""
_SERVE_OTHERS: Final = """\
Any engine that reads NVFP4 of this kind serves it: `vllm serve THIS_FOLDER`."""


def model_card(plan: Plan) -> str:
    """The card's text: the source's own card with its front matter (the license!), and ours in front of its body."""
    front, body = _source_card(plan)
    scheme, checkpoint = plan.scheme, plan.source.checkpoint
    matrices = [matrix for group in plan.groups.values() for matrix in group]
    values = sum(matrix.rows * matrix.columns for matrix in matrices)
    copied = sum(alone.nbytes for alone in plan.left_alone)
    architectures = checkpoint.config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else "unknown"
    rows = [
        ("architecture", f"`{architecture}`"),
        ("scheme", scheme.name),
        ("weights", f"NVFP4, {scheme.weights}"),
        ("activations", "not quantized" if scheme.activations is None else f"NVFP4, {scheme.activations}, per token"),
        ("quantized", f"{len(matrices)} linear weights, {values} values"),
        ("left as they are", f"{len(plan.left_alone)} tensors, {copied} bytes"),
        ("written as", f"`{plan.format.name}` by fouroversix-plugin {__version__}"),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])
    serve = _SERVE_OURS if plan.format is OURS else _SERVE_OTHERS
    text = (
        "# NVFP4 with Four over Six\n\nThis model was quantized to NVFP4 (4-bit e2m1 codes, an e4m3 scale per 16 "
        "values, an fp32 scale per tensor). Four over Six ([arXiv 2512.02010](https://arxiv.org/abs/2512.02010)) "
        f"chooses for every block whether its largest value maps to 4 or to 6.\n\n{table}\n\n{serve}\n"
    )
    return front + text + (f"\n---\n\n{body}" if body.strip() else "")


def _source_card(plan: Plan) -> tuple[str, str]:
    """(front matter with its fences, rest) of the source's card; empty where it has none that can be read."""
    folder = plan.source.checkpoint.folder
    path = folder / CARD
    if not path.exists() or path.stat().st_size > _LARGEST_CARD:
        return "", ""
    try:
        text = checked_path(folder, CARD).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    fence = "---\n"
    end = text.find("\n" + fence, len(fence)) if text.startswith(fence) else -1
    if end < 0:
        return "", text
    end += 1 + len(fence)
    return text[:end] + "\n", text[end:]
