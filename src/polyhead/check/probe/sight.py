"""Who sees whom, as a rule for texts of any length: windows, chunks, strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Pattern", "band", "fitting"]


@dataclass(frozen=True)
class Pattern:
    """A rule for masks.

    Attributes:
        words: the rule, for people.
        rule: (T, 1) queries' places and (T,) keys' places in; True where a query sees a key.
        window: tokens that a query sees, itself included, where the rule is a window and no more.
        relative: whether the rule is one of distances.
    """

    words: str
    rule: Callable[[Tensor, Tensor], Tensor]
    window: int | None = None
    relative: bool = True

    def shown(self, T: int) -> Tensor:
        places = torch.arange(T)
        return self.rule(places[:, None], places)


def band(T: int, causal: bool, window: int | None) -> Tensor:
    """(T, T) True where a module of these claims lets query t see token s."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = torch.ones(T, T, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    return seen


def fitting(seen: Mapping[int, Tensor], causal: bool) -> Pattern | None:
    """The first rule that gives what is seen in texts of each length, if one hides anything.

    Args:
        seen: by the length T, (T, T) True where query t sees token s.
        causal: whether the rules are to hide the future too.
    """
    if all(torch.equal(sees, band(T, causal, None)) for T, sees in seen.items()):
        return None
    longest = max(seen)
    if int(seen[longest].sum(dim=1).max()) < 2:
        return None  # tokens that see themselves alone: no attention
    for pattern in _patterns(seen[longest], causal):
        if all(
            torch.equal(sees, pattern.shown(T) & band(T, causal, None)) for T, sees in seen.items()
        ):
            return pattern
    return None


def _patterns(sees: Tensor, causal: bool) -> Iterator[Pattern]:
    """Rules with the numbers that this matrix allows."""
    T = len(sees)
    # A window that hides one pair alone cannot be told from a mistake.
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
                f"{near} tokens, and the first {first} of the text",
                lambda t, s, n=first, w=near: ((t - s).abs() < w) | (s < n),  # type: ignore[misc]
                relative=False,
            )
            yield Pattern(
                f"{near - 1} tokens on each side, the first {first} of the text, and these see all",
                lambda t, s, n=first, w=near: ((t - s).abs() < w) | (s < n) | (t < n),  # type: ignore[misc]
                relative=False,
            )
