"""The demo's models: the mixture of experts gives the dense model's distributions through real sparse routing.

Gemma's file is not at hand: a tiny one of its kind, in two parts, takes its place.
"""

from pathlib import Path

import demo_model
import gguf
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
)

QUESTIONS = ["What is the capital of France?", "Tom has 3 apples and buys 4 more. How many now?", "Name three colours."]


@pytest.fixture(scope="session")
def prompts(models: tuple[Path, Path]) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return [tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]


@torch.no_grad()
def test_dense_answers(models: tuple[Path, Path], prompts: list[torch.Tensor]) -> None:
    dense = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.bfloat16)
    answer = dense.generate(prompts[0], do_sample=False, max_new_tokens=8)[0, prompts[0].shape[1] :]
    assert "Paris" in AutoTokenizer.from_pretrained(models[1]).decode(answer)


# In fp32 the two are the same function; in BF16 they differ by the rounding of the expert sums.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01)], ids=["fp32", "bf16"])
@torch.no_grad()
def test_moe_has_the_dense_distributions_and_routes_by_token(
    models: tuple[Path, Path], prompts: list[torch.Tensor], dtype: torch.dtype, limit: float
) -> None:
    dense, moe = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in models)
    for prompt in prompts:
        routed = moe(prompt, output_router_logits=True)
        p, q = (logits.double().log_softmax(-1) for logits in (dense(prompt).logits, routed.logits))
        divergence = (p.exp() * (p - q)).sum(-1).mean().item()
        assert 0 <= divergence <= limit
    for layer in routed.router_logits:
        chosen = layer.topk(8).indices.sort().values
        assert (chosen // 2 == torch.arange(8)).all(), "one expert of each pair"
        assert len(chosen.unique(dim=0)) > 8, "different experts for different tokens"
        assert len(chosen.unique()) > 12, "nearly all experts in use"


@pytest.mark.parametrize("kind", [0, 1], ids=["dense", "moe"])
@torch.no_grad()
def test_channels_in_another_order_are_the_same_function(
    models: tuple[Path, Path], tmp_path: Path, prompts: list[torch.Tensor], kind: int
) -> None:
    other = demo_model.reordered(models[kind], tmp_path, 1)
    one, two = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (models[kind], other))
    assert not torch.equal(*(model.model.norm.weight for model in (one, two)))
    p, q = (model(prompts[1]).logits.log_softmax(-1) for model in (one, two))
    assert (p - q).abs().max() < 1e-3
    assert (
        AutoTokenizer.from_pretrained(other)("a b")["input_ids"]
        == AutoTokenizer.from_pretrained(models[0])("a b")["input_ids"]
    )


TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *"▁abcdefghij", "▁a", "▁b", "ab", "▁ab", "cd"]


@pytest.fixture
def gemma(tmp_path: Path) -> tuple[Gemma3ForCausalLM, list[Path]]:
    """A model, and a GGUF file of it in two parts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "sliding_window": 4, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 256}
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(TOKENS), **sizes, **heads))
    for parameter in model.parameters():  # Norms too, which are zero at first; nothing that BF16 would round.
        parameter.data = (0.2 * torch.randn_like(parameter)).bfloat16().float()
    whole = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(whole, "gemma3")
    fields = {
        "context_length": 128,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "block_count": 6,
        "head_count": 2,
        "head_count_kv": 1,
        "key_length": 16,
        "sliding_window": 4,
        "layer_norm_rms_eps": 1e-6,
        "rope_freq_base": 1e6,
        "tokenizer_model": "llama",
        "token_list": TOKENS,
        "token_scores": [0.0] * len(TOKENS),
        "token_types": [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 4),
        **{f"{token}_token_id": id for id, token in enumerate(["pad", "eos", "bos", "unk"])},
        "add_bos_token": True,
    }
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 6)
    for name, parameter in model.named_parameters():
        values = parameter.detach().float() + ("norm" in name)  # llama.cpp's norms have the 1 that Gemma's lack.
        writer.add_tensor(names.get_name(name, (".weight",)), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = [tmp_path / "tiny.gguf.part00", tmp_path / "tiny.gguf.part01"]
    content = whole.read_bytes()
    parts[0].write_bytes(content[:5000])
    parts[1].write_bytes(content[5000:])
    return model, parts


@torch.no_grad()
def test_gemma_is_the_files_network_in_any_order_of_channels(
    tmp_path: Path, gemma: tuple[Gemma3ForCausalLM, list[Path]]
) -> None:
    model, parts = gemma
    built = demo_model.dense(tmp_path / "models", parts, demo_model.GEMMA)
    prompt = torch.randint(len(TOKENS), (1, 12))
    expected = model(prompt).logits
    same = AutoModelForCausalLM.from_pretrained(built, dtype=torch.float32)
    assert torch.equal(same(prompt).logits, expected)
    other = AutoModelForCausalLM.from_pretrained(demo_model.reordered(built, tmp_path, 1), dtype=torch.float32)
    assert not torch.equal(other.model.norm.weight, same.model.norm.weight)
    torch.testing.assert_close(other(prompt).logits, expected, rtol=0, atol=1e-4)


def test_gemmas_folder_has_a_tied_head_and_a_tokenizer_that_begins_texts(
    tmp_path: Path, gemma: tuple[Gemma3ForCausalLM, list[Path]]
) -> None:
    built = demo_model.dense(tmp_path / "models", gemma[1], demo_model.GEMMA)
    assert built.name == "gemma-3-270m"
    with safe_open(built / "model.safetensors", "pt") as file:
        assert not any("lm_head" in name for name in file.keys())  # noqa: SIM118
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(built)
    assert isinstance(model, Gemma3ForCausalLM)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(built)
    words = [TOKENS.index(token) for token in ("ab", "▁ab", "cd")]
    assert tokenizer("ab abcd")["input_ids"] == [TOKENS.index("<bos>"), *words]
    assert tokenizer("ab abcd", add_special_tokens=False)["input_ids"] == words


def test_a_transformers_that_reads_another_tokenizer_is_refused(
    tmp_path: Path, gemma: tuple[Gemma3ForCausalLM, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(Unigram([("a", 0.0)], 0, False)))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: letters)
    with pytest.raises(SystemExit, match=r"needs 5\.18"):
        demo_model.dense(tmp_path / "models", gemma[1], demo_model.GEMMA)
    assert not (tmp_path / "models" / demo_model.GEMMA).exists()


def test_files_of_installed_packages_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(demo_model.PACKAGES, "tiny", ["tiny-b==1.0", "tiny-a==1.0"])
    with pytest.raises(SystemExit, match=r"--no-deps tiny-b==1\.0 tiny-a==1\.0"):
        demo_model._gguf("tiny")
    for package, part in {"tiny_a": "part01", "tiny_b": "part00"}.items():
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {package}\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"{package}/__init__.py,,\n{package}/tiny.gguf.{part},,\n")
    assert demo_model._gguf("tiny") == [tmp_path / "tiny_b/tiny.gguf.part00", tmp_path / "tiny_a/tiny.gguf.part01"]
