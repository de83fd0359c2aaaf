"""Fair timing: variants run round-robin, medians are reported with quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

from polyhead.errors import ArgumentError

__all__ = ["LEAST_ROUNDS", "Timing", "interleave"]

LEAST_ROUNDS = 5
# Minimum length of a sample, so that clock resolution and single interruptions do not matter.
_SAMPLE_SECONDS = 0.01
_MOST_REPEATS = 10_000

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the samples.

        >>> Timing((1.0, 2.0, 3.0, 4.0, 50.0)).quartiles
        (2.0, 4.0)
        """
        lower, _, upper = statistics.quantiles(self.samples, n=4, method="inclusive")
        return lower, upper


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    seconds: float,
    clock: Clock = time.perf_counter,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Timing]:
    """Time calls round-robin: each round takes one sample per call, in rotated order.

    So a busy moment affects all calls. Short calls are repeated within a sample, after a warm-up
    call.

    Args:
        calls: the calls to time, by name.
        rounds: the minimum number of rounds, at least 5.
        seconds: the minimum total time.
        clock: returns seconds.
        progress: called after each round with the fraction done.

    Raises:
        ArgumentError: fewer than 5 rounds.

    >>> timings = interleave({"nothing": lambda: None}, rounds=5, seconds=0.0)
    >>> len(timings["nothing"].samples)
    5
    """
    if rounds < LEAST_ROUNDS:
        raise ArgumentError(
            "rounds", f"must be at least {LEAST_ROUNDS}", rounds, "measure more rounds"
        )
    repeats = {name: _repeats(call, clock) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    start, done = clock(), 0
    while names and (done < rounds or clock() - start < seconds):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_sample(calls[name], repeats[name], clock))
        done += 1
        progress(min(done / rounds, (clock() - start) / seconds if seconds else 1.0, 1.0))
    return {name: Timing(tuple(measured)) for name, measured in samples.items()}


def _repeats(call: Call, clock: Clock) -> int:
    """Number of calls per sample. The first call, which may do one-time setup, is not timed."""
    call()
    once = _sample(call, 1, clock)
    return max(1, min(ceil(_SAMPLE_SECONDS / max(once, 1e-9)), _MOST_REPEATS))


def _sample(call: Call, repeats: int, clock: Clock) -> float:
    if repeats > 1:
        call()
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats
