"""System load during a measurement: other processes' share of CPU time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from polyhead.errors import PolyheadError

__all__ = [
    "MOST_BY_OTHERS",
    "CpuTimes",
    "DisturbedError",
    "check_quiet",
    "others_share",
    "quietly",
    "read_cpu_times",
]

MOST_BY_OTHERS = 0.05
_WAITS = (0.0, 5.0, 20.0)
_SAMPLES = (0.5, 1.5)

T = TypeVar("T")


class DisturbedError(PolyheadError):
    """Other processes took too much CPU time for a meaningful measurement."""


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds so far, summed over all processors: busy, total, and of this process."""

    busy: float
    total: float
    own: float


def read_cpu_times(stat: Path = Path("/proc/stat")) -> CpuTimes | None:
    """Read Linux' counters since boot, or None on another system."""
    try:
        first = stat.read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal; guests are in user already.
    ticks = [int(number) for number in first.split()[1:9]]
    idle = ticks[3] + ticks[4]
    hertz = os.sysconf("SC_CLK_TCK")
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return CpuTimes((sum(ticks) - idle) / hertz, sum(ticks) / hertz, own)


def others_share(before: CpuTimes, after: CpuTimes) -> float:
    """Return the fraction of all CPU time used by other processes, from 0 to 1.

    >>> others_share(CpuTimes(10, 100, 5), CpuTimes(14, 110, 8))   # 4 of 10 busy, 3 of them ours
    0.1
    """
    total = after.total - before.total
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / total) if total > 0 else 0.0


def check_quiet(
    read: Callable[[], CpuTimes | None] = read_cpu_times,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Raise if other processes are busy, in two samples: before minutes of measuring in vain.

    Raises:
        DisturbedError: they took more than 5 % of CPU time in both samples.
    """
    shares = []
    for seconds in _SAMPLES:
        before = read()
        sleep(seconds)
        after = read()
        if before is None or after is None:
            return
        shares.append(others_share(before, after))
        if shares[-1] <= MOST_BY_OTHERS:
            return
    raise _disturbed(shares)


def quietly(
    measure: Callable[[], T],
    *,
    anyway: bool = False,
    read: Callable[[], CpuTimes | None] = read_cpu_times,
    sleep: Callable[[float], None] = time.sleep,
    waits: tuple[float, ...] = _WAITS,
) -> tuple[T, float | None]:
    """Measure, and repeat after a wait if other processes were busy meanwhile.

    Args:
        measure: the function to call.
        anyway: keep the first measurement regardless of other processes.
        read: returns the CPU times, or None where these are not known.
        sleep: waits for some seconds.
        waits: seconds before each attempt.

    Returns:
        The result of `measure`, and other processes' share of CPU time (None: not known).

    Raises:
        DisturbedError: other processes took more than 5 % of CPU time in every attempt.
    """
    shares = []
    for wait in waits:
        if wait:
            sleep(wait)
        before = read()
        result = measure()
        after = read()
        if before is None or after is None:
            return result, None
        share = others_share(before, after)
        if anyway or share <= MOST_BY_OTHERS:
            return result, share
        shares.append(share)
    raise _disturbed(shares)


def _disturbed(shares: list[float]) -> DisturbedError:
    listed = ", ".join(f"{share:.0%}" for share in shares)
    return DisturbedError(
        f"other processes must take at most {MOST_BY_OTHERS:.0%} of the processors while polyhead "
        f"measures; got {listed} in {len(shares)} tries; stop them and run again, or pass --anyway "
        "for numbers that are marked as disturbed"
    )
