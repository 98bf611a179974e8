"""Timing: the implementations of one case take turns in one process, so what slows the machine slows all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch

TURN = 0.03  # seconds that an implementation is timed before the next has its turn, and at least three rounds
GPU_ROUND = 0.002  # seconds of a round on a GPU: two synchronisations vanish in it
WARMUPS = 3
UNCAPTURABLE = "released"  # the released code asks the GPU for NaNs on the way


@dataclass(frozen=True)
class Case:
    """What is timed: an operator, or a training step, on one kind of input."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    direction: str
    device: str

    def __str__(self) -> str:
        return f"{self.op}-{'x'.join(map(str, self.shape))}-{self.dtype}-{self.direction}-{self.device}"


@dataclass
class Implementation:
    call: Callable  # of one set of inputs
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass
class Result:
    """Seconds a call, by round; on a GPU the seconds in a CUDA graph and the bytes allocated at the peak too."""

    rounds: list[float] = field(default_factory=list)
    graph_rounds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: Exception | None = None

    @property
    def graph(self) -> float | None:
        return median(self.graph_rounds) if self.graph_rounds else None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def wall(run: Callable, repeats: int, device: str) -> float:
    """Seconds of one `run`, of several back to back."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def capture(run: Callable) -> tuple[torch.cuda.CUDAGraph, object]:
    """The CUDA graph of `run`, and what it returned, to be kept alive."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


def peak_bytes(run: Callable) -> int:
    """Bytes allocated at the peak of one call, above those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_gb_s(device: str) -> float:
    """Bytes read and written by a copy of 256 MiB, or 2 GiB on a GPU, in GB/s."""
    source = torch.ones(2**29 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    seconds = min(wall(lambda: target.copy_(source), 3, device) for _ in range(5))
    return 2 * source.nbytes / seconds / 1e9


def measure(implementations: dict[str, Implementation], sets: list, device: str, seconds: float) -> dict[str, Result]:
    """Times every implementation, in turns, for `seconds` of all together.

    A run calls an implementation once on each of `sets` and holds all results: on a GPU, inputs and results of one call
    do not lie in L2 at the next.
    """
    torch.compiler.reset()
    results = {name: Result() for name in implementations}
    turns = {}
    for name, one in implementations.items():
        try:
            turns[name] = list(_turns(name, one, sets, device, results[name]))
        except Exception as error:  # of this implementation alone: its own test raises it
            results[name].error = error
    end = time.perf_counter() + seconds
    while turns and (time.perf_counter() < end or min(len(results[name].rounds) for name in turns) < 9):
        for name in turns:
            for turn in turns[name]:
                turn()
    return results


def _turns(name: str, one: Implementation, sets: list, device: str, result: Result):
    """Warms an implementation up and yields what it does in its turn: by wall clock and, on a GPU, as a CUDA graph."""

    def run():
        return [one.call(inputs) for inputs in sets]

    with one.context():
        for _ in range(WARMUPS):
            run()
        repeats = 1 if device == "cpu" else math.ceil(GPU_ROUND / wall(run, 3, device))
    if device == "cuda":
        with one.context():
            result.peak_bytes = peak_bytes(lambda: one.call(sets[0]))
    yield lambda: _turn(run, one.context, repeats, device, len(sets), result.rounds)
    if device == "cuda" and UNCAPTURABLE not in name and _fits(result.peak_bytes * len(sets)):
        with one.context():
            graph, outputs = capture(run)
        replays = math.ceil(GPU_ROUND / wall(graph.replay, 3, device))

        def replay(_outputs=outputs):
            graph.replay()

        yield lambda: _turn(replay, nullcontext, replays, device, len(sets), result.graph_rounds)


def _fits(size: int) -> bool:
    """Whether a graph's own memory surely suffices: a capture that fails leaves no generator that works."""
    torch.cuda.empty_cache()
    return size < torch.cuda.mem_get_info()[0] / 2


def _turn(run: Callable, context: Callable, repeats: int, device: str, calls: int, rounds: list[float]) -> None:
    with context():
        run()  # the caches are the previous implementation's
        spent, count = 0.0, 0
        while spent < TURN or count < 3:
            seconds = wall(run, repeats, device)
            rounds.append(seconds / calls)
            spent, count = spent + seconds * repeats, count + 1
