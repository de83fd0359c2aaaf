"""How rope's frequencies change so that a model reads further than it was trained."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.errors import ArgumentError, ShapeError
from polyhead.validate import check_number

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "NTKScaling",
    "RopeScaling",
    "check_positive",
    "inverse_frequencies",
    "ntk_exponent",
]


def inverse_frequencies(theta: float | Tensor, exponents: Tensor) -> Tensor:
    """Plain rope's angle from one position to the next, for every pair: theta ** -exponents."""
    # Written as transformers writes it: float32 angles agree to the bit, far positions too.
    return 1.0 / theta**exponents


class RopeScaling(ABC):
    """What a `Rope` can be scaled by."""

    @abstractmethod
    def frequencies(
        self, theta: float, exponents: Tensor, positions: Tensor
    ) -> tuple[Tensor, float]:
        """The angle of every pair from one position to the next, and a factor on cos and sin.

        Args:
            theta: base of the wavelengths.
            exponents: (R / 2,) 2i / R for pair i, in the dtype to compute in: plain rope's
                angles are theta ** -exponents.
            positions: (T,) or (B, T), those of the call.
        """


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Position interpolation: every angle is divided by `factor`.

        position p of a scaled rope is position p / factor of the plain one

    Args:
        factor: by how much the context grows, positive.

    Raises:
        ArgumentError: factor is not positive and finite.

    Source: Chen et al. 2023, "Extending Context Window of Large Language Models via Positional
    Interpolation", section 2.3.

    >>> from polyhead.positions import Rope
    >>> x, scaled = torch.ones(1, 1, 1, 4), Rope(scaling=LinearScaling(4.0))
    >>> torch.equal(scaled(x, torch.tensor([8])), Rope()(x, torch.tensor([2])))
    True
    """

    factor: float

    def __post_init__(self) -> None:
        check_positive(factor=self.factor)

    def frequencies(
        self, theta: float, exponents: Tensor, positions: Tensor
    ) -> tuple[Tensor, float]:
        return inverse_frequencies(theta, exponents) / self.factor, 1.0


@dataclass(frozen=True)
class NTKScaling(RopeScaling):
    """A larger base: the slowest pair is divided by `factor`, the fastest stays as it is.

        theta becomes theta * factor ** (R / (R - 2))

    Args:
        factor: by how much the longest wavelength grows, positive.

    Raises:
        ArgumentError: factor is not positive and finite.
        ShapeError: at the call, fewer than 4 features turn.

    Source: bloc97 2023, "NTK-Aware Scaled RoPE"; Peng et al. 2023, "YaRN", section 3.1.

    >>> NTKScaling(4.0).frequencies(100.0, torch.tensor([0.0, 0.5]), torch.tensor([0]))
    (tensor([1.0000, 0.0250]), 1.0)
    """

    factor: float

    def __post_init__(self) -> None:
        check_positive(factor=self.factor)

    def frequencies(
        self, theta: float, exponents: Tensor, positions: Tensor
    ) -> tuple[Tensor, float]:
        return inverse_frequencies(theta * self.factor ** ntk_exponent(exponents), exponents), 1.0


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, others blended.

        turns[i] = original_context * angle[i] / (2 pi)
        kept[i]  = (turns[i] - low_freq_factor) / (high_freq_factor - low_freq_factor), in 0..1
        angle[i] becomes (kept[i] + (1 - kept[i]) / factor) * angle[i]

    Args:
        factor: by how much the long wavelengths grow, positive; 8 in Llama 3.1.
        low_freq_factor: pairs that turn less often in original_context are stretched; 1.
        high_freq_factor: pairs that turn more often stay as they are; 4.
        original_context: tokens the model was trained to read; 8192.

    Raises:
        ArgumentError: a number is not positive and finite, or the two are not in order.

    Source: Llama 3.1's published code (`apply_scaling`); Dubey et al. 2024, "The Llama 3 Herd of
    Models", section 3.4.2.

    >>> llama = Llama3Scaling(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32)
    >>> llama.frequencies(100.0, torch.tensor([0.0, 0.5]), torch.tensor([0]))
    (tensor([1.0000, 0.0125]), 1.0)
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        check_positive(
            factor=self.factor,
            low_freq_factor=self.low_freq_factor,
            original_context=self.original_context,
        )
        check_number("high_freq_factor", self.high_freq_factor, "4.0 is Llama's")
        if not self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ArgumentError(
                "high_freq_factor",
                f"must be finite and above low_freq_factor = {self.low_freq_factor}",
                self.high_freq_factor,
                "4.0 and 1.0 are Llama's",
            )

    def frequencies(
        self, theta: float, exponents: Tensor, positions: Tensor
    ) -> tuple[Tensor, float]:
        angles = inverse_frequencies(theta, exponents)
        wavelengths = 2 * math.pi / angles
        # In the order of transformers, for equal bits.
        kept = (self.original_context / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - kept) * angles / self.factor + kept * angles
        is_long = wavelengths > self.original_context / self.low_freq_factor
        is_short = wavelengths < self.original_context / self.high_freq_factor
        scaled = torch.where(is_long, angles / self.factor, torch.where(is_short, angles, blended))
        return scaled, 1.0


def check_positive(**numbers: float) -> None:
    """Every number is positive and finite."""
    for name, number in numbers.items():
        check_number(name, number, "change the scaling")
        if not 0.0 < number < math.inf:
            raise ArgumentError(name, "must be positive and finite", number, "change the scaling")


def ntk_exponent(exponents: Tensor) -> float:
    """R / (R - 2): by this power of a factor theta must grow for the slowest pair to slow by it."""
    R = 2 * exponents.shape[0]
    if R < 4:
        raise ShapeError("rotary_dim", "must be at least 4 for NTK scaling", R, "turn more")
    return R / (R - 2)
