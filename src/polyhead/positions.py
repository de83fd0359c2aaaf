"""Where a token stands: rotary positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.errors import ArgumentError, ShapeError

__all__ = ["Rope"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: turns pairs of features by an angle that grows with position.

    Feature pair i of D / 2, (x[i], x[i + D/2]), at position p turns by p * theta ** (-2i / D),
    so that the product of a query and a key depends on the distance between them only.

    Args:
        theta: base of the wavelengths, positive; 10000 in the paper, 500000 in Llama 3.

    Source: Su et al. 2021, "RoFormer", in the half-split layout of Llama and transformers.

    >>> rope = Rope(theta=10_000.0)
    >>> rope(torch.ones(1, 1, 2, 4), torch.tensor([0, 1]))[0, 0, 0]   # position 0 turns nothing
    tensor([1., 1., 1., 1.])
    """

    theta: float = 10_000.0

    def __post_init__(self) -> None:
        if not self.theta > 0.0:
            raise ArgumentError("theta", "must be positive", self.theta, "10000.0 is usual")

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn queries or keys to their positions.

        Args:
            x: (B, heads, T, D), D even.
            positions: (T,) or (B, T) integers: where each token stands.

        Returns:
            (B, heads, T, D) in the dtype of x; angles are computed in float32 (float64 for
            float64).

        Raises:
            ShapeError: D is odd.
        """
        D = x.shape[-1]
        if D % 2:
            raise ShapeError("head size", "must be even for rope", D, "change head_dim")
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        exponent = torch.arange(0, D, 2, device=x.device, dtype=compute) / D
        # Written as transformers writes it: float32 angles agree to the bit, far positions too.
        angles = positions[..., None].to(compute) * (1.0 / self.theta**exponent)
        angles = angles.unsqueeze(-3)  # the same for every head
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
