"""Length-dependent RoPE scalings: dynamic NTK and LongRoPE.

They are pure functions of a call's positions, without state. If a call reaches beyond
`original_context`, the angle of every token depends on the largest position. So a longer text
changes the rotation of earlier tokens: such a model is not causal. Cached keys keep the angles of
the call that rotated them, as in transformers. Queries and keys that are rotated in separate calls
are comparable only if both calls have the same largest position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import DtypeError, ShapeError
from polyhead.positions.scaling import (
    RopeScaling,
    check_positive,
    inverse_frequencies,
    ntk_exponent,
)

__all__ = ["DynamicNTKScaling", "LongRopeScaling"]


@dataclass(frozen=True)
class DynamicNTKScaling(RopeScaling):
    """Dynamic NTK scaling: plain RoPE up to `original_context`, then a base that grows with length.

        reach   = max(positions) + 1, of all rows of the call
        stretch = max(1, factor * reach / original_context - (factor - 1))
        theta becomes theta * stretch ** (R / (R - 2))

    A function of the call alone: see the module docstring for the effect on causality and caches.
    No tensor value is read on the host, so it compiles and exports.

    Args:
        factor: how fast the base grows, positive.
        original_context: context length of the training, in tokens.

    Raises:
        ArgumentError: an argument is not positive and finite.
        ShapeError: at the call, there are fewer than 4 rotary features.

    Source: emozilla 2023, "Dynamically Scaled RoPE"; Peng et al. 2023, "YaRN", section 3.3.

    >>> from polyhead.positions import Rope
    >>> x, dynamic = torch.ones(1, 1, 1, 8), Rope(scaling=DynamicNTKScaling(2.0, 32))
    >>> [torch.equal(dynamic(x, p), Rope()(x, p)) for p in torch.tensor([[31], [32]])]
    [True, False]
    """

    factor: float
    original_context: int

    def __post_init__(self) -> None:
        check_positive(factor=self.factor, original_context=self.original_context)

    def frequencies(
        self, theta: float, exponents: Tensor, positions: Tensor
    ) -> tuple[Tensor, float]:
        reach = _reach(positions, self.original_context, exponents.dtype)
        stretch = self.factor * reach / self.original_context - (self.factor - 1)
        # Rounding must not stretch positions within the context.
        stretch = torch.where(reach > self.original_context, stretch, 1.0)
        return inverse_frequencies(theta * stretch ** ntk_exponent(exponents), exponents), 1.0


@dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
    """LongRoPE: per-pair divisors of the angles, one set for short texts and one for long texts.

        angle[i] = theta ** (-2i / R) / short_factor[i]      max(positions) < original_context
        angle[i] = theta ** (-2i / R) / long_factor[i]       otherwise, for all rows of the call

    cos and sin are multiplied by sqrt(1 + log(factor) / log(original_context)), unless
    `attention_factor` is given. A function of the call alone: see the module docstring for the
    effect on causality and caches. It compiles and exports; on a GPU, every call copies the
    divisors to the device.

    Args:
        factor: growth of the context, positive; it is used for cos and sin only.
        original_context: context length of the training, in tokens, above 1.
        short_factor, long_factor: the divisors, R / 2 positive numbers each.
        attention_factor: the factor on cos and sin; None: as above.

    Raises:
        ArgumentError: an argument is not positive and finite.
        ShapeError: original_context is 1; at the call, there is not one divisor per pair.

    Source: Ding et al. 2024, "LongRoPE", section 3; the factor on cos and sin: Phi-3's code.

    >>> long = LongRopeScaling(4.0, 16, short_factor=(1.0, 1.0), long_factor=(1.0, 4.0))
    >>> [long.frequencies(100.0, torch.tensor([0.0, 0.5]), p)[0] for p in torch.tensor([15, 16])]
    [tensor([1.0000, 0.1000]), tensor([1.0000, 0.0250])]
    """

    factor: float
    original_context: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_positive(factor=self.factor, original_context=self.original_context)
        if self.attention_factor is not None:
            check_positive(attention_factor=self.attention_factor)
        if self.original_context < 2:
            raise ShapeError(
                "original_context", "must be at least 2", self.original_context, "log 1 is 0"
            )
        for name in ("short_factor", "long_factor"):
            divisors = getattr(self, name)
            if not isinstance(divisors, Sequence):
                raise DtypeError(
                    name, "must be a sequence of numbers", repr(divisors), "give one per pair"
                )
            divisors = tuple(divisors)  # a list, as in a config, would not hash
            object.__setattr__(self, name, divisors)
            for i, divisor in enumerate(divisors):
                check_positive(**{f"{name}[{i}]": divisor})

    def frequencies(
        self, theta: float, exponents: Tensor, positions: Tensor
    ) -> tuple[Tensor, float]:
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != exponents.shape[0]:
                raise ShapeError(
                    name,
                    f"must have one divisor for each of {exponents.shape[0]} pairs",
                    len(getattr(self, name)),
                    "change it or rotary_dim",
                )
        short, long = torch.tensor(
            [self.short_factor, self.long_factor], dtype=exponents.dtype, device=exponents.device
        )
        is_long = _reach(positions, self.original_context, exponents.dtype) > self.original_context
        divisors = torch.where(is_long, long, short)
        # The operation order of transformers, for bit-identical results.
        return 1.0 / (divisors * theta**exponents), self._cos_sin_factor()

    def _cos_sin_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context))


def _reach(positions: Tensor, at_least: int, dtype: torch.dtype) -> Tensor:
    """Largest position + 1, as a 0-dimensional tensor, so that it stays on the device.

    The padding makes it at least `at_least`, and defines the maximum of a call without tokens.
    """
    return F.pad(positions.to(dtype).flatten(), (0, 1), value=at_least - 1).amax(0) + 1
