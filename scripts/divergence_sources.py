"""Where scores come from: a server that runs, or a checkpoint in vLLM in a process of its own."""

import multiprocessing
import os
import random
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from divergence_scores import Document, Scores, Writer, make_full_scores, make_scores
from gsm8k_data import InputError
from server_client import Client, ServerError, run_together
from server_process import GRACE_SECONDS
from tqdm import tqdm

# vLLM hands over log-probabilities as Python numbers: so many of them at a time, about 60 bytes each.
NUMBERS_AT_A_TIME = 4_000_000


class Text(NamedTuple):
    context: str
    """Read, not scored; empty where all of ``scored`` but its first token is scored."""
    scored: str


class Request(NamedTuple):
    """What to score: texts, which the source tokenizes, or documents that another source made of them."""

    texts: tuple[Text, ...]
    documents: tuple[Document, ...]
    top: int | None
    """How many log-probabilities a position; None for the whole vocabulary."""
    window: int
    """Tokens a document, of texts without context."""
    limit: int | None
    """A sample of so many documents, drawn with the seed; None for all."""
    seed: int


class Tokenize(Protocol):
    def __call__(self, text: str, *, special: bool) -> list[int]: ...


def make_documents(request: Request, tokenize: Tokenize) -> list[Document]:
    """A text with context is one document. One without is cut into windows."""
    documents = []
    for text in request.texts:
        if text.context:
            # Apart, as lm-eval does it, so that it is certain which tokens are the context's.
            context = tokenize(text.context, special=True)
            documents.append(Document((*context, *tokenize(text.scored, special=False)), max(1, len(context))))
        else:
            tokens = tokenize(text.scored, special=True)
            starts = range(0, len(tokens), request.window)
            documents += [Document(tuple(tokens[i : i + request.window]), 1) for i in starts]
    found = [document for document in documents if len(document.tokens) > document.start]
    count = len(found) if request.limit is None else request.limit
    if not 0 < count <= len(found):
        raise InputError(f"{max(count, 1)} documents wanted, and the text gives {len(found)} with a token to predict")
    return found if count == len(found) else random.Random(request.seed).sample(found, count)


def progress(total: int, what: str) -> Any:
    return tqdm(total=total, desc=what, unit="document", disable=not sys.stderr.isatty())


# --- servers ---------------------------------------------------------------------------------------------------------


async def score_on_server(
    url: str, request: Request, path: Path, *, model: str | None, parallel: int, timeout: float, retries: int
) -> None:
    """Score through vLLM's /v1/completions, or SGLang's /generate, and write the scores to ``path``."""
    async with Client(url, timeout=timeout, retries=retries) as client:
        facts = await client.describe(model)
        documents = list(request.documents) or await _documents_of_server(client, facts.model, request)
        writer = Writer(documents)
        score = _score_by_sglang if facts.engine == "sglang" else _score_by_vllm
        places = iter(range(len(documents)))

        async def work() -> None:
            for place in places:
                writer.add(place, await score(client, facts.model, documents[place], request.top))
                bar.update()

        with progress(len(documents), facts.model) as bar:
            await run_together(work() for _ in range(parallel))
        writer.write(path, {"source": client.base_url, "top": request.top, **facts._asdict()})


async def _documents_of_server(client: Client, model: str, request: Request) -> list[Document]:
    texts = {(part, special) for t in request.texts for part, special in ((t.context, True), (t.scored, not t.context))}
    tokens: dict[tuple[str, bool], list[int]] = {}
    for text, special in sorted(texts):
        reply = await client.post("/tokenize", {"model": model, "prompt": text, "add_special_tokens": special})
        tokens[text, special] = reply["tokens"]

    def look_up(text: str, *, special: bool) -> list[int]:
        return tokens[text, special]

    return make_documents(request, look_up)


async def _score_by_vllm(client: Client, model: str, document: Document, top: int | None) -> Scores:
    body = {"model": model, "prompt": document.tokens, "max_tokens": 1, "temperature": 0}
    reply = await client.post("completions", {**body, "prompt_logprobs": -1 if top is None else top})
    try:
        given = reply["choices"][0]["prompt_logprobs"][document.start :]
        rows = [([int(id) for id in row], [float(entry["logprob"]) for entry in row.values()]) for row in given]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(f"{client.base_url} answers without prompt_logprobs, which vLLM gives") from error
    return _checked(client, rows, document, top)


async def _score_by_sglang(client: Client, model: str, document: Document, top: int | None) -> Scores:
    if top is None:
        raise InputError("SGLang has no log-probabilities of the whole vocabulary; give --top a number")
    body = {
        "input_ids": document.tokens,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        # Its first entry, of a token that nothing precedes, is empty.
        "logprob_start_len": document.start - 1,
        "top_logprobs_num": top,
    }
    reply = await client.post("/generate", body)
    try:
        about = reply["meta_info"]
        rows = []
        for own, best in zip(about["input_token_logprobs"][1:], about["input_top_logprobs"][1:], strict=True):
            row = {int(id): float(logprob) for logprob, id, *_ in [*best, own]}
            rows.append((list(row), list(row.values())))
    except (LookupError, TypeError, ValueError) as error:
        raise ServerError(f"{client.base_url} answers without input_top_logprobs, which SGLang gives") from error
    return _checked(client, rows, document, top)


