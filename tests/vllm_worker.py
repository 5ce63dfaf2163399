"""Runs vLLM for the tests in a process of its own: ``vllm_worker.py REQUEST OUT``.

REQUEST is JSON: {"prompts": token ids, "documents": token ids and the first of them that is scored, "jobs": {name:
{"model": folder, "options": arguments of LLM, "capture": layer names, "weigh": whether to measure memory where there is
no GPU, too (it takes seconds), "tokens": how many to generate, "top": how many log-probabilities of the documents to
keep, "fp4_units": whether linear weights are prepared as for Blackwell, "reload": whether all weights are forgotten and
loaded again in the end, "sleep": whether the engine then sleeps at both levels, "adapter": folder of a LoRA adapter,
"alone": whether each prompt is asked by itself, too}}}.
OUT gets {name: {"logprobs", "tokens" and "generated" (their logprobs): one list a prompt, "alone": these three once
more, "adapted", "forgotten", "reloaded", "woken" and "refilled": logprobs, "log": our log lines, "most_held":
full-precision layers held at once, "arrived": when each was whole (seconds of the thread that loads), "memory": bytes
of the "weights", those "taken" once they are loaded and, on a GPU, at the "peak" before} or {"error": text}} after
every job; captured layers' first inputs and outputs go to NAME.safetensors beside it, the documents' scores to
NAME.scores.safetensors.
"""

import gc
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: 20 s less for each engine
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

import torch
from divergence_scores import Document
from divergence_sources import Request, score_with_engine
from log_lines import Lines
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensor
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform

from fouroversix_plugin.kernels import blackwell, ops
from fouroversix_plugin.nvfp4 import NVFP4Tensor
from fouroversix_plugin.serving.vllm import linear, moe

DEFAULTS = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "gpu_memory_utilization": 0.3,
    "skip_tokenizer_init": True,
    "seed": 0,
}


class Watch:
    """Sees the plugin's layers at work: what they compute, how many hold full-precision weights at once, and how much
    memory loading takes.
    """

    def __init__(self) -> None:
        self.capture: list[str] = []
        self.captured: dict[str, torch.Tensor] = {}
        self.layers: list[Any] = []
        self.most_held = 0
        self.arrived: list[float] = []
        self.memory: dict[str, int] = {}
        self.weigh = False
        self.originals = [(method, method.apply) for method in (linear._LinearMethod, moe._MoEMethod)]
        linear.OnlineLinearMethod._create = self.collecting(linear.OnlineLinearMethod._create)
        linear.OnlineLinearMethod._quantized = self.counting(linear.OnlineLinearMethod._quantized)
        BaseModelLoader.load_model = self.weighing(BaseModelLoader.load_model)

    def start(self, capture: list[str], weigh: bool) -> None:
        self.capture, self.captured, self.layers, self.most_held = capture, {}, [], 0
        self.weigh = weigh or torch.cuda.is_available()
        self.arrived, self.memory = [], {}
        for method, original in self.originals:
            # Only where it is wanted: compilers trace what stands here.
            method.apply = self.capturing(original) if capture else original

    def capturing(self, original: Any) -> Any:
        def apply(method: Any, layer: Any, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
            y = original(method, layer, x, *rest, **named)
            if method.prefix in self.capture:
                values = {"x": x, "y": y, **{str(n): v for n, v in enumerate(rest) if isinstance(v, torch.Tensor)}}
                values |= {n: v for n, v in named.items() if isinstance(v, torch.Tensor)}
                for name, value in values.items():
                    self.captured.setdefault(f"{method.prefix}/{name}", value.clone())
            return y

        return apply

    def collecting(self, original: Any) -> Any:
        def create(method: Any, layer: Any, *rest: Any) -> None:
            original(method, layer, *rest)
            self.layers.append(layer)

        return create

    def counting(self, original: Any) -> Any:
        def quantized(method: Any, layer: Any) -> Any:
            held = sum(not l.weight.is_meta and not getattr(l, linear.DONE, False) for l in self.layers)  # noqa: E741
            self.most_held = max(self.most_held, held)
            self.arrived.append(time.thread_time())
            return original(method, layer)

        return quantized

    def weighing(self, original: Any) -> Any:
        def load_model(*arguments: Any, **named: Any) -> torch.nn.Module:
            if not self.weigh:
                return original(*arguments, **named)
            rotary_embedding._ROPE_DICT.clear()  # else a model has those of one before, whose memory is taken already
            on_gpu, before = torch.cuda.is_initialized(), taken()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            model: torch.nn.Module = original(*arguments, **named)
            weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
            self.memory = {"weights": weights, "taken": taken() - before}
            if on_gpu:
                self.memory["peak"] = torch.cuda.max_memory_allocated() - before
            return model

        return load_model


def taken() -> int:
    """Bytes of the GPU's memory that tensors have or, without one, of all tensors that Python knows."""
    gc.collect()
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextmanager
def fp4_units(there: bool) -> Iterator[None]:
    """Within it, W4A4 linear weights are prepared as for Blackwell; their products are the specification's here."""
    original = ops.prepare_weight

    def prepare(q: NVFP4Tensor, dtype: torch.dtype, gated: bool = False, scheme: str = "") -> ops.PreparedWeight:
        if q.packed.ndim > 2 or scheme != "W4A4":
            return original(q, dtype, gated, scheme)
        weight, block_scale = blackwell.prepare(q.packed, q.block_scale.view(torch.uint8))
        return ops.PreparedWeight(weight, block_scale, q.row_decode_scale.contiguous(), q.shape[-1])

    ops.prepare_weight = prepare if there else original
    try:
        yield
    finally:
        ops.prepare_weight = original


def logprobs_of(outputs: list[RequestOutput]) -> list[list[float]]:
    return [
        [at[token].logprob for at, token in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)]
        for o in outputs
    ]


