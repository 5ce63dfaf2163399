"""scripts/divergence.py: KL against a direct computation, the bootstrap, and scores from servers and checkpoints."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import divergence
import divergence_scores
import divergence_sources
import divergence_statistics
import pytest
import server_client
import torch
from divergence_scores import Document, Scores, ScoresFile, Writer, make_full_scores, make_scores
from divergence_sources import Request, Text, make_documents
from divergence_statistics import Positions
from fake_server import FakeServer, Reply
from gsm8k_data import InputError
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 40


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_DELAY", 0.002)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# --- KL --------------------------------------------------------------------------------------------------------------


def distributions(positions: int, seed: int, near: Tensor | None = None) -> Tensor:
    """Log-probabilities [positions, VOCABULARY]; with ``near``, a disturbance of those."""
    noise = torch.randn(positions, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * noise if near is None else near + 0.5 * noise).log_softmax(1)


def best(logprobs: Tensor, count: int, targets: list[int]) -> Scores:
    """What an engine that gives ``count`` log-probabilities says of these distributions."""
    rows = []
    for row, target in zip(logprobs, targets, strict=True):
        ids = row.topk(count).indices.tolist()
        ids = ids if target in ids else [target, *ids]
        rows.append((ids, row[ids].tolist()))
    return make_scores(rows, targets)


def direct_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def compare(p: Scores, q: Scores) -> Positions:
    return divergence_statistics.compare(p, q, 0)


def test_kl_of_whole_distributions_is_the_direct_sum() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
    found = compare(make_full_scores(p.log(), [0, 0]), make_full_scores(q.log(), [0, 0]))
    # 0.5 ln 2 - 0.25 ln 2, and ln 2
    assert found.kl.tolist() == pytest.approx([0.25 * math.log(2), math.log(2)])
    assert found.agrees.tolist() == [0, 1]
    assert found.outside.tolist() == [0, 0]
    assert found.reference_nll.tolist() == pytest.approx([math.log(2), 0])
    assert found.candidate_nll.tolist() == pytest.approx([2 * math.log(2), math.log(2)])
    # The direction: the reference's probabilities are the weights.
    back = compare(make_full_scores(q.log(), [0, 0]), make_full_scores(p.log(), [0, 0]))
    assert back.kl[1] == math.inf


def test_a_token_of_no_probability_adds_nothing() -> None:
    p = torch.tensor([[0.0, 1.0]]).log()
    found = compare(make_full_scores(p, [1]), make_full_scores(p, [1]))
    assert found.kl.tolist() == [0]


def test_kl_of_the_most_likely_tokens_is_that_of_merged_outcomes() -> None:
    """The direct sum over the tokens that both sides name, and one outcome for the rest; position by position."""
    p, targets = distributions(20, 0), list(range(20))
    q = distributions(20, 1, near=p)
    one, other = best(p, 5, targets), best(q, 8, targets)
    found = compare(one, other)
    assert one.ids is not None
    assert other.ids is not None
    for i in range(20):
        common = sorted({*one.ids[i].tolist()} & {*other.ids[i].tolist()} - {-1})
        a, b = (row[i, common].exp().tolist() for row in (p, q))
        expected = direct_kl([*a, 1 - sum(a)], [*b, 1 - sum(b)])
        assert found.kl[i].item() == pytest.approx(expected, abs=1e-5)
        assert found.outside[i].item() == pytest.approx(1 - sum(a), abs=1e-5)
        assert found.reference_nll[i].item() == pytest.approx(-p[i, i].item(), abs=1e-5)


def test_more_tokens_give_a_tighter_lower_bound() -> None:
    p, targets = distributions(200, 2), [0] * 200
    q = distributions(200, 3, near=p)
    whole = compare(make_full_scores(p.float(), targets), make_full_scores(q.float(), targets)).kl.mean()
    bounds = [compare(best(p, k, targets), best(q, k, targets)).kl.mean() for k in (2, 5, 15, VOCABULARY)]
    assert bounds == sorted(bounds)
    assert 0 < bounds[0] < bounds[2] < whole
    assert bounds[3].item() == pytest.approx(whole.item(), rel=1e-4)


def test_a_whole_distribution_compares_with_a_part_on_either_side() -> None:
    p, targets = distributions(30, 4), [7] * 30
    q = distributions(30, 5, near=p)
    parts, wholes = [best(x, 6, targets) for x in (p, q)], [make_full_scores(x.float(), targets) for x in (p, q)]
    exact = compare(*wholes)
    for one, other in ((parts[0], wholes[1]), (wholes[0], parts[1])):
        found = compare(one, other)
        assert (found.kl <= exact.kl + 1e-5).all()
        assert found.kl.mean() > 0.5 * exact.kl.mean()
        assert found.agrees.tolist() == exact.agrees.tolist()


def test_equal_distributions_do_not_diverge() -> None:
    p, targets = distributions(50, 6), [3] * 50
    for scores in (best(p, 5, targets), make_full_scores(p.float(), targets)):
        found = compare(scores, scores)
        assert found.kl.abs().max() < 1e-12
        assert found.agrees.all()


def test_one_of_several_most_likely_tokens_in_common_is_agreement() -> None:
    tied, single = torch.tensor([[0.4, 0.4, 0.2]]).log(), torch.tensor([[0.3, 0.5, 0.2]]).log()
    third = torch.tensor([[0.2, 0.2, 0.6]]).log()
    for p, q, agrees in ((tied, single, 1), (single, tied, 1), (tied, third, 0)):
        assert compare(make_full_scores(p, [0]), make_full_scores(q, [0])).agrees.tolist() == [agrees]
    # Neither side's best is known to the other.
    one, other = make_scores([([1, 5], [-0.1, -3.0])], [5]), make_scores([([2, 5], [-0.2, -2.0])], [5])
    assert compare(one, other).agrees.tolist() == [0]


def test_scores_without_the_token_that_follows_are_refused() -> None:
    with pytest.raises(InputError, match="position 1: no log-probability for the token 9"):
        make_scores([([1, 2], [-1.0, -2.0]), ([1, 2], [-1.0, -2.0])], [2, 9])


# --- figures and their intervals -------------------------------------------------------------------------------------


def positions(kl: list[list[float]]) -> Positions:
    """Documents of these KLs; every position has reference_nll 1, candidate_nll 1 + KL, agreement where KL < 0.5."""
    flat = torch.tensor([value for document in kl for value in document], dtype=torch.float64)
    document = torch.tensor([i for i, values in enumerate(kl) for _ in values])
    ones = torch.ones_like(flat)
    return Positions(flat, (flat < 0.5).double(), ones, 1 + flat, 0 * ones, document)


def test_figures_of_a_few_positions() -> None:
    found = divergence_statistics.summarize(positions([[0.1, 0.2, 0.3], [0.4], [1.0] * 6]), 0)
    assert found["mean_kl"].value == pytest.approx(0.7)
    assert found["kl_p50"].value == 1.0
    assert found["top1_agreement"].value == pytest.approx(0.4)
    assert found["reference_perplexity"] == pytest.approx((math.e,) * 3)
    assert found["candidate_perplexity"].value == pytest.approx(math.exp(1.7))
    assert found["perplexity_ratio"].value == pytest.approx(math.exp(0.7))
    assert all(low <= value <= high for value, low, high in found.values())
    assert found["mean_kl"].low == pytest.approx(0.2, abs=0.01), "three times the first document"
    assert found["mean_kl"].high == 1.0


def test_percentiles_are_the_smallest_value_that_the_share_does_not_exceed() -> None:
    values = [i / 100 for i in range(100, 0, -1)]
    found = divergence_statistics.summarize(positions([values[i::4] for i in range(4)]), 0)
    assert [found[f"kl_p{p}"].value for p in (50, 90, 95, 99)] == pytest.approx([0.5, 0.9, 0.95, 0.99])


def test_a_seed_fixes_the_intervals() -> None:
    data = positions([[0.1], [0.3], [0.9]])
    assert divergence_statistics.summarize(data, 1) == divergence_statistics.summarize(data, 1)
    draws = divergence_statistics.resample(30, 1)
    assert (draws.sum(1) == 30).all()
    assert not torch.equal(draws, divergence_statistics.resample(30, 2))


def test_the_bootstrap_over_documents_covers_and_one_over_positions_would_not() -> None:
    """Documents differ more than their positions do: 95 % intervals must hold the truth in about 95 % of samples."""
    generator = torch.Generator().manual_seed(0)
    inside = naive = 0
    for trial in range(200):
        means = torch.rand(60, 1, generator=generator, dtype=torch.float64)
        values = means + 0.05 * torch.randn(60, 20, generator=generator, dtype=torch.float64)
        data = positions(values.tolist())
        sums = divergence_statistics.document_sums(data)
        found = divergence_statistics.ratio(sums["kl"].tolist(), sums["positions"].tolist(), trial)
        inside += found.low <= 0.5 <= found.high
        naive += abs(values.mean() - 0.5) <= 1.96 * values.std() / math.sqrt(values.numel())
    assert 182 <= inside <= 198
    assert naive < 150


def test_pairing_narrows_a_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.rand(100, generator=generator, dtype=torch.float64) * 10
    better = plain * (0.8 + 0.02 * torch.randn(100, generator=generator, dtype=torch.float64))
    found = divergence_statistics.ratio(better.tolist(), plain.tolist(), 0)
    assert 0.79 < found.low < found.value < found.high < 0.81


# --- files of scores -------------------------------------------------------------------------------------------------

DOCUMENTS = [Document((5, 6, 7, 8), 2), Document((1, 2, 3), 1)]


def write(path: Path, documents: list[Document] = DOCUMENTS, seed: int = 0) -> list[Scores]:
    targets = [list(document.tokens[document.start :]) for document in documents]
    scores = [best(distributions(len(t), seed + i), 4, t) for i, t in enumerate(targets)]
    writer = Writer(documents)
    for index in reversed(range(len(documents))):
        writer.add(index, scores[index])
    writer.write(path, {"source": path.stem, "top": 4})
    return scores


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = write(tmp_path / "a.safetensors")
    file = ScoresFile(tmp_path / "a.safetensors")
    assert file.documents == DOCUMENTS
    assert file.about == {"source": "a", "top": 4}
    for index, expected in enumerate(written):
        for one, other in zip(file.scores(index), expected, strict=True):
            assert torch.equal(one, other)
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_whole_distributions_are_stored_without_ids(tmp_path: Path) -> None:
    writer = Writer([Document((1, 2), 1)])
    writer.add(0, make_full_scores(torch.tensor([[0.1, 0.2, 0.7]]).log(), [2]))
    writer.write(tmp_path / "a.safetensors", {})
    assert ScoresFile(tmp_path / "a.safetensors").scores(0).ids is None


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as scores"):
        ScoresFile(tmp_path / "absent.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(InputError, match="cannot be read as scores"):
        ScoresFile(tmp_path / "half.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is no file of scores"):
        ScoresFile(tmp_path / "model.safetensors")


def test_too_many_scores_for_the_memory_are_refused_before_they_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_scores, "SHARE_OF_MEMORY", 0)
    with pytest.raises(InputError, match=r"4 positions with 40 log-probabilities.*lower --documents or --top"):
        Writer(DOCUMENTS).add(0, make_full_scores(distributions(2, 0).float(), [7, 8]))


def test_nan_is_refused(tmp_path: Path) -> None:
    logprobs = distributions(2, 0).float()
    logprobs[1, 3] = torch.nan
    with pytest.raises(InputError, match="document 1, scored position 1: NaN"):
        Writer(DOCUMENTS).add(1, make_full_scores(logprobs, [2, 3]))


# --- documents -------------------------------------------------------------------------------------------------------


def tokenize(text: str, *, special: bool) -> list[int]:
    """A token a word, from its length; 0 begins a text."""
    return [0] * special + [len(word) for word in text.split()]


def request(*texts: Text, top: int | None = 4, window: int = 512, limit: int | None = None) -> Request:
    return Request(texts, (), top, window, limit, 0)


def test_solutions_are_scored_with_the_question_as_context() -> None:
    found = make_documents(request(Text("Question: a bb\nAnswer:", " cc ddd"), Text("x", "")), tokenize)
    assert found == [Document((0, 9, 1, 2, 7, 2, 3), 5)], "and nothing is left of a text with no token to predict"


def test_a_file_is_cut_into_windows() -> None:
    text = Text("", " ".join("a" * i for i in range(1, 9)))
    found = make_documents(request(text, window=4), tokenize)
    assert found == [Document((0, 1, 2, 3), 1), Document((4, 5, 6, 7), 1)], "one token alone predicts nothing"
    assert make_documents(request(text, window=4, limit=1), tokenize)[0] in found
    with pytest.raises(InputError, match="3 documents wanted, and the text gives 2"):
        make_documents(request(text, window=4, limit=3), tokenize)
    with pytest.raises(InputError, match="the text gives 0"):
        make_documents(request(Text("", "")), tokenize)


def test_text_files_are_taken_whole(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "hub.txt"
    path.write_text("a b")
    assert divergence.load_texts(str(path), 1, 0) == [Text("", "a b")]
    assert len(divergence.load_texts(str(data), 3, 0)) == 3
    with pytest.raises(InputError, match="cannot be read"):
        divergence.load_texts(str(tmp_path / "absent.txt"), 1, 0)


def test_batches_hold_every_document_once_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_sources, "NUMBERS_AT_A_TIME", 100)
    documents = [Document((1,) * n, 1) for n in (4, 4, 4, 30, 2, 2)]
    assert list(divergence_sources._batches(documents, 10)) == [[0, 1], [2], [3], [4, 5]]


# --- servers ---------------------------------------------------------------------------------------------------------


def predicted(tokens: list[int], seed: int, place: int) -> Tensor:
    """What the fake model with this seed predicts for a place, from the tokens before it."""
    context = sum((i + 1) * token for i, token in enumerate(tokens[:place]))
    base = distributions(1, context)[0]
    return base if not seed else distributions(1, context + seed, near=base.unsqueeze(0))[0]


def vllm_server(seed: int, max_logprobs: int = VOCABULARY) -> FakeServer:
    def answer(path: str, body: dict[str, Any]) -> Reply:
        if path == "/tokenize":
            return Reply({"tokens": tokenize(body["prompt"], special=body["add_special_tokens"])})
        tokens, count = body["prompt"], body["prompt_logprobs"]
        if count > max_logprobs:
            return Reply({"error": {"message": f"Requested prompt logprobs of {count}, which is greater"}}, 400)
        rows: list[Any] = [None]
        for place in range(1, len(tokens)):
            row = predicted(tokens, seed, place)
            ids = [tokens[place], *row.topk(VOCABULARY if count == -1 else count).indices.tolist()]
            rows.append({str(id): {"logprob": row[id].item(), "rank": 1, "decoded_token": "?"} for id in ids})
        return Reply({"choices": [{"text": "", "prompt_logprobs": rows}]})

    return FakeServer(answer)


def sglang_server(seed: int) -> FakeServer:
    def answer(path: str, body: dict[str, Any]) -> Reply:
        tokens, start = body["input_ids"], body["logprob_start_len"]
        own: list[Any] = [[None, tokens[start], None]]
        top: list[Any] = [None]
        for place in range(start + 1, len(tokens)):
            row = predicted(tokens, seed, place)
            own.append([row[tokens[place]].item(), tokens[place], None])
            top.append([[row[id].item(), id, None] for id in row.topk(body["top_logprobs_num"]).indices.tolist()])
        return Reply({"text": "", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}})

    server = FakeServer(answer)
    server.routes["/v1/models"]["data"][0]["owned_by"] = "sglang"
    del server.routes["/version"]
    server.routes["/server_info"] = {"version": "0.5.16", "quantization": "nvfp4_4over6"}
    return server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    rows = [
        {"question": f"{'q' * i} and q", "answer": " ".join("ab" * k for k in range(i + 2)) + " #### 5"}
        for i in range(1, 13)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> int:
    return divergence.main([str(argument) for argument in arguments])


def figures(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def expected_mean_kl(documents: list[Document], seed: int) -> float:
    kls = [
        direct_kl(*(predicted(list(d.tokens), s, place).exp().tolist() for s in (0, seed)))
        for d in documents
        for place in range(d.start, len(d.tokens))
    ]
    return sum(kls) / len(kls)


def test_two_servers(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, kept = tmp_path / "out.json", tmp_path / "reference.safetensors"
    with vllm_server(0).running() as one, vllm_server(100).running() as other:
        arguments = ["--reference", one.url, "--candidate", other.url, "--data", data, "--documents", 10]
        assert run(*arguments, "--top", "all", "--out", out, "--save-reference", kept) == 0
        scored = [body for path, body in other.requests if path == "/v1/completions"]
        assert len(scored) == 10
        assert all(path == "/v1/completions" for path, _ in other.requests), "the tokens are the reference's"
    found, printed = figures(out), capsys.readouterr()
    documents = ScoresFile(kept).documents
    assert sorted(tuple(body["prompt"]) for body in scored) == sorted(document.tokens for document in documents)
    assert found["figures"]["mean_kl"]["value"] == pytest.approx(expected_mean_kl(documents, 100), rel=1e-5)
    assert (found["documents"], found["mass_outside"]) == (10, 0)
    assert found["positions"] == sum(len(d.tokens) - d.start for d in documents)
    assert found["candidate"]["version"] == "0.32.0"
    assert "KL over the whole vocabulary" in printed.out
    assert "KL, mean (nats)" in printed.out
    assert not printed.err, "no progress bar where stderr is no terminal"


def test_a_reference_is_scored_once_and_sglang_gives_what_vllm_gives(tmp_path: Path, data: Path) -> None:
    kept = tmp_path / "reference.safetensors"
    with vllm_server(0).running() as server:
        assert run("--reference", server.url, "--data", data, "--save-reference", kept, "--top", 6) == 0
    results = []
    for name, fake in {"vllm": vllm_server(100), "sglang": sglang_server(100)}.items():
        with fake.running() as server:
            out = tmp_path / f"{name}.json"
            assert run("--reference", kept, "--candidate", server.url, "--top", 6, "--out", out) == 0
            assert len(server.requests) == 12
        results.append(figures(out))
    assert results[0]["figures"] == results[1]["figures"]
    exact = expected_mean_kl(ScoresFile(kept).documents, 100)
    assert 0.5 * exact < results[0]["figures"]["mean_kl"]["value"] < exact
    assert 0 < results[0]["mass_outside"] < 0.3
    assert results[1]["candidate"]["quantization"] == "nvfp4_4over6"


@pytest.fixture
def reference(tmp_path: Path, data: Path) -> Path:
    path = tmp_path / "reference.safetensors"
    with vllm_server(0).running() as server:
        assert run("--reference", server.url, "--data", data, "--save-reference", path, "--top", 6) == 0
    return path


def test_results_are_compared_document_by_document(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 100), ("b", 200)):
        with vllm_server(seed).running() as server:
            arguments = ["--reference", reference, "--candidate", server.url, "--top", 6]
            assert run(*arguments, "--out", tmp_path / f"{name}.json") == 0
    a, b, out = (tmp_path / f"{name}.json" for name in ("a", "b", "out"))
    assert run("--compare", a, b, "--out", out) == 0
    assert "b against a: mean KL " in capsys.readouterr().out
    (found,) = figures(out)["pairs"]
    means = [figures(path)["figures"]["mean_kl"]["value"] for path in (a, b)]
    assert found["kl_ratio"]["value"] == pytest.approx(means[1] / means[0])
    assert found["kl_ratio"]["low"] < found["kl_ratio"]["value"] < found["kl_ratio"]["high"]
    changed = figures(a) | {"documents_sha256": "0"}
    (tmp_path / "other.json").write_text(json.dumps(changed))
    assert run("--compare", tmp_path / "other.json", a) == 1
    assert "they are of other documents" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("[]")
    assert run("--compare", a, tmp_path / "other.json") == 1
    assert "is not what divergence.py --out writes" in capsys.readouterr().err


def test_a_file_of_other_documents_is_no_candidate(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "other.safetensors")
    assert run("--reference", reference, "--candidate", tmp_path / "other.safetensors") == 1
    assert "hold scores of other documents" in capsys.readouterr().err


def test_a_saved_candidate_gives_the_same_figures(tmp_path: Path, reference: Path) -> None:
    saved = tmp_path / "candidate.safetensors"
    with vllm_server(100).running() as server:
        arguments = ["--reference", reference, "--candidate", server.url, "--top", 6, "--save-candidate", saved]
        assert run(*arguments, "--out", tmp_path / "a.json") == 0
    assert run("--reference", reference, "--candidate", saved, "--out", tmp_path / "b.json") == 0
    assert figures(tmp_path / "a.json") == figures(tmp_path / "b.json")


def test_a_server_that_cannot_score_is_named(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"

    def score(server: FakeServer, *arguments: object) -> str:
        with server.running():
            assert run("--reference", reference, "--candidate", server.url, "--out", out, *arguments) == 1
        assert not out.exists()
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        return said

    assert "Requested prompt logprobs of 30" in score(vllm_server(0, max_logprobs=20), "--top", 30)
    assert "without prompt_logprobs" in score(FakeServer(lambda path, body: Reply({"choices": [{"text": ""}]})))
    cut = FakeServer(lambda path, body: Reply({"choices": [{"prompt_logprobs": [None, {"1": {"logprob": -1}}]}]}))
    assert "gave log-probabilities of" in score(cut)
    assert "SGLang has no log-probabilities of the whole" in score(sglang_server(0), "--top", "all")


@pytest.mark.parametrize(
    "words",
    [
        "--candidate a",
        "--reference a --data b",
        "--reference a --candidate b",
        "--reference a.safetensors --candidate b --data c",
        "--reference a.safetensors --candidate b --documents 3",
        "--reference a --candidate b --data c --top none",
        "--reference a --candidate b --data c --engine-args [1]",
        "--reference a --candidate b --data c --engine-args {",
        "--compare a.json",
    ],
)
def test_wrong_usage(words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        divergence.main(words.split())
    assert ended.value.code == 2


# --- checkpoints -----------------------------------------------------------------------------------------------------

# As much of vLLM as is called, giving what FlatLogprobs gives: first the token that follows, then the most likely.
VLLM = """
from types import SimpleNamespace
__version__ = "0.32.0"
print("an engine's log on stdout", flush=True)