def _checked(client: Client, rows: list[tuple[list[int], list[float]]], document: Document, top: int | None) -> Scores:
    targets = document.tokens[document.start :]
    if len(rows) != len(targets):
        raise ServerError(f"{client.base_url} gave log-probabilities of {len(rows)} positions, needed {len(targets)}")
    if top is not None:
        return make_scores(rows, targets)
    full = torch.full((len(rows), len(rows[0][0])), torch.nan)
    for place, (ids, logprobs) in enumerate(rows):
        full[place, torch.tensor(ids)] = torch.tensor(logprobs)
    return make_full_scores(full, targets)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def score_checkpoint(model: str, arguments: dict[str, Any], request: Request, path: Path) -> None:
    """Score in vLLM, in a process that ends with it: two engines do not fit into one. Writes the scores to ``path``."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # Not a daemon, which could have no workers of its own.
    process = context.Process(target=_in_process, args=(theirs, model, arguments, request, path))
    process.start()
    theirs.close()
    try:
        problem = ours.recv()
    except EOFError:
        process.join()
        problem = f"its process ended with status {process.exitcode}"
    except BaseException:  # a signal, which may have reached only this process
        process.terminate()
        process.join(GRACE_SECONDS)
        process.kill()
        raise
    finally:
        process.join()
    if problem is not None:
        raise InputError(f"vLLM could not score {model}: {problem}")


def _in_process(connection: Connection, model: str, arguments: dict[str, Any], request: Request, path: Path) -> None:
    os.dup2(2, 1)  # vLLM logs to stdout, where the figures go.
    # Log-probabilities of every position are much to send between processes.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        _score_in_process(model, arguments, request, path)
    except Exception as error:  # Whatever an engine raises: it is told, as text, by the process that can tell it.
        connection.send(f"{type(error).__name__}: {error}")
        raise
    connection.send(None)


def _score_in_process(model: str, arguments: dict[str, Any], request: Request, path: Path) -> None:
    import vllm

    engine = vllm.LLM(model=model, **{"max_logprobs": -1 if request.top is None else request.top, **arguments})
    score_with_engine(engine, request, path, {"source": model, "arguments": arguments, "model": model})


def score_with_engine(engine: Any, request: Request, path: Path, about: dict[str, Any]) -> None:
    """Score in a vllm.LLM of this process; its ``max_logprobs`` must allow it. Writes the scores to ``path``."""
    import vllm
    from vllm.inputs import TokensPrompt

    wanted = -1 if request.top is None else request.top
    tokenizer: Any = None if request.documents else engine.get_tokenizer()

    def tokenize(text: str, *, special: bool) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=special))

    documents = list(request.documents) or make_documents(request, tokenize)
    writer = Writer(documents)
    config = engine.llm_engine.model_config
    params = vllm.SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=wanted, detokenize=False, flat_logprobs=True
    )
    with progress(len(documents), config.model) as bar:
        for batch in _batches(documents, request.top or config.get_vocab_size()):
            prompts = [TokensPrompt(prompt_token_ids=list(documents[place].tokens)) for place in batch]
            for place, output in zip(batch, engine.generate(prompts, params, use_tqdm=False), strict=True):
                writer.add(place, _scores_of_flat(output.prompt_logprobs, documents[place], request.top))
                bar.update()
    facts = {"engine": "vllm", "version": vllm.__version__, "quantization": config.quantization}
    writer.write(path, {**about, "top": request.top, **facts})


def _batches(documents: Sequence[Document], width: int) -> Iterator[list[int]]:
    """Places of documents, as many together as one engine call may return numbers for; at least one."""
    batch: list[int] = []
    numbers = 0
    for place, document in enumerate(documents):
        if batch and numbers + len(document.tokens) * width > NUMBERS_AT_A_TIME:
            yield batch
            batch, numbers = [], 0
        batch.append(place)
        numbers += len(document.tokens) * width
    if batch:
        yield batch


def _scores_of_flat(flat: Any, document: Document, top: int | None) -> Scores:
    """From vLLM's FlatLogprobs: at each position the token that stands there, then the most likely ones, it among them
    again where it is one.
    """
    rows, full = [], []
    targets = document.tokens[document.start :]
    for start, end in zip(flat.start_indices[document.start :], flat.end_indices[document.start :], strict=True):
        ids, logprobs = flat.token_ids[start:end], flat.logprobs[start:end]
        if top is None:
            full.append(torch.empty(end - start - 1).scatter_(0, torch.tensor(ids[1:]), torch.tensor(logprobs[1:])))
        elif ids[0] in ids[1:]:
            rows.append((ids[1:], logprobs[1:]))
        else:
            rows.append((ids, logprobs))
    return make_full_scores(torch.stack(full), targets) if top is None else make_scores(rows, targets)
