"""The demo's models: the mixture of experts gives the dense model's distributions through real sparse routing."""

from pathlib import Path

import demo_model
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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
