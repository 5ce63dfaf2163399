"""Our files in loaders that have never heard of us: stock vLLM on a GPU, without the plugin's methods."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import dequantized, distance, flat, random_model, run_engine

import fouroversix_plugin as fos
from fouroversix_plugin.checkpoint import quantize_checkpoint

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="stock vLLM has NVFP4 on GPUs only"),
]

# Marlin, which vLLM runs NVFP4 with on Hopper, needs multiples of 64 and 128.
CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PROMPTS = [[1, 504, 575, 282, 649, 314, 742, 5, 9, 100], [3, 900, 2, 17, 44, 1001, 512, 77]]
STOCK = {"modelopt": {}, "compressed-tensors": {}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("interop")
    jobs: dict[str, dict[str, Any]] = {}
    for kind in ("dense", "moe"):
        config = CONFIG if kind == "dense" else CONFIG | EXPERTS
        source = random_model(config, folder / f"{kind}-bf16")
        for name in ("nvfp4_4over6", *STOCK):
            target = folder / f"{kind}-{name}"
            quantize_checkpoint(source, target, fos.preset("w4a16"), format=name, device="cuda")
            jobs[f"{kind} {name}"] = job(target)
        jobs[f"{kind} dequantized"] = job(dequantized(folder / f"{kind}-nvfp4_4over6", folder / f"{kind}-dequantized"))
        jobs[f"{kind} full precision"] = job(source)
    return run_engine(folder, jobs, PROMPTS)


def job(model: Path) -> dict[str, Any]:
    return {"model": str(model), "options": {"gpu_memory_utilization": 0.2, "dtype": "bfloat16"}}


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("form", ["nvfp4_4over6", *STOCK])
def test_a_stock_loader_reads_other_weights_than_we_wrote(served: dict[str, Any], kind: str, form: str) -> None:
    exact = flat(served[f"{kind} dequantized"])
    off = distance(flat(served[f"{kind} {form}"]), exact)
    quantization = distance(flat(served[f"{kind} full precision"]), exact)
    print(f"{kind} {form}: {off:.4f} from the dequantized weights, which are {quantization:.4f} from BF16")
    # Experts: BF16 rounding of the router flips a token's expert now and then, in our kernels and stock ones alike.
    assert off < 0.3 * quantization
