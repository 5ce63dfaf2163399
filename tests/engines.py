"""What the tests of engines share: runs in a process of its own, and the parts of stored checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT
from divergence_scores import Document
from safetensors.torch import load_file, save_file

import fouroversix_plugin as fos

# A random Mixtral whose four heads split over two ranks.
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


def options(recipe: str, **more: Any) -> dict[str, Any]:
    """LLM arguments that ask for a preset the way --hf-overrides does."""
    return {"hf_overrides": {"quantization_config": {"quant_method": "nvfp4_4over6", "recipe": recipe, **more}}}


def run_engine(
    folder: Path,
    jobs: dict[str, dict[str, Any]],
    prompts: list[list[int]],
    documents: Sequence[Document] = (),
    **environment: str,
) -> dict[str, Any]:
    request, out = folder / "request.json", folder / "results.json"
    request.write_text(json.dumps({"prompts": prompts, "documents": documents, "jobs": jobs}))
    command = [sys.executable, str(ROOT / "tests" / "vllm_worker.py"), str(request), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def dequantized(stored: Path, target: Path) -> Path:
    """The checkpoint ``stored`` with its weights dequantized to BF16: what any engine serves without this plugin."""
    shutil.copytree(stored, target)
    tensors = load_file(stored / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_scale_2")]:
        module = name.removesuffix(".weight_scale_2")
        q = fos.NVFP4Tensor(
            tensors[f"{module}.weight"], tensors.pop(f"{module}.weight_scale"), tensors.pop(f"{module}.weight_scale_2")
        )
        tensors[f"{module}.weight"] = fos.dequantize(q, torch.bfloat16)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".input_scale")}
    save_file(tensors, target / "model.safetensors")
    (target / "hf_quant_config.json").unlink(missing_ok=True)
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config))
    return target


def flat(result: dict[str, Any]) -> torch.Tensor:
    assert "error" not in result, result["error"]
    return torch.tensor([logprob for prompt in result["logprobs"] for logprob in prompt])


def stored(tensors: dict[str, torch.Tensor], module: str) -> fos.NVFP4Tensor:
    return fos.NVFP4Tensor(*(tensors[f"{module}.{name}"] for name in ("weight", "weight_scale", "weight_scale_2")))


def concatenated(a: fos.NVFP4Tensor, b: fos.NVFP4Tensor) -> fos.NVFP4Tensor:
    scales = torch.cat([a.block_scale.view(torch.uint8), b.block_scale.view(torch.uint8)]).view(torch.float8_e4m3fn)
    return fos.NVFP4Tensor(torch.cat([a.packed, b.packed]), scales, torch.cat([a.row_decode_scale, b.row_decode_scale]))
