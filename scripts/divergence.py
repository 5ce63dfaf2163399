"""How far a quantized model's next-token distributions are from BF16's: KL divergence, top-1 agreement, perplexity.

python scripts/divergence.py --reference MODEL --save-reference bf16.safetensors --data test.jsonl --documents 200
python scripts/divergence.py --reference bf16.safetensors --candidate MODEL \\
  --candidate-args '{"quantization": "nvfp4_4over6"}' --out 4over6.json
python scripts/divergence.py --reference http://127.0.0.1:8000/v1 --candidate http://127.0.0.1:8001/v1 \\
  --data hub --out served.json
python scripts/divergence.py --compare nvfp4.json 4over6.json

A source is the URL of a server, vLLM's or SGLang's; or a checkpoint, which vLLM loads in a process of its own; or a
file of scores that --save-reference or --save-candidate wrote. Both sides score the same tokens, those of the
reference's tokenizer.

Text is GSM8K, whose solutions are scored with the question as context, or any text file, in windows. Positions of one
document are not independent, so the intervals come from resampling documents.

KL(reference || candidate), in nats, is over the whole vocabulary with --top all on both sides (the scores of 10000
positions and 49152 tokens have 2 GB). Otherwise it is over the tokens among the K most likely of both sides and one
bucket for all others: a lower bound, and the mass in the bucket is reported. vLLM's servers need --max-logprobs K.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import versions
from argument_types import json_object, output, positive, seconds
from divergence_scores import ScoresFile, digest
from divergence_sources import Request, Text, score_checkpoint, score_on_server
from divergence_statistics import (
    CONFIDENCE,
    RESAMPLES,
    Estimate,
    Positions,
    compare,
    document_sums,
    join,
    ratio,
    summarize,
)
from ending import Signals
from gsm8k_data import InputError, draw, is_on_hub, load_questions
from server_client import ServerError

FIGURES = {
    "mean_kl": "KL, mean (nats)",
    "kl_p50": "KL, median",
    "kl_p90": "KL, 90th percentile",
    "kl_p95": "KL, 95th percentile",
    "kl_p99": "KL, 99th percentile",
    "top1_agreement": "top-1 agreement",
    "reference_perplexity": "perplexity, reference",
    "candidate_perplexity": "perplexity, candidate",
    "perplexity_ratio": "perplexity, ratio",
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--reference", metavar="SOURCE", help="what to compare with, BF16: URL, checkpoint or file of scores"
    )
    what.add_argument("--compare", nargs="+", type=Path, metavar="JSON", help="results to compare, the baseline first")
    parser.add_argument(
        "--candidate", metavar="SOURCE", help="what to compare; without it only the reference is scored"
    )
    parser.add_argument("--engine-args", type=json_object, default={}, metavar="JSON", help="of vllm.LLM, for both")
    parser.add_argument("--reference-args", type=json_object, default={}, metavar="JSON", help="for the reference only")
    parser.add_argument("--candidate-args", type=json_object, default={}, metavar="JSON", help="for the candidate only")
    parser.add_argument("--save-reference", type=output, metavar="FILE.safetensors", help="keep the reference's scores")
    parser.add_argument("--save-candidate", type=output, metavar="FILE.safetensors", help="keep the candidate's scores")
    parser.add_argument(
        "--data", metavar="FILE|hub", help="JSONL of question and answer, the hub's GSM8K, or a text file"
    )
    parser.add_argument("--documents", type=positive, metavar="N", help="a sample of so many, drawn with --seed (all)")
    parser.add_argument(
        "--window", type=positive, default=512, metavar="N", help="tokens a document, for text files (512)"
    )
    parser.add_argument("--top", type=top, default=100, metavar="K|all", help="log-probabilities a position (100)")
    parser.add_argument(
        "--parallel", type=positive, default=16, metavar="N", help="requests at a time to a server (16)"
    )
    parser.add_argument("--timeout", type=seconds, default=600, metavar="SECONDS", help="of one request (600)")
    parser.add_argument("--retries", type=positive, default=6, metavar="N", help="of one request, with back-off (6)")
    parser.add_argument("--model", help="which model, where a server has several")
    parser.add_argument("--seed", type=int, default=0, help="draws the documents and the bootstrap (0)")
    parser.add_argument("--out", type=output, metavar="FILE.json", help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.compare is not None and len(options.compare) < 2:
        parser.error("--compare needs two results or more")
    if options.reference is not None and is_scores(options.reference) == (options.data is not None):
        parser.error("--data names the text to score; with a file of scores as reference it is in that file already")
    if options.reference is not None and is_scores(options.reference) and options.documents is not None:
        parser.error("--documents: a file of scores as reference is compared whole")
    if options.candidate is None and options.reference is not None and options.save_reference is None:
        parser.error("--reference needs --candidate, or --save-reference to only score it")
    return options


def top(text: str) -> int | None:
    return None if text == "all" else positive(text)


def is_scores(source: str) -> bool:
    return source.endswith(".safetensors")


def is_server(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def load_texts(source: str, count: int | None, seed: int) -> list[Text]:
    """GSM8K's solutions, or the whole of a text file."""
    if is_on_hub(source) or source.endswith((".jsonl", ".json")):
        questions = draw(load_questions(source, "test"), count, seed)
        return [Text(f"Question: {question.text}\nAnswer:", f" {question.solution}") for question in questions]
    try:
        return [Text("", Path(source).read_text(encoding="utf-8"))]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data {source} cannot be read ({error}); needs a JSONL or text file") from error


