"""Whether a row's result may depend on how many other rows a call has.

On GPUs the number of rows decides how thread blocks share a sum over K, and with it the order of fp32 additions. Where
results have to be batch-invariant there is one order for all numbers, which for some takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_in_this_process = False
_in_this_context: ContextVar[bool | None] = ContextVar("_in_this_context", default=None)


def is_batch_invariant() -> bool:
    """Whether the products that this thread launches now have to be."""
    here = _in_this_context.get()
    return _in_this_process if here is None else here


def set_batch_invariant(on: bool) -> None:
    """From now on, in every thread of this process, but not within :func:`batch_invariant`.

    A CUDA graph keeps what held when it was captured, and a weight the products that were chosen when it was prepared.
    """
    global _in_this_process
    _in_this_process = on


@contextmanager
def batch_invariant(on: bool) -> Iterator[None]:
    """Within it, no row's result of this thread depends on how many other rows a call has (or may again)."""
    before = _in_this_context.set(on)
    try:
        yield
    finally:
        _in_this_context.reset(before)
