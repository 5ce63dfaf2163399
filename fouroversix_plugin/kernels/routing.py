"""Rows of a mixture of experts, sorted by expert on the device: what grouped products begin with.

Plain torch operations on shapes that follow from the arguments' shapes. Nothing is read on the host, so a CUDA graph
captures them, and the same ids give the same order in every run: the sort is stable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sort_by_expert(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The slots of ``topk_ids``, expert by expert; those of one expert keep their order.

    Args:
        topk_ids: [M, top_k], of any integer type. Ids outside 0..experts - 1 are nobody's.
        experts: E, how many experts there are here.

    Returns:
        (slots int32 [M * top_k], offsets int32 [E + 1]). Slot s is token s // top_k's choice s % top_k; expert e has
        slots[offsets[e] : offsets[e + 1]]. Nobody's slots come after offsets[E].
    """
    ids = topk_ids.flatten()
    if ids.dtype not in (torch.int32, torch.int64):
        ids = ids.int()  # which has room for one more than the last expert
    # Nobody's ids become the one after the last expert's, in a type of as few bits to sort by as will do.
    key_type = torch.int16 if experts < 2**15 else torch.int32
    key = torch.where(ids >= 0, ids, experts).clamp(max=experts).to(key_type)
    ascending, slots = key.sort(stable=True)
    every_expert = torch.arange(experts + 1, dtype=key_type, device=ids.device)
    return slots.int(), torch.searchsorted(ascending, every_expert, out_int32=True)


def most_tiles(slots: int, experts: int, tile: int) -> int:
    """The most tiles of ``tile`` slots that any routing of so many slots fills, each with slots of one expert only."""
    return (slots + min(slots, experts) * (tile - 1)) // tile