def SamplingParams(**arguments):
    return arguments

class LLM:
    def __init__(self, model, max_logprobs, seed, enforce_eager):
        if model == "absent":
            raise OSError("no such model")
        assert enforce_eager
        self.seed, self.max_logprobs = seed, max_logprobs
        config = SimpleNamespace(model=model, get_vocab_size=lambda: 40, quantization="nvfp4_4over6")
        self.llm_engine = SimpleNamespace(model_config=config)

    def get_tokenizer(self):
        from test_divergence import tokenize
        return SimpleNamespace(encode=lambda text, add_special_tokens: tokenize(text, special=add_special_tokens))

    def generate(self, prompts, params, use_tqdm):
        from test_divergence import predicted
        assert params["prompt_logprobs"] == self.max_logprobs
        for prompt in prompts:
            tokens = prompt["prompt_token_ids"]
            flat = SimpleNamespace(start_indices=[0], end_indices=[0], token_ids=[], logprobs=[])
            for place in range(1, len(tokens)):
                row = predicted(tokens, self.seed, place)
                count = 40 if self.max_logprobs == -1 else self.max_logprobs
                ids = [tokens[place], *row.topk(count).indices.tolist()]
                flat.start_indices.append(len(flat.token_ids))
                flat.token_ids += ids
                flat.logprobs += row[ids].tolist()
                flat.end_indices.append(len(flat.token_ids))
            yield SimpleNamespace(prompt_logprobs=flat)
