"""What this machine can do at most, measured in the same run: every share is a share of these.

A ceiling is the best of several plain loops, each at its own best; `source` names which one. For
arithmetic these are multiply-adds of numbers in registers, which no kernel can beat, and torch's
product of large matrices, which may know units that our loop does not; for memory, one long read.
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
    """A loop of one kind of work: so many operations, or bytes read, a call."""

    source: str
    work: float
    call: Callable[[], object]


@dataclass(frozen=True)
class Ceiling:
    """The most that was reached: GFLOP/s, or GB/s read."""

    name: str
    giga_per_second: float
    unit: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} {self.giga_per_second:.0f} {self.unit} ({self.source})"


def ceiling_loops(
    features: Collection[str], size: int = 2048, megabytes: int = 512, steps: int = 500_000
) -> dict[str, tuple[Loop, ...]]:
    """The loops of each ceiling.

    Args:
        features: the processor's, as Linux names them. Without products of bfloat16 it widens the
            numbers: float32 bounds it, and torch's own product could take half a minute.
        size: rows and columns of the matrices.
        megabytes: how much is read.
        steps: of each loop of multiply-adds.
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
    """The best of each ceiling's loops, each repeated for `seconds`.

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
    """The shortest time of a call: what others did meanwhile is no limit of the machine."""
    call()
    start, least = clock(), float("inf")
    while least == float("inf") or clock() - start < seconds:
        before = clock()
        call()
        least = min(least, clock() - before)
    return max(least, 1e-12)
