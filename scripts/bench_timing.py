"""Time GPU calls: replays of CUDA graphs between events, medians."""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

COPY_BYTES = 2 << 30


def graph_seconds(calls: Sequence[Callable[[], object]], replays: int, evict: Tensor | None = None) -> float:
    """Median seconds of one of the ``calls``: a graph holds all, in order. ``evict`` is read before each replay.

    Inputs stay cold if the calls together go through several times the L2: the last replay then drove out the first.
    """
    # What a first call sets up (code, handles, workspaces) cannot be captured.
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()

    def replay() -> float:
        if evict is not None:
            evict.max()
        return event_seconds(graph.replay)

    return float(statistics.median(replay() for _ in range(replays))) / len(calls)


def event_seconds(call: Callable[[], object]) -> float:
    """Seconds between an event before the call and one behind it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def copy_bandwidth(replays: int) -> float:
    """Bytes read and written a second by a large copy. Not from a graph, where another engine makes it, and slower."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = statistics.median(event_seconds(lambda: target.copy_(source)) for _ in range(replays))
    return 2 * COPY_BYTES / seconds
