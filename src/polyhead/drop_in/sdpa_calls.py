"""Record of calls of `scaled_dot_product_attention`: who computed each, and why."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, NamedTuple

__all__ = ["SdpaCalls", "SdpaEntry"]


class SdpaEntry(NamedTuple):
    """A kind of calls.

    Attributes:
        by: "polyhead" or "torch".
        why: for polyhead the mask, recognized or given; for torch the reason.
    """

    by: str
    why: str


class SdpaCalls:
    """Number of calls per `SdpaEntry`; printing it gives a table. Threads may share one.

    >>> calls = SdpaCalls()
    >>> calls.add("polyhead", "causal()")
    >>> calls.add("torch", "float64: polyhead's kernels run float32, bfloat16 and float16")
    >>> calls.polyhead, calls.torch
    (1, 1)
    >>> print(calls)
    2 calls of scaled_dot_product_attention: 1 by polyhead, 1 by torch
      polyhead  1  causal()
      torch     1  float64: polyhead's kernels run float32, bfloat16 and float16
    """

    def __init__(self) -> None:
        self._counts: Counter[SdpaEntry] = Counter()
        self._lock = threading.Lock()

    def add(self, by: str, why: str) -> None:
        """Count a call."""
        with self._lock:
            self._counts[SdpaEntry(by, why)] += 1

    @property
    def counts(self) -> dict[SdpaEntry, int]:
        """Number of calls by kind, polyhead's first, the most frequent first."""
        with self._lock:
            items = list(self._counts.items())
        return dict(sorted(items, key=lambda item: (item[0].by, -item[1])))

    @property
    def polyhead(self) -> int:
        """Number of calls that polyhead computed."""
        return sum(n for entry, n in self.counts.items() if entry.by == "polyhead")

    @property
    def torch(self) -> int:
        """Number of calls that torch computed."""
        return sum(n for entry, n in self.counts.items() if entry.by == "torch")

    def clear(self) -> None:
        """Forget all calls."""
        with self._lock:
            self._counts.clear()

    def __str__(self) -> str:
        counts = self.counts
        total = sum(counts.values())
        calls = "1 call" if total == 1 else f"{total} calls"
        head = f"{calls} of scaled_dot_product_attention"
        if not total:
            return head
        lines = [f"{head}: {self.polyhead} by polyhead, {self.torch} by torch"]
        width = len(str(max(counts.values())))
        lines += [f"  {entry.by:8}  {n:{width}}  {entry.why}" for entry, n in counts.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<SdpaCalls: {self.polyhead} by polyhead, {self.torch} by torch>"

    def __getstate__(self) -> dict[str, Any]:
        return {"_counts": Counter(self.counts)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._counts, self._lock = state["_counts"], threading.Lock()
