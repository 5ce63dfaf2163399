"""Small checkpoints that several test files make: a model in full precision, one set of weights in every family of
NVFP4 files, and headers by hand.

Nothing here uses the package's own spelling of a family: the names, directions and index formulas are those published.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fouroversix_plugin.checkpoint.files import INDEX
from fouroversix_plugin.nvfp4 import NVFP4Tensor

CONFIG: Final[Mapping[str, Any]] = {
    "model_type": "tiny",
    "architectures": ["TinyForCausalLM"],
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "auto_map": {"AutoModel": "modeling.Model"},
}
ATTENTION, MLP, EXPERT = "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.mlp.experts.0"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SINGLE = "model.safetensors"

# Weights of tiny_model that share an amax.
GROUPS = [
    [f"{ATTENTION}.{name}_proj" for name in "qkv"],
    [f"{ATTENTION}.o_proj"],
    [f"{MLP}.gate_proj", f"{MLP}.up_proj"],
    [f"{MLP}.down_proj"],
    [f"{EXPERT}.w1", f"{EXPERT}.w3"],
    [f"{EXPERT}.w2"],
]
QUANTIZED = {module for group in GROUPS for module in group}


def tiny_model() -> dict[str, dict[str, Tensor]]:
    """Tensors by file: a layer whose q/k/v and gate/up lie in different files, and one expert. Embeddings are tied."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, times: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*shape, generator=generator) * times).to(dtype)

    return {
        FIRST: {
            "model.embed_tokens.weight": randn(40, 32),
            "model.layers.0.input_layernorm.weight": randn(32),
            f"{ATTENTION}.q_proj.weight": randn(32, 32),
            f"{ATTENTION}.q_proj.bias": randn(32),
            f"{ATTENTION}.v_proj.weight": randn(16, 32, times=0.1),
            f"{MLP}.gate_proj.weight": randn(48, 32, dtype=torch.float32),
        },
        SECOND: {
            f"{ATTENTION}.k_proj.weight": randn(16, 32, times=5),
            f"{ATTENTION}.o_proj.weight": randn(32, 32, dtype=torch.float16),
            f"{MLP}.up_proj.weight": randn(48, 32, times=3),
            f"{MLP}.down_proj.weight": randn(32, 48),
            f"{MLP}.odd_proj.weight": randn(32, 24),  # K is no multiple of 16
            "model.layers.1.mlp.gate.weight": randn(4, 32),
            f"{EXPERT}.w1.weight": randn(16, 32),
            f"{EXPERT}.w2.weight": randn(32, 16),
            f"{EXPERT}.w3.weight": randn(16, 32, times=0.5),
            "model.layers.1.conv.weight": randn(4, 16, 3),  # no matrix, though its second dimension would do
            "model.layers.1.positions": torch.arange(7),
        },
    }


