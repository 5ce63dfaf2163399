"""Next-token log-probabilities of documents, as a safetensors file: scored once, compared as often as one likes."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gsm8k_data import InputError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "1"
# Scores are gathered in memory before they are written; the rest is for the engine.
SHARE_OF_MEMORY = 0.4


class Document(NamedTuple):
    tokens: tuple[int, ...]
    start: int
    """The first token that is predicted and scored, at least 1; those before it are context."""


class Scores(NamedTuple):
    """What a model predicts at every scored position of a document: P of them, natural logarithms, fp32."""

    ids: Tensor | None
    """int32 [P, K], -1 for an empty place; None where column i of the log-probabilities is token i."""
    logprobs: Tensor
    """[P, K], -inf in empty places."""
    target: Tensor
    """[P], of the token that follows in the document."""


def make_scores(rows: Sequence[tuple[Sequence[int], Sequence[float]]], targets: Sequence[int]) -> Scores:
    """From tokens and their log-probabilities, a pair a position, and the tokens that follow, which must be among them.

    Places differ in number where an engine gives the following token besides the most likely ones.
    """
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), -1, dtype=torch.int32)
    logprobs = torch.full((len(rows), width), -torch.inf)
    for i, (row_ids, row_logprobs) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.tensor(row_ids, dtype=torch.int32)
        logprobs[i, : len(row_ids)] = torch.tensor(row_logprobs, dtype=torch.float32)
    found = ids == torch.tensor(targets, dtype=torch.int32).unsqueeze(1)
    if not found.any(1).all():
        place = int((~found.any(1)).nonzero()[0])
        raise InputError(
            f"scored position {place}: no log-probability for the token {targets[place]} that stands there"
        )
    return Scores(ids, logprobs, logprobs.gather(1, found.int().argmax(1, keepdim=True)).squeeze(1))


def make_full_scores(logprobs: Tensor, targets: Sequence[int]) -> Scores:
    """From log-probabilities of the whole vocabulary, [P, V]."""
    return Scores(None, logprobs, logprobs.gather(1, torch.tensor(targets).unsqueeze(1)).squeeze(1))


def digest(documents: Sequence[Document]) -> str:
    """SHA-256 of the token sequences and of where each is scored."""
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()


class Writer:
    """Gathers the scores of documents, in any order, and writes them as one file."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self._tensors: dict[str, Tensor] = {}

    def add(self, index: int, scores: Scores) -> None:
        if not self._tensors:
            self._check_memory(scores)
        if scores.logprobs.isnan().any():
            place = int(scores.logprobs.isnan().any(1).nonzero()[0])
            raise InputError(
                f"document {index}, scored position {place}: NaN log-probabilities; the model computes NaN"
            )
        if scores.ids is not None:
            self._tensors[f"{index}.ids"] = scores.ids
        self._tensors[f"{index}.logprobs"] = scores.logprobs
        self._tensors[f"{index}.target"] = scores.target

    def write(self, path: Path, about: dict[str, Any]) -> None:
        """``about``: what was scored and how, as JSON."""
        tokens = {f"{i}.tokens": torch.tensor(d.tokens, dtype=torch.int32) for i, d in enumerate(self._documents)}
        starts = torch.tensor([document.start for document in self._documents], dtype=torch.int32)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        metadata = {"divergence_scores": FORMAT, "about": json.dumps(about)}
        partial.touch()
        mode = partial.stat().st_mode  # as the umask says; the library makes files that only their owner can read
        save_file({**self._tensors, **tokens, "starts": starts}, partial, metadata)
        partial.chmod(mode)
        partial.replace(path)

    def _check_memory(self, scores: Scores) -> None:
        positions = sum(len(document.tokens) - document.start for document in self._documents)
        width = scores.logprobs.shape[1]
        needed = positions * width * (4 if scores.ids is None else 8)
        available = int(SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        if needed > available:
            raise InputError(
                f"{positions} positions with {width} log-probabilities each need {needed / 2**30:.1f} GiB, of which "
                f"this machine has {available / 2**30:.1f} to spare; lower --documents or --top"
            )


class ScoresFile:
    """A file of scores, read a document at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
            if metadata.get("divergence_scores") != FORMAT:
                raise InputError(
                    f"{path} is no file of scores of format {FORMAT}; divergence.py --save-reference writes one"
                )
            self.about: dict[str, Any] = json.loads(metadata["about"])
            starts = self._file.get_tensor("starts").tolist()
            self.documents = [
                Document(tuple(self._file.get_tensor(f"{i}.tokens").tolist()), start) for i, start in enumerate(starts)
            ]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read as scores: {error}") from error
        self._names = frozenset(self._file.keys())

    def scores(self, index: int) -> Scores:
        ids = f"{index}.ids"
        return Scores(
            self._file.get_tensor(ids) if ids in self._names else None,
            self._file.get_tensor(f"{index}.logprobs"),
            self._file.get_tensor(f"{index}.target"),
        )
