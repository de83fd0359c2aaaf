"""YaRN scaling of RoPE: each pair is scaled by its number of turns in the trained context."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.errors import ArgumentError
from polyhead.positions.scaling import RopeScaling, check_positive
from polyhead.validate import check_number

__all__ = ["YarnScaling"]


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN scaling: slow pairs are interpolated, fast ones kept, others blended; scores grow.

        pair(beta) = R log(original_context / (2 pi beta)) / (2 log theta)     makes beta turns
        ramp[i]    = (i - pair(beta_fast)) / (pair(beta_slow) - pair(beta_fast)), clamped to 0..1
        angle[i]   = (1 - ramp[i] + ramp[i] / factor) * theta ** (-2i / R)

    cos and sin are multiplied by 0.1 log(factor) + 1 (so scores by its square), unless
    `attention_factor` or the two mscales are given.

    Args:
        factor: growth of the context, positive.
        original_context: context length of the training, in tokens.
        beta_fast: pairs with at least beta_fast turns in original_context are kept.
        beta_slow: pairs with at most beta_slow turns are divided by factor.
        attention_factor: the factor on cos and sin; None: as above.
        mscale, mscale_all_dim: the factor is (0.1 mscale log(factor) + 1) / (0.1 mscale_all_dim
            log(factor) + 1) instead (DeepSeek); both or neither.
        truncate: if True, pair(beta) is rounded outwards to whole pairs.

    Raises:
        ArgumentError: an argument is not positive and finite, the betas are not in order, one
            mscale is given without the other or with attention_factor; at the call, theta is at
            most 1.

    Source: Peng et al. 2023, "YaRN", sections 3.2 to 3.4; mscale: DeepSeek-V2's code.

    >>> yarn = YarnScaling(4.0, original_context=32)
    >>> yarn.frequencies(100.0, torch.tensor([0.0, 0.5]), torch.tensor([0]))
    (tensor([1.0000, 0.0250]), 1.138629436111989)
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check_positive(
            factor=self.factor,
            original_context=self.original_context,
            beta_slow=self.beta_slow,
        )
        check_number("beta_fast", self.beta_fast, "32.0 is usual")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_positive(**{name: getattr(self, name)})
        if not self.beta_slow < self.beta_fast < math.inf:
            raise ArgumentError(
                "beta_fast",
                f"must be finite and above beta_slow = {self.beta_slow}",
                self.beta_fast,
                "32.0 and 1.0 are usual",
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ArgumentError(
                "mscale",
                "must come with mscale_all_dim",
                f"mscale = {self.mscale}, mscale_all_dim = {self.mscale_all_dim}",
                "pass both or neither",
            )
        if self.mscale is not None and self.attention_factor is not None:
            raise ArgumentError(
                "attention_factor",
                "must be None if the mscales are given",
                self.attention_factor,
                "pass one of them",
            )

    def frequencies(
        self, theta: float, exponents: Tensor, positions: Tensor
    ) -> tuple[Tensor, float]:
        periods = theta**exponents
        first, last = self._blended(theta, 2 * exponents.shape[0])
        pairs = torch.arange(exponents.shape[0], device=exponents.device, dtype=exponents.dtype)
        kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
        # The operation order of transformers, for bit-identical results.
        angles = 1.0 / (self.factor * periods) * (1 - kept) + 1.0 / periods * kept
        return angles, self._cos_sin_factor()

    def _blended(self, theta: float, R: int) -> tuple[float, float]:
        """Pairs between which the ramp rises from 0 to 1."""
        if theta <= 1.0:
            raise ArgumentError("theta", "must be above 1 for YaRN", theta, "10000.0 is usual")

        def pair(beta: float) -> float:
            return (R * math.log(self.original_context / (beta * 2 * math.pi))) / (
                2 * math.log(theta)
            )

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, R - 1)
        return first, last if last != first else last + 0.001  # avoids division by zero

    def _cos_sin_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._sharpened(self.mscale) / self._sharpened(self.mscale_all_dim)
        return self._sharpened(1.0)

    def _sharpened(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0