def merged(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors, whatever their file."""
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def weight_map() -> dict[str, str]:
    """The index of tiny_model."""
    return {tensor: name for name, tensors in tiny_model().items() for tensor in tensors}


def write(folder: Path, files: Mapping[str, Mapping[str, Tensor]], config: object = CONFIG) -> Path:
    """A checkpoint as ``save_pretrained`` leaves it: its files, an index where there is more than one, a config."""
    folder.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
    if set(files) != {SINGLE}:
        write_index(folder, {tensor: name for name, tensors in files.items() for tensor in tensors})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_index(folder: Path, listed: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def single(folder: Path, tensors: Mapping[str, Tensor], config: object = CONFIG) -> Path:
    """A checkpoint of one file."""
    return write(folder, {SINGLE: tensors}, config)


def everything(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder as safetensors itself reads them, checked against its index where it has one."""
    if not (folder / INDEX).exists():
        return load_file(folder / SINGLE)
    index = json.loads((folder / INDEX).read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        held = load_file(folder / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(held)
        tensors |= held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, links followed, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- headers by hand ---


def entry(dtype: str, shape: Iterable[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def raw_file(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header: an object, or text or bytes that need not even be JSON."""
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    encoded = text.encode() if isinstance(text, str) else text
    return len(encoded).to_bytes(8, "little") + encoded + data


def header_of(path: Path) -> dict[str, Any]:
    """The header of a file, in the order in which it is stored."""
    content = path.read_bytes()
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def redtype(path: Path, name: str, dtype: str, shape: Iterable[int]) -> None:
    """Change what the header says of one tensor, leaving its bytes alone."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[name] |= {"dtype": dtype, "shape": list(shape)}
    path.write_bytes(raw_file(header, content[8 + length :]))


# --- one set of quantized weights in every family ---


def _modelopt(q: NVFP4Tensor, amax: float, encoded_amax: float) -> dict[str, Tensor]:
    return {"weight": q.packed, "weight_scale": q.block_scale, "weight_scale_2": q.decode_scale}


def _compressed_tensors(q: NVFP4Tensor, amax: float, encoded_amax: float) -> dict[str, Tensor]:
    encode = torch.tensor([encoded_amax]) / torch.tensor(amax) if amax else torch.ones(1)
    return {"weight_packed": q.packed, "weight_scale": q.block_scale, "weight_global_scale": encode}


def _fouroversix(q: NVFP4Tensor, amax: float, encoded_amax: float) -> dict[str, Tensor]:
    rows, columns = q.shape
    padded_rows, padded_columns = -(-rows // 128) * 128, -(-columns // 64) * 64
    values = torch.zeros(padded_rows, padded_columns // 2, dtype=torch.uint8)
    values[:rows, : columns // 2] = q.packed
    return {
        "quantized_weight_values": values,
        "quantized_weight_scale_factors": tiled(q.block_scale),
        "quantized_weight_amax": torch.tensor(amax),
        "quantized_weight_metadata": torch.tensor(
            [rows, columns, padded_rows, padded_columns, 1, 1], dtype=torch.int32
        ),
    }


def tiled(block_scale: Tensor) -> Tensor:
    """Block scales in the 128x4 layout, flat, by the index formula that cuBLAS documents, one scale at a time."""
    rows, columns = block_scale.shape
    C = -(-columns // 4) * 4
    flat = torch.zeros(-(-rows // 128) * 128 * C, dtype=torch.uint8)
    stored = block_scale.view(torch.uint8)
    for r in range(rows):
        for c in range(columns):
            index = ((r // 128) * (C // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
            flat[index] = stored[r, c]
    return flat.view(torch.float8_e4m3fn)


NVFP4_ARGUMENTS: Final = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "dynamic": False,
}
RECIPE: Final = {"metric": "mse", "scale_max": 256, "adaptive": True, "error": "amax"}

BLOCKS: Final[Mapping[str, Mapping[str, Any]]] = {
    "nvfp4_4over6": {
        "quant_method": "nvfp4_4over6",
        "format_version": 1,
        "group_size": 16,
        "weights": RECIPE,
        "activations": {**RECIPE, "granularity": "token"},
        "ignore": ["lm_head"],
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]},
    "modelopt hf_quant_config": {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head"],
        },
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": NVFP4_ARGUMENTS,
                "input_activations": {**NVFP4_ARGUMENTS, "dynamic": "local"},
            }
        },
        "ignore": ["lm_head"],
    },
    "fouroversix": {
        "quant_method": "fouroversix",
        "dtype": "nvfp4",
        "scale_rule": "mse",
        "modules_to_not_convert": ["lm_head"],
    },
}
"""What the config of each family says of W4A4 with the paper's recipe."""
FAMILIES: Final = tuple(BLOCKS)

_PARTS: Final[Mapping[str, Callable[[NVFP4Tensor, float, float], dict[str, Tensor]]]] = {
    "nvfp4_4over6": _modelopt,
    "modelopt": _modelopt,
    "modelopt hf_quant_config": _modelopt,
    "compressed-tensors": _compressed_tensors,
    "fouroversix": _fouroversix,
}


def parts(family: str, q: NVFP4Tensor, amax: float, encoded_amax: float = 1536.0) -> dict[str, Tensor]:
    """The tensors of one weight by the last part of their names, as ``family`` spells them."""
    return _PARTS[family](q, amax, encoded_amax)


def write_family(
    folder: Path, family: str, tensors: Mapping[str, Tensor], block: Mapping[str, Any] | None = None
) -> Path:
    """A checkpoint of one file whose config says ``block``, or the family's usual one."""
    block = dict(BLOCKS[family] if block is None else block)
    if family == "modelopt hf_quant_config":
        single(folder, tensors)
        (folder / "hf_quant_config.json").write_text(json.dumps(block))
        return folder
    return single(folder, tensors, {**CONFIG, "quantization_config": block})