def generated_of(outputs: list[RequestOutput]) -> list[list[float]]:
    return [
        [at[token].logprob for at, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)]
        for o in outputs
    ]


def said_in(outputs: list[RequestOutput]) -> dict[str, Any]:
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    return {"logprobs": logprobs_of(outputs), "generated": generated_of(outputs), "tokens": tokens}


def forget(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()


def ask(llm: LLM, job: dict[str, Any], prompt_ids: list[list[int]], found: dict[str, Any]) -> None:
    parameters = SamplingParams(
        temperature=0, max_tokens=job.get("tokens", 1), ignore_eos=True, prompt_logprobs=0, logprobs=0, detokenize=False
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in prompt_ids]

    def answer(**more: Any) -> list[RequestOutput]:
        return llm.generate(prompts, parameters, use_tqdm=False, **more)

    found |= said_in(answer())
    if job.get("alone", False):
        found["alone"] = said_in([llm.generate(prompt, parameters, use_tqdm=False)[0] for prompt in prompts])
    if "adapter" in job:
        found["adapted"] = logprobs_of(answer(lora_request=LoRARequest("adapter", 1, job["adapter"])))
    if job.get("reload", False):
        llm.apply_model(forget)
        found["forgotten"] = logprobs_of(answer())
        llm.collective_rpc("reload_weights")
        found["reloaded"] = logprobs_of(answer())
    if job.get("sleep", False):
        llm.sleep(level=1)
        llm.wake_up()
        found["woken"] = logprobs_of(answer())
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.apply_model(forget)  # where they were there may be some of them yet
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        found["refilled"] = logprobs_of(answer())


def run(job: dict[str, Any], request: dict[str, Any], watch: Watch, scores: Path) -> dict[str, Any]:
    lines, llm = Lines(), None
    logger = logging.getLogger("fouroversix_plugin")
    logger.addHandler(lines)
    watch.start(job.get("capture", []), job.get("weigh", False))
    found: dict[str, Any] = {}
    try:
        llm = LLM(job["model"], **DEFAULTS | job.get("options", {}))
        watch.captured.clear()  # of the profiling run
        ask(llm, job, request["prompts"], found)
        if "top" in job:
            documents = tuple(Document(tuple(ids), start) for ids, start in request["documents"])
            score_with_engine(llm, Request((), documents, job["top"], 0, None, 0), scores, {"source": job["model"]})
        seen = {"most_held": watch.most_held, "arrived": watch.arrived, "memory": watch.memory}
        return {**found, **seen, "log": lines.lines}
    except Exception as error:
        traceback.print_exc()
        after = f" (after {', '.join(found)})" if found else ""
        return {"error": f"{type(error).__name__}: {error}{after}"}
    finally:
        logger.removeHandler(lines)
        del llm
        cleanup_dist_env_and_memory()
        # Gone with the graphs that were in it: those of the next engine need another.
        type(current_platform)._global_graph_pool = None


def main(request_file: Path, out: Path) -> None:
    request = json.loads(request_file.read_text())
    watch = Watch()
    results = {}
    partial = out.with_name(f"{out.name}.partial")
    for name, job in request["jobs"].items():
        started = time.monotonic()
        with fp4_units(job.get("fp4_units", False)):
            results[name] = run(job, request, watch, out.with_name(f"{name}.scores.safetensors"))
        if watch.captured:
            save_file(watch.captured, out.with_name(f"{name}.safetensors"))
        partial.write_text(json.dumps(results))
        partial.replace(out)
        print(f"job {name!r}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # vLLM's orderly end takes seconds
