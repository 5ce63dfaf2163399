"""Models of well-known shapes with random weights, as folders that an engine serves: nothing has to be downloaded.

One layer is random; all others are copies of it, under their own names. It is quantized by the package itself, so block
scales are those of a model, and what differs between our folders and ModelOpt's is their config: the files of tensors
are the same, and are on the disk once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fouroversix_plugin as fos
from fouroversix_plugin.checkpoint import plan_conversion, quantize_checkpoint
from fouroversix_plugin.checkpoint.config import config as quantized_config

FIRST = "model.layers.0."
WRITERS = 8
PRESETS = {"w4a16": "w4a16", "w4a4": "nvfp4_4over6"}
"""Of our configurations."""


@dataclass(frozen=True)
class Shape:
    """A Llama, or with ``experts`` a Qwen3 mixture of them (``inner`` is then the width of one)."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int = 0
    chosen: int = 0
    head: int = 128

    def config(self, max_positions: int) -> Any:
        """What transformers calls it."""
        from transformers import LlamaConfig, Qwen3MoeConfig

        common: dict[str, Any] = {
            "dtype": torch.bfloat16,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": max_positions,
            "tie_word_embeddings": False,
        }
        if not self.experts:
            return LlamaConfig(architectures=["LlamaForCausalLM"], **common)
        experts = {"num_experts": self.experts, "num_experts_per_tok": self.chosen, "moe_intermediate_size": self.inner}
        return Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], norm_topk_prob=True, **experts, **common)

    def sizes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the first layer's tensors and of those outside of layers."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        yield "lm_head.weight", (self.vocabulary, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        yield f"{FIRST}input_layernorm.weight", (self.hidden,)
        yield f"{FIRST}post_attention_layernorm.weight", (self.hidden,)
        q, kv = self.heads * self.head, self.kv_heads * self.head
        yield f"{FIRST}self_attn.q_proj.weight", (q, self.hidden)
        yield f"{FIRST}self_attn.k_proj.weight", (kv, self.hidden)
        yield f"{FIRST}self_attn.v_proj.weight", (kv, self.hidden)
        yield f"{FIRST}self_attn.o_proj.weight", (self.hidden, q)
        if self.experts:
            yield f"{FIRST}self_attn.q_norm.weight", (self.head,)
            yield f"{FIRST}self_attn.k_norm.weight", (self.head,)
            yield f"{FIRST}mlp.gate.weight", (self.experts, self.hidden)
        for expert in [f"experts.{e}." for e in range(self.experts)] or [""]:
            yield f"{FIRST}mlp.{expert}gate_proj.weight", (self.inner, self.hidden)
            yield f"{FIRST}mlp.{expert}up_proj.weight", (self.inner, self.hidden)
            yield f"{FIRST}mlp.{expert}down_proj.weight", (self.hidden, self.inner)


SHAPES = {
    "llama-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "qwen3-30b-a3b": Shape(48, 2048, 768, 32, 4, 151936, experts=128, chosen=8),
    "small": Shape(4, 512, 1024, 4, 2, 1024),
    "small-moe": Shape(4, 512, 256, 4, 2, 1024, experts=16, chosen=4),
}


class Source(NamedTuple):
    """Where an engine finds a configuration's model."""

    folder: Path
    made_up: bool
    """The folder has no weights."""
    overrides: dict[str, Any]
    """Of the folder's config."""


def source(configuration: str, folder: Path, dummy: bool) -> Source:
    """Of the folders that are written below; with ``dummy``, ours is quantized while loading made-up weights."""
    if configuration == "bf16" or not dummy:
        return Source(folder / configuration, configuration == "bf16", {})
    block = {"quant_method": "nvfp4_4over6", "recipe": PRESETS[configuration]}
    return Source(folder / "bf16", True, {"quantization_config": block})


def write_bf16_config(shape: Shape, folder: Path, max_positions: int) -> None:
    """A folder without weights: the engine makes them up (``load_format="dummy"``)."""
    folder.mkdir(parents=True)
    shape.config(max_positions).save_pretrained(folder)


def write_quantized(shape: Shape, folder: Path, max_positions: int, device: str) -> None:
    """``folder``/stock in ModelOpt's words, ``folder``/w4a16 and ``folder``/w4a4 in ours."""
    source, stock = folder / "first-layer", folder / "stock"
    write_bf16_config(shape, source, max_positions)
    save_file(_random_tensors(shape, device), source / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(source, stock, fos.preset("w4a16"), format="modelopt", device=device)
    files = _repeat_first_layer(stock, shape.layers)
    for name in ("config.json", "hf_quant_config.json"):
        text = _repeated(json.loads((stock / name).read_text()), shape.layers)
        (stock / name).write_text(json.dumps(text, indent=2))
    for name, preset in PRESETS.items():
        ours = folder / name
        ours.mkdir()
        for file in files:
            os.link(stock / file, ours / file)
        config = quantized_config(plan_conversion(source, fos.preset(preset)))
        (ours / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.iterdir():
        path.unlink()
    source.rmdir()


def _random_tensors(shape: Shape, device: str) -> dict[str, Tensor]:
    def random(size: tuple[int, ...]) -> Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        return torch.randn(size, device=device, dtype=torch.bfloat16).mul_(0.02).cpu()

    torch.manual_seed(0)
    return {name: random(size) for name, size in shape.sizes()}


def _repeat_first_layer(folder: Path, layers: int) -> list[str]:
    """Replace the folder's files of tensors by one for what lies outside of layers and one for each layer.

    Returns:
        Names of the files: these and their index.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    first = {name: tensor for name, tensor in tensors.items() if name.startswith(FIRST)}
    parts = {_file(0): first, "rest.safetensors": {n: t for n, t in tensors.items() if n not in first}}
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    stored = memoryview((folder / _file(0)).read_bytes())
    header_end = 8 + int.from_bytes(stored[:8], "little")

    def write(layer: int) -> None:
        header = bytes(stored[8:header_end]).replace(f'"{FIRST}'.encode(), f'"{_prefix(layer)}'.encode())
        header += b" " * (-len(header) % 8)
        with (folder / _file(layer)).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(stored[header_end:])

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(1, layers)))
    places = dict.fromkeys(parts["rest.safetensors"], "rest.safetensors")
    for layer in range(layers):
        places |= {_prefix(layer) + name.removeprefix(FIRST): _file(layer) for name in first}
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [*sorted({*places.values()}), "model.safetensors.index.json"]


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def _file(layer: int) -> str:
    return f"layer-{layer}.safetensors"


def _repeated(value: Any, layers: int) -> Any:
    """The config with every name of a module of the first layer followed by those of the others."""
    if isinstance(value, Mapping):
        return {key: _repeated(item, layers) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    of_all: list[Any] = []
    for item in value:
        if isinstance(item, str) and item.startswith(FIRST):
            of_all += [_prefix(layer) + item.removeprefix(FIRST) for layer in range(layers)]
        else:
            of_all.append(_repeated(item, layers))
    return of_all
