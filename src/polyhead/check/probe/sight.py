"""Attention patterns for sequences of any length: windows, chunks, strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Pattern", "band", "fitting"]


@dataclass(frozen=True)
class Pattern:
    """Attention pattern, as a rule for masks of any length.

    Attributes:
        words: description of the rule.
        rule: (T, 1) query positions and (T,) key positions in; True = may attend.
        window: tokens that a query attends to, including itself, if the rule is a plain window.
        relative: True if the rule depends on distances only.
    """

    words: str
    rule: Callable[[Tensor, Tensor], Tensor]
    window: int | None = None
    relative: bool = True

    def shown(self, T: int) -> Tensor:
        places = torch.arange(T)
        return self.rule(places[:, None], places)


def band(T: int, causal: bool, window: int | None) -> Tensor:
    """(T, T) mask of these claims; True = may attend."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = torch.ones(T, T, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    return seen


def fitting(seen: Mapping[int, Tensor], causal: bool) -> Pattern | None:
    """Return the first rule that explains the observed masks of all lengths, if one masks anything.

    Args:
        seen: by the length T, (T, T) True where query t attends to token s.
        causal: rules also mask the future.
    """
    if all(torch.equal(sees, band(T, causal, None)) for T, sees in seen.items()):
        return None
    longest = max(seen)
    if int(seen[longest].sum(dim=1).max()) < 2:
        return None  # tokens attend to themselves only: no attention
    for pattern in _patterns(seen[longest], causal):
        if all(
            torch.equal(sees, pattern.shown(T) & band(T, causal, None)) for T, sees in seen.items()
        ):
            return pattern
    return None


def _patterns(sees: Tensor, causal: bool) -> Iterator[Pattern]:
    """Candidate rules, with parameters consistent with this matrix."""
    T = len(sees)
    # A window that masks a single pair is indistinguishable from a mistake.
    middle = sees[T // 2].nonzero().flatten()
    ahead = 0 if causal else int(middle.max()) - T // 2 if len(middle) else 0
    last = sees[-1].flip(0)
    back = int((~last).int().argmax()) - 1 if not last.all() else T - 1
    if 1 <= back < T - 2:
        window = back + 1 if causal or ahead == back else None
        words = f"{back} tokens back" + ("" if causal else f" and {ahead} ahead")
        yield Pattern(words, lambda t, s: (t - s <= back) & (s - t <= ahead), window)
    for size in range(2, T - 1):
        yield Pattern(
            f"chunks of {size} tokens",
            lambda t, s, n=size: t // n == s // n,  # type: ignore[misc]
            relative=False,
        )
        yield Pattern(
            f"chunks of {size} tokens and the chunk before",
            lambda t, s, n=size: (t // n - s // n).abs() <= 1,  # type: ignore[misc]
            relative=False,
        )
    for step in range(2, T // 2):
        apart = lambda t, s, n=step: (t - s) % n == 0  # noqa: E731
        yield Pattern(f"one token of {step}", apart)
        for near in range(step + 1, T - 1):
            yield Pattern(
                f"one token of {step}, within {near} tokens",
                lambda t, s, n=step, w=near: ((t - s) % n == 0) & ((t - s).abs() < w),  # type: ignore[misc]
            )
            yield Pattern(
                f"{near} tokens, and one of {step} before",
                lambda t, s, n=step, w=near: ((t - s).abs() < w) | ((t - s) % n == 0),  # type: ignore[misc]
            )
        yield Pattern(
            f"chunks of {step} tokens, and the last of each chunk before",
            lambda t, s, n=step: (t // n == s // n) | (s % n == n - 1),  # type: ignore[misc]
            relative=False,
        )
    for first in range(1, 5):
        for near in range(2, T - 1):
            yield Pattern(
                f"{near} tokens, and the first {first} of the sequence",
                lambda t, s, n=first, w=near: ((t - s).abs() < w) | (s < n),  # type: ignore[misc]
                relative=False,
            )
            yield Pattern(
                f"{near - 1} tokens on each side, the first {first} of the sequence, which "
                "attend to all",
                lambda t, s, n=first, w=near: ((t - s).abs() < w) | (s < n) | (t < n),  # type: ignore[misc]
                relative=False,
            )
