"""RoPE scalings: changes of the frequencies for contexts longer than the trained one."""

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
    """RoPE's inverse frequencies, the angle per position of each pair: theta ** -exponents."""
    # The formula of transformers: float32 angles are bit-identical, at large positions too.
    return 1.0 / theta**exponents


class RopeScaling(ABC):
    """Base class of the scalings of a `Rope`."""

    @abstractmethod
    def frequencies(
        self, theta: float, exponents: Tensor, positions: Tensor
    ) -> tuple[Tensor, float]:
        """Return the angle per position of each pair, and a factor on cos and sin.

        Args:
            theta: base of the wavelengths.
            exponents: (R / 2,) 2i / R for pair i, in the compute dtype: plain RoPE's angles are
                theta ** -exponents.
            positions: (T,) or (B, T), the positions of the call.
        """


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Linear scaling (position interpolation): every angle is divided by `factor`.

        position p of a scaled RoPE is position p / factor of the plain one

    Args:
        factor: growth of the context, positive.

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
    """NTK-aware scaling: a larger base divides the slowest pair by `factor`, the fastest by 1.

        theta becomes theta * factor ** (R / (R - 2))

    Args:
        factor: growth of the longest wavelength, positive.

    Raises:
        ArgumentError: factor is not positive and finite.
        ShapeError: at the call, there are fewer than 4 rotary features.

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
    """Llama 3.1 scaling: long wavelengths are stretched by `factor`, short kept, others blended.

        turns[i] = original_context * angle[i] / (2 pi)
        kept[i]  = (turns[i] - low_freq_factor) / (high_freq_factor - low_freq_factor), in 0..1
        angle[i] becomes (kept[i] + (1 - kept[i]) / factor) * angle[i]

    Args:
        factor: growth of the long wavelengths, positive; 8 in Llama 3.1.
        low_freq_factor: pairs with fewer turns in original_context are stretched; 1.
        high_freq_factor: pairs with more turns in original_context are kept; 4.
        original_context: context length of the training, in tokens; 8192.

    Raises:
        ArgumentError: an argument is not positive and finite, or the frequency factors are not in
            order.

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
        # The operation order of transformers, for bit-identical results.
        kept = (self.original_context / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - kept) * angles / self.factor + kept * angles
        is_long = wavelengths > self.original_context / self.low_freq_factor
        is_short = wavelengths < self.original_context / self.high_freq_factor
        scaled = torch.where(is_long, angles / self.factor, torch.where(is_short, angles, blended))
        return scaled, 1.0


def check_positive(**numbers: float) -> None:
    """Raise unless every number is positive and finite."""
    for name, number in numbers.items():
        check_number(name, number, "change the scaling")
        if not 0.0 < number < math.inf:
            raise ArgumentError(name, "must be positive and finite", number, "change the scaling")


def ntk_exponent(exponents: Tensor) -> float:
    """Exponent R / (R - 2): theta * factor ** exponent slows the slowest pair by factor."""
    R = 2 * exponents.shape[0]
    if R < 4:
        raise ShapeError(
            "rotary_dim", "must be at least 4 for NTK scaling", R, "rotate more features"
        )
    return R / (R - 2)
