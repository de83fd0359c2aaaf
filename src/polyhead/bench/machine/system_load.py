"""Whether the machine was ours while we measured: others' share of its processors' time."""

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
    "others_share",
    "quietly",
    "read_cpu_times",
]

MOST_BY_OTHERS = 0.05
_WAITS = (0.0, 5.0, 20.0)

T = TypeVar("T")


class DisturbedError(PolyheadError):
    """Other processes took too much of the processors for a measurement to mean anything."""


@dataclass(frozen=True)
class CpuTimes:
    """Seconds so far, of all processors together: busy, in all, and busy with this process."""

    busy: float
    total: float
    own: float


def read_cpu_times(stat: Path = Path("/proc/stat")) -> CpuTimes | None:
    """What Linux has counted since it started, or None on another system."""
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
    """The share of all processors' time that went to other processes, from 0 to 1.

    >>> others_share(CpuTimes(10, 100, 5), CpuTimes(14, 110, 8))   # 4 of 10 busy, 3 of them ours
    0.1
    """
    total = after.total - before.total
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / total) if total > 0 else 0.0


def quietly(
    measure: Callable[[], T],
    *,
    anyway: bool = False,
    read: Callable[[], CpuTimes | None] = read_cpu_times,
    sleep: Callable[[float], None] = time.sleep,
    waits: tuple[float, ...] = _WAITS,
) -> tuple[T, float | None]:
    """Measure, and again after a wait if others were busy meanwhile.

    Args:
        measure: what to do.
        anyway: take the first measurement, whatever the others did.
        read: tells the processors' times; None where nobody does.
        sleep: waits.
        waits: seconds before each try.

    Returns:
        What `measure` returned, and the others' share of the processors (None: not known).

    Raises:
        DisturbedError: others took more than 5 % of the processors in every try.
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
    listed = ", ".join(f"{share:.0%}" for share in shares)
    raise DisturbedError(
        f"other processes must take at most {MOST_BY_OTHERS:.0%} of the processors while polyhead "
        f"measures; got {listed} in {len(shares)} tries; stop them and run again, or pass --anyway "
        "for numbers that are marked as disturbed"
    )