def score(
    source: str, options: argparse.Namespace, engine_args: dict[str, Any], request: Request, path: Path
) -> ScoresFile:
    """The source's scores of what is requested; those of a server or a checkpoint are written to ``path``."""
    if is_scores(source):
        return ScoresFile(Path(source))
    if is_server(source):
        limits = {"parallel": options.parallel, "timeout": options.timeout, "retries": options.retries}
        asyncio.run(score_on_server(source, request, path, model=options.model, **limits))
    else:
        score_checkpoint(source, {**options.engine_args, **engine_args}, request, path)
    return ScoresFile(path)


def measure(options: argparse.Namespace) -> None:
    """Score what is not scored yet, compare, print the figures, and write them."""
    with tempfile.TemporaryDirectory() as folder:
        texts = load_texts(options.data, options.documents, options.seed) if options.data else []
        request = Request(tuple(texts), (), options.top, options.window, options.documents, options.seed)
        path = options.save_reference or Path(folder) / "reference.safetensors"
        reference = score(options.reference, options, options.reference_args, request, path)
        if options.candidate is None:
            sides = [compare(scores := reference.scores(i), scores, i) for i in range(len(reference.documents))]
            perplexity = summarize(join(sides), options.seed)["reference_perplexity"]
            print(f"{len(sides)} documents scored into {path}\n{line('reference_perplexity', perplexity)}")
            return
        request = request._replace(texts=(), documents=tuple(reference.documents))
        path = options.save_candidate or Path(folder) / "candidate.safetensors"
        candidate = score(options.candidate, options, options.candidate_args, request, path)
        if candidate.documents != reference.documents:
            raise InputError(
                f"{reference.path} and {candidate.path} hold scores of other documents; score the candidate with this "
                "reference, and it gets the same tokens"
            )
        count = len(reference.documents)
        positions = join(compare(reference.scores(i), candidate.scores(i), i) for i in range(count))
    result = build_result(reference, candidate, positions, options.seed)
    print(report(result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def build_result(reference: ScoresFile, candidate: ScoresFile, positions: Positions, seed: int) -> dict[str, Any]:
    figures = summarize(positions, seed)
    return {
        "reference": reference.about,
        "candidate": candidate.about,
        "versions": versions.installed(),
        "documents_sha256": digest(reference.documents),
        "documents": len(reference.documents),
        "positions": len(positions.kl),
        "mass_outside": float(positions.outside.mean()),
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": seed,
        "figures": {name: figure._asdict() for name, figure in figures.items()},
        "by_document": {name: values.tolist() for name, values in document_sums(positions).items()},
    }


def name(about: dict[str, Any]) -> str:
    details = [about[key] for key in ("engine", "version", "quantization") if about.get(key)]
    return f"{about['source']} ({', '.join(details)})"


def line(figure: str, estimate: Estimate) -> str:
    value, low, high = (f"{number:.5g}" for number in estimate)
    return f"{FIGURES[figure]:24}{value:>12}   {low} to {high}"


def report(result: dict[str, Any]) -> str:
    tops = [result[side]["top"] for side in ("reference", "candidate")]
    known = "the whole vocabulary"
    if tops != [None, None]:
        least = min(top for top in tops if top is not None)
        known = f"the {least} most likely tokens and one bucket of the others, a lower bound"
    return "\n".join(
        [
            f"reference: {name(result['reference'])}",
            f"candidate: {name(result['candidate'])}",
            f"{result['positions']} positions in {result['documents']} documents; KL over {known}; "
            f"outside {result['mass_outside']:.2g} of the mass",
            "",
            f"{'':24}{'':12}   95 % interval over documents",
            *(line(figure, Estimate(**estimate)) for figure, estimate in result["figures"].items()),
        ]
    )


def compare_results(paths: list[Path], out: Path | None, seed: int) -> None:
    """Each result's mean KL over the first's, with the documents resampled in pairs."""
    baseline, *others = [read_result(path) for path in paths]
    found = []
    for path, other in zip(paths[1:], others, strict=True):
        for key, what in (("documents_sha256", "documents"), ("tops", "numbers of log-probabilities")):
            if baseline[key] != other[key]:
                raise InputError(f"{paths[0]} and {path} cannot be compared: they are of other {what}")
        ours, theirs = baseline["by_document"], other["by_document"]
        times = ratio(theirs["kl"], ours["kl"], seed)
        found.append({"result": str(path), "baseline": str(paths[0]), "kl_ratio": times._asdict()})
        print(
            f"{path.stem} against {paths[0].stem}: mean KL {times.value:.4f} times as large "
            f"(95 % interval {times.low:.4f} to {times.high:.4f}, {len(ours['kl'])} documents)"
        )
    if out is not None:
        out.write_text(json.dumps({"confidence": CONFIDENCE, "resamples": RESAMPLES, "pairs": found}, indent=2) + "\n")


def read_result(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tops = [found[side]["top"] for side in ("reference", "candidate")]
        return {"documents_sha256": found["documents_sha256"], "tops": tops, "by_document": found["by_document"]}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); needs what divergence.py --out wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not what divergence.py --out writes ({type(error).__name__}: {error})") from error


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.compare:
            compare_results(options.compare, options.out, options.seed)
        else:
            measure(options)
    except (InputError, ServerError, OSError) as error:
        print(f"divergence: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    Signals()  # an engine that was started ends, too
    sys.exit(main())
