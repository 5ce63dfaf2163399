"""How bench_serve.py serves with SGLang.

Attention and sampling are those that need nothing beside SGLang; ``--llm`` names others. The MoE runners are named, so
that none is chosen by what else is installed.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from bench_serve_models import Source

NAME = "SGLang"
LOADED = re.compile(r"Load weight end\. elapsed=(?P<seconds>[\d.]+) s, .*mem usage=(?P<gib>-?[\d.]+) GB")

OURS = {"quantization": "nvfp4_4over6", "moe_runner_backend": "fouroversix"}
LAYERS = {
    "bf16": {"moe_runner_backend": "triton"},
    "stock": {"quantization": "modelopt_fp4", "fp4_gemm_runner_backend": "marlin", "moe_runner_backend": "marlin"},
    "w4a16": OURS,
    "w4a4": OURS,
}
"""Who computes linear layers and experts."""

STOCK = {
    "quantization_config": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ["lm_head", "*.mlp.gate"],
    }
}
"""In place of the stock model's own block, which says W4A16_NVFP4: SGLang 0.5.16 does not know that. Marlin leaves
activations as they are in either case."""


def arguments(options: argparse.Namespace, configuration: str, source: Source) -> dict[str, Any]:
    """Those of sglang.Engine, which are the server's flags."""
    given: dict[str, Any] = {
        "model_path": str(source.folder),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "random_seed": 0,
        "max_running_requests": options.most_requests,
        "chunked_prefill_size": 8192,
        "disable_radix_cache": True,
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "log_level": "info",
        **LAYERS[configuration],
    }
    if options.enforce_eager:
        given["disable_cuda_graph"] = True
    else:
        # Only the batches that are timed. SGLang would capture some fifty more, and as many of prefill, which long
        # prompts gain nothing from.
        given |= {"cuda_graph_bs_decode": options.streams, "disable_prefill_cuda_graph": True}
    if overrides := STOCK if configuration == "stock" else source.overrides:
        given["json_model_override_args"] = json.dumps(overrides)
    return given


def constructor() -> Callable[..., Any]:
    """sglang.Engine, which takes seconds to import."""
    from sglang.srt.entrypoints.engine import Engine

    engine: Callable[..., Any] = Engine
    return engine


def generate(engine: Any, prompts: Sequence[list[int]], new_tokens: int) -> int:
    """Answers all prompts at once, each with ``new_tokens``; returns how many came."""
    parameters = {"temperature": 0, "ignore_eos": True, "max_new_tokens": new_tokens}
    outputs = engine.generate(input_ids=list(prompts), sampling_params=parameters)
    return sum(output["meta_info"]["completion_tokens"] for output in outputs)
