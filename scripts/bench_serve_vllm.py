"""How bench_serve.py serves with vLLM. Stock is vLLM's own loader of ModelOpt's NVFP4, which runs Marlin on Hopper."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from bench_serve_models import Source

NAME = "vLLM"
LOADED = re.compile(r"Model loading took (?P<gib>[\d.]+) GiB(?: memory)? and (?P<seconds>[\d.]+) seconds")


def arguments(options: argparse.Namespace, _: str, source: Source) -> dict[str, Any]:
    """Those of vllm.LLM."""
    given: dict[str, Any] = {
        "model": str(source.folder),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "seed": 0,
        "max_model_len": options.longest,
        "max_num_seqs": options.most_requests,
        "max_num_batched_tokens": max(8192, options.most_requests),
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.85,
        "enforce_eager": options.enforce_eager,
    }
    if not options.enforce_eager:
        # Only the batches that are timed: capturing vLLM's some fifty sizes would take longer than decoding does.
        given["compilation_config"] = {"cudagraph_capture_sizes": sorted({1, 2, 4, 8, *options.streams})}
    if source.overrides:
        given["hf_overrides"] = source.overrides
    return given


def constructor() -> Callable[..., Any]:
    """vllm.LLM, which takes seconds to import."""
    from vllm import LLM

    llm: Callable[..., Any] = LLM
    return llm


def generate(llm: Any, prompts: Sequence[list[int]], new_tokens: int) -> int:
    """Answers all prompts at once, each with ``new_tokens``; returns how many came."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    parameters = SamplingParams(temperature=0, ignore_eos=True, max_tokens=new_tokens, detokenize=False)
    given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = llm.generate(given, parameters, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)
