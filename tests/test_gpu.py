"""On a GPU: the reference's bytes from the operators' CUDA path, captured and compiled (run by hand, not in CI)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, assert_same_bytes, assert_same_tensor, golden_cases, mixed_magnitudes
from safetensors.torch import save_file
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin import reference
from fouroversix_plugin.checkpoint import quantize_checkpoint
from fouroversix_plugin.kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("case", golden_cases())
def test_golden_bytes_differ_on_the_gpu(case: dict[str, Any], golden: Mapping[str, Tensor]) -> None:
    recipe = fos.Recipe(case["metric"], case["scale_max"], case["adaptive"], case["error"])
    q = fos.quantize(golden[case["input"]].cuda(), recipe, case["scope"]).to("cpu")
    name = case["case"]
    assert_same_tensor("packed", q.packed, golden[f"{name}/packed"])
    assert_same_tensor("block_scale", q.block_scale.view(torch.uint8), golden[f"{name}/block_scale"].view(torch.uint8))
    assert_same_tensor("decode_scale", q.decode_scale, golden[f"{name}/decode_scale"].reshape(q.decode_scale.shape))


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("recipe", [fos.preset(n).weights for n in ("nvfp4_4over6", "nvfp4", "flashinfer")], ids=str)
def test_random_bytes_differ_between_gpu_and_cpu(recipe: fos.Recipe, granularity: Any) -> None:
    x = mixed_magnitudes(2048, 2048, seed=1)
    x[5, 7], x[9, 100] = torch.inf, torch.nan
    if granularity == "tensor":
        x = x.nan_to_num(0.0, 0.0, 0.0)
    assert_same_bytes(fos.quantize(x.cuda(), recipe, granularity).to("cpu"), fos.quantize(x, recipe, granularity))


@pytest.mark.parametrize("activations", [None, fos.Recipe()], ids=["W4A16", "W4A4"])
def test_graph_replay_or_compilation_changes_a_result(activations: fos.Recipe | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(33, 256, device="cuda", dtype=torch.bfloat16)
    w = ops.prepare_weight(fos.quantize(torch.randn(96, 256, device="cuda")), torch.bfloat16)
    eager = ops.linear(x, w, activations, None)
    compiled = torch.compile(lambda x: ops.linear(x, w, activations, None), fullgraph=True)
    assert torch.equal(compiled(x), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.linear(x, w, activations, None)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.parametrize("activations", [None, fos.Recipe()], ids=["W4A16", "W4A4"])
def test_gpu_experts_differ_from_the_cpu_reference(activations: fos.Recipe | None) -> None:
    torch.manual_seed(0)
    x, routes = torch.randn(17, 64), torch.randn(17, 6).topk(3)
    w13, w2 = (torch.stack([torch.randn(rows, columns) for _ in range(6)]) for rows, columns in ((64, 64), (64, 32)))
    q13, q2 = (fos.NVFP4Tensor.stack([fos.quantize(part) for part in w]) for w in (w13, w2))
    ids = routes.indices.clone()
    ids[3, 1] = -1
    weights = routes.values.softmax(-1)
    y = fos.moe(x.cuda(), q13.to("cuda"), q2.to("cuda"), weights.cuda(), ids.cuda(), activations)
    expected = reference.moe(x, q13, q2, weights, ids, activations)
    assert_close(y.cpu(), expected, diff=1e-5 if activations is None else 1e-3, ratio=1e-2)


def test_a_conversion_on_the_gpu_writes_other_bytes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    source = tmp_path / "source"
    source.mkdir()
    shapes = {"q_proj": (512, 256), "k_proj": (128, 256), "v_proj": (128, 256), "down_proj": (256, 1040)}
    tensors = {
        f"model.layers.0.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    for device in ("cpu", "cuda"):
        quantize_checkpoint(source, tmp_path / device, fos.preset("nvfp4_4over6"), device=device)
    for path in (tmp_path / "cpu").iterdir():
        assert (tmp_path / "cuda" / path.name).read_bytes() == path.read_bytes()
