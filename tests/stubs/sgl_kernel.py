"""Stands in for SGLang's compiled kernels, of which no CPU build can be installed: what they do is said when called."""

from collections.abc import Callable
from typing import Any

import torch


def assign_req_to_token_pool_cpu(
    rows: torch.Tensor, table: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, slots: torch.Tensor, _: int
) -> None:
    """table[rows[i], starts[i]:ends[i]] = the next of slots: the one kernel without which nothing is served."""
    at = 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = slots[at : at + end - start].to(table.dtype)
        at += end - start


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*given: Any, **named: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build here")

    return absent
