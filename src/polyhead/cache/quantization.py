"""How a number is held: as it came, or as int8 codes with a scale for each token and head.

A format is two pure functions. What it makes of (B, G, T, D) numbers is a tuple of tensors that
begin with (B, G, T): layouts move rows and tokens, and never look inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Int8", "Parts", "StorageFormat", "Unquantized"]

Parts = tuple[Tensor, ...]


class StorageFormat(Protocol):
    def quantize(self, x: Tensor) -> Parts:
        """What is held of x, (B, G, T, D): tensors that begin with (B, G, T)."""

    def dequantize(self, held: Parts) -> Tensor:
        """x again, as near as the format holds it."""


@dataclass(frozen=True)
class Unquantized:
    """As it came, to the bit."""

    def quantize(self, x: Tensor) -> Parts:
        return (x.detach(),)

    def dequantize(self, held: Parts) -> Tensor:
        return held[0]


@dataclass(frozen=True)
class Int8:
    """Symmetric int8 codes, and one float32 scale for each token and head.

        scale = max |x| / 127,   code = round(x / scale),   decoded = code * scale

    Every decoded number is within max |x| / 254 of x, the largest of its own token and head, plus
    one rounding to float32 and one to dtype. A token that is not finite comes back not finite.

    Args:
        dtype: of the decoded numbers.

    >>> codes, scales = Int8(torch.float32).quantize(torch.tensor([[[[-127.0, 63.6]]]]))
    >>> codes.tolist(), scales.tolist()
    ([[[[-127, 64]]]], [[[1.0]]])
    """

    dtype: torch.dtype

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def quantize(self, x: Tensor) -> Parts:
        x = x.detach().to(self._compute_dtype)
        # An empty head (E = 0) has no largest number.
        absmax = x.abs().amax(dim=-1) if x.shape[-1] else x.sum(dim=-1)
        scales = (absmax / 127.0).to(torch.float32)
        # Not by zero: what int8 makes of NaN is not defined.
        divisors = scales.masked_fill(scales == 0.0, 1.0).to(x.dtype)
        # A scale below the normal numbers is rounded coarsely, and x / scale may pass 127.
        codes = (x / divisors[..., None]).round().clamp(-127.0, 127.0).to(torch.int8)
        return codes, scales

    def dequantize(self, held: Parts) -> Tensor:
        codes, scales = held
        compute = self._compute_dtype
        return (codes.to(compute) * scales.to(compute)[..., None]).to(self.dtype)