"""


@pytest.fixture
def _fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VLLM)
    (package / "inputs.py").write_text("TokensPrompt = dict\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.delitem(sys.modules, "vllm.inputs", raising=False)


@pytest.mark.usefixtures("_fake_vllm")
def test_a_checkpoint_in_a_process_of_its_own_gives_what_a_server_gives(
    tmp_path: Path, reference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with vllm_server(100).running() as server:
        served = tmp_path / "served.json"
        assert run("--reference", reference, "--candidate", server.url, "--top", 6, "--out", served) == 0
    capfd.readouterr()
    arguments = ["--engine-args", '{"enforce_eager": true, "seed": 0}', "--candidate-args", '{"seed": 100}', "--top", 6]
    out, kept = tmp_path / "out.json", tmp_path / "candidate.safetensors"
    assert (
        run("--reference", reference, "--candidate", "model", *arguments, "--out", out, "--save-candidate", kept) == 0
    )
    found, expected = figures(out), figures(served)
    for name, figure in expected["figures"].items():
        assert found["figures"][name] == pytest.approx(figure), name
    assert found["candidate"]["arguments"] == {"enforce_eager": True, "seed": 100}
    assert found["candidate"]["quantization"] == "nvfp4_4over6"
    assert ScoresFile(kept).documents == ScoresFile(reference).documents
    said = capfd.readouterr()
    assert "an engine's log" in said.err
    assert "an engine's log" not in said.out


@pytest.mark.usefixtures("_fake_vllm")
def test_a_checkpoint_that_does_not_load_is_named(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ["--engine-args", '{"enforce_eager": true, "seed": 0}']
    assert run("--reference", reference, "--candidate", "absent", *engine) == 1
    assert "vLLM could not score absent: OSError: no such model" in capsys.readouterr().err


@pytest.mark.usefixtures("_fake_vllm")
def test_a_token_that_vllm_gives_twice_counts_once(tmp_path: Path) -> None:
    wanted = request(Text("", " ".join("a" * (i % 9) for i in range(60))), top=20)
    divergence_sources._score_in_process(
        "model", {"seed": 3, "enforce_eager": True}, wanted, tmp_path / "a.safetensors"
    )
    ids, logprobs, _ = ScoresFile(tmp_path / "a.safetensors").scores(0)
    assert ids is not None
    given = [[id for id in row if id >= 0] for row in ids.tolist()]
    assert all(len(row) == len({*row}) for row in given)
    assert {len(row) for row in given} == {20, 21}, "both cases occur"
    assert (logprobs.exp().sum(1) <= 1 + 1e-5).all()


@pytest.mark.usefixtures("_fake_vllm")
def test_whole_distributions_of_a_checkpoint(tmp_path: Path) -> None:
    wanted = request(Text("", "a bb ccc dddd"), Text("bb a", "ccc"), top=None)
    divergence_sources._score_in_process(
        "model", {"seed": 3, "enforce_eager": True}, wanted, tmp_path / "a.safetensors"
    )
    file = ScoresFile(tmp_path / "a.safetensors")
    assert file.documents == [Document((0, 1, 2, 3, 4), 1), Document((0, 2, 1, 3), 3)]
    for index, document in enumerate(file.documents):
        found = file.scores(index)
        expected = torch.stack(
            [predicted([*document.tokens], 3, p) for p in range(document.start, len(document.tokens))]
        )
        assert found.ids is None
        assert torch.equal(found.logprobs, expected.float())
        assert torch.equal(found.target, expected.float()[range(len(expected)), document.tokens[document.start :]])
