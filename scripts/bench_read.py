"""The plainest kernel that reads: what a weight's bytes take to arrive, whatever is then done with them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""32-bit words of a program's step: four 16-byte loads in flight in each of 256 threads."""
PROGRAMS_PER_SM = 4


@triton.jit
def _sum(words, sums, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        total += tl.load(words + offsets, mask=offsets < count, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(total))


def read(words: Tensor) -> Tensor:
    """int32 [programs]: sums of ``words`` (int32), one a program. Their total is that of all words, modulo 2**32."""
    programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(words.device).multi_processor_count
    sums = words.new_empty(programs)
    _sum[(programs,)](words, sums, words.numel(), BLOCK, num_warps=8)
    return sums
