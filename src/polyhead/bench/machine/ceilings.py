"""Machine ceilings (roofline): peak FLOP/s and read bandwidth, measured in the same run.

A ceiling is the best of several simple loops, each at its own best; `source` names the best one.
For arithmetic these are multiply-adds in registers, which no kernel can beat, and torch's product
of large matrices, which may use units that our loop does not; for memory, one long read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from polyhead.backends.cpu import ops
from polyhead.bench.machine.measure import Clock

__all__ = ["Ceiling", "Loop", "ceiling_loops", "measure_ceilings"]

_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class Loop:
    """A loop of one kind of work: `work` operations, or bytes read, per call."""

    source: str
    work: float
    call: Callable[[], object]


@dataclass(frozen=True)
class Ceiling:
    """Highest measured rate: GFLOP/s, or GB/s read."""

    name: str
    giga_per_second: float
    unit: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} {self.giga_per_second:.0f} {self.unit} ({self.source})"


def ceiling_loops(
    features: Collection[str], size: int = 2048, megabytes: int = 512, steps: int = 500_000
) -> dict[str, tuple[Loop, ...]]:
    """Return the loops of each ceiling.

    Args:
        features: the processor's, in Linux' names. Without bfloat16 products it widens values to
            float32: that ceiling applies, and torch's own product could take half a minute.
        size: rows and columns of the matrices.
        megabytes: mebibytes to read.
        steps: steps of each loop of multiply-adds.
    """
    single, half = torch.ones(size, size), torch.ones(size, size, dtype=torch.bfloat16)
    long = torch.ones(megabytes * 2**20 // 4)
    flops = 2.0 * size**3
    in_half = Loop("bfloat16 matmul", flops, lambda: half @ half)
    in_single = Loop("float32 matmul", flops, lambda: single @ single)
    single_loops = (in_single, *_register_loops(pairs=False, steps=steps))
    half_loops = (in_half, in_single, *_register_loops(pairs=True, steps=steps))
    return {
        "float32": single_loops,
        "bfloat16": half_loops if _BFLOAT16.intersection(features) else single_loops,
        "read": (
            Loop("sum", float(long.nbytes), lambda: long.sum()),
            Loop("dot", float(long.nbytes), lambda: torch.dot(long, long)),
        ),
    }


def _register_loops(*, pairs: bool, steps: int) -> tuple[Loop, ...]:
    if ops.unavailable:
        return ()
    work = steps * ops.multiply_add(pairs, 1)
    return (Loop("registers", work, lambda: ops.multiply_add(pairs, steps)),)


def measure_ceilings(
    loops: dict[str, tuple[Loop, ...]],
    seconds: float = 1.0,
    clock: Clock = time.perf_counter,
) -> dict[str, Ceiling]:
    """Measure the best of each ceiling's loops, each repeated for `seconds`.

    >>> loop = Loop("nothing", 1e9, lambda: None)
    >>> measure_ceilings({"read": (loop,)}, 0.0)["read"].source
    'nothing'
    """
    ceilings = {}
    for name, candidates in loops.items():
        rates = [
            (loop.work / _least(loop.call, seconds, clock), loop.source) for loop in candidates
        ]
        best, source = max(rates)
        unit = "GB/s" if name == "read" else "GFLOP/s"
        ceilings[name] = Ceiling(name, best / 1e9, unit, source)
    return ceilings


def _least(call: Callable[[], object], seconds: float, clock: Clock) -> float:
    """Shortest time of a call, so that other processes do not lower the ceiling."""
    call()
    start, least = clock(), float("inf")
    while least == float("inf") or clock() - start < seconds:
        before = clock()
        call()
        least = min(least, clock() - before)
    return max(least, 1e-12)
