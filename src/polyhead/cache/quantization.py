"""Storage formats of KV caches: unquantized, or int8 with one scale per token and head.

A format is two pure functions. It stores a (B, G, T, D) tensor as a tuple of tensors whose shapes
begin with (B, G, T): caches move rows and tokens, and do not depend on the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Int8", "Parts", "StorageFormat", "Unquantized"]

Parts = tuple[Tensor, ...]


class StorageFormat(Protocol):
    """Storage format: `quantize` to parts, `dequantize` back."""

    def quantize(self, x: Tensor) -> Parts:
        """Return the parts of x, (B, G, T, D): tensors whose shapes begin with (B, G, T)."""

    def dequantize(self, held: Parts) -> Tensor:
        """Return x, within the precision of the format."""


@dataclass(frozen=True)
class Unquantized:
    """Unquantized format: bit-exact, without a copy."""

    def quantize(self, x: Tensor) -> Parts:
        return (x.detach(),)

    def dequantize(self, held: Parts) -> Tensor:
        return held[0]


@dataclass(frozen=True)
class Int8:
    """Symmetric int8 quantization, with one float32 scale per token and head.

        scale = max |x| / 127,   int8 = round(x / scale),   dequantized = int8 * scale

    Every dequantized element is within max |x| / 254 of x, with the max over its own token and
    head, plus one rounding to float32 and one to dtype. A token that is not finite is dequantized
    to elements that are not finite.

    Args:
        dtype: dtype of the dequantized elements.

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
        # amax raises for an empty head (E = 0).
        absmax = x.abs().amax(dim=-1) if x.shape[-1] else x.sum(dim=-1)
        scales = (absmax / 127.0).to(torch.float32)
        # Never divide by zero: the conversion of NaN to int8 is undefined.
        divisors = scales.masked_fill(scales == 0.0, 1.0).to(x.dtype)
        # A subnormal scale is rounded coarsely, and x / scale may exceed 127.
        codes = (x / divisors[..., None]).round().clamp(-127.0, 127.0).to(torch.int8)
        return codes, scales

    def dequantize(self, held: Parts) -> Tensor:
        codes, scales = held
        compute = self._compute_dtype
        return (codes.to(compute) * scales.to(compute)[..., None]).to(self.dtype)
