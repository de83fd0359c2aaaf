"""Rotary position embedding (RoPE)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.errors import ArgumentError, DtypeError, ShapeError
from polyhead.positions.scaling import RopeScaling, inverse_frequencies
from polyhead.validate import check_is_tensor, check_number, check_positions

__all__ = ["Rope", "apply_rope", "rotate"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: rotates pairs of features by an angle proportional to position.

    Pair i of R / 2 at position p is rotated by p * theta ** (-2i / R), so that the product of a
    query and a key depends on the distance between them only. R is the number of rotary features.

    Args:
        theta: base of the wavelengths, positive; 10000 in the paper, 500000 in Llama 3.
        interleaved: the features of pair i: x[2i] and x[2i + 1] (the paper, GPT-J) if True,
            x[i] and x[i + R / 2] (Llama and transformers) if False.
        rotary_dim: number of rotary features, R, even; the others are unchanged. None: the whole
            head.
        scaling: scaling of the angles for a context longer than the trained one, such as
            `YarnScaling`; None: no scaling.

    Raises:
        ArgumentError: theta is not positive and finite, or rotary_dim not even and positive.
        DtypeError: scaling is not a `RopeScaling`.

    Source: Su et al. 2021, "RoFormer", section 3.2.2; partial: GPT-NeoX.

    >>> rope = Rope(theta=10_000.0)
    >>> rope(torch.ones(1, 1, 2, 4), torch.tensor([0, 1]))[0, 0, 0]   # no rotation at position 0
    tensor([1., 1., 1., 1.])
    """

    theta: float = 10_000.0
    interleaved: bool = False
    rotary_dim: int | None = None
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_number("theta", self.theta, "10000.0 is usual")
        if not 0.0 < self.theta < math.inf:
            raise ArgumentError(
                "theta", "must be positive and finite", self.theta, "10000.0 is usual"
            )
        R = self.rotary_dim
        if R is not None and (not isinstance(R, int) or R < 2 or R % 2):
            raise ArgumentError(
                "rotary_dim", "must be even and at least 2", repr(R), "features rotate in pairs"
            )
        if self.scaling is not None and not isinstance(self.scaling, RopeScaling):
            raise DtypeError(
                "scaling",
                "must be a RopeScaling or None",
                repr(self.scaling),
                "pass LinearScaling(factor=2.0), or another",
            )

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate queries or keys by their positions.

        Args:
            x: (B, heads, T, D).
            positions: (T,) or (B, T) integers, the position of each token.

        Returns:
            (B, heads, T, D) in the dtype of x; angles are computed in float32 (float64 for
            float64).

        Raises:
            ShapeError, DtypeError: x has not 4 dimensions, or positions are not such integers.
            ShapeError: the number of rotary features is odd, larger than D, or does not match the
                scaling.
        """
        check_is_tensor("x", x)
        if x.ndim != 4:
            raise ShapeError(
                "x", "must be (B, heads, T, D)", tuple(x.shape), "unsqueeze the missing dimensions"
            )
        check_positions(positions, x.shape[0], x.shape[2])
        R = self._rotary_size(x.shape[-1])
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        exponents = torch.arange(0, R, 2, device=x.device, dtype=compute) / R
        if self.scaling is None:
            frequencies, factor = inverse_frequencies(self.theta, exponents), 1.0
        else:
            frequencies, factor = self.scaling.frequencies(self.theta, exponents, positions)
        angles = positions[..., None].to(compute) * frequencies
        angles = angles.unsqueeze(-3)  # the same for every head
        cos, sin = angles.cos(), angles.sin()
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        return rotate(x, cos, sin, interleaved=self.interleaved)

    def _rotary_size(self, D: int) -> int:
        R = D if self.rotary_dim is None else self.rotary_dim
        if R % 2:
            raise ShapeError("head size", "must be even for rope", R, "change head_dim")
        if R > D:
            raise ShapeError(
                "rotary_dim", f"must be at most the head size {D}", R, "rotate fewer features"
            )
        return R


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate pairs of features by angles, given as cosine and sine.

        (a, b) becomes (a cos - b sin, b cos + a sin)

    Args:
        x: (..., D).
        cos, sin: (..., R / 2), R at most D; features from R on are unchanged.
        interleaved: the features of a pair, as in `Rope`.

    >>> quarter = torch.tensor([0.0]), torch.tensor([1.0])               # 90 degrees
    >>> rotate(torch.tensor([1.0, 2.0, 7.0]), *quarter)
    tensor([-2.,  1.,  7.])
    """
    R = 2 * cos.shape[-1]
    rotary, rest = x[..., :R], x[..., R:]
    pairs = rotary.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pair_dim = -1 if interleaved else -2
    a, b = pairs.unbind(pair_dim)
    rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=pair_dim).flatten(-2)
    return rotated if rest.shape[-1] == 0 else torch.cat((rotated, rest), dim=-1)


def apply_rope(
    rope: Rope,
    query_bhtd: Tensor,
    key_bgsd: Tensor,
    positions: Tensor | None,
    memory: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        rope: of both.
        query_bhtd, key_bgsd: (B, H, T, D), (B, G, S, D).
        positions: of the queries, (T,) or (B, T), and of the keys unless these come from a memory.
            None: keys have positions 0 .. S - 1, and queries are the last T of them.
        memory: the source of the keys, or None for that of the queries.
    """
    B, _, T, _ = query_bhtd.shape
    S = key_bgsd.shape[2]
    key_positions = torch.arange(S, device=key_bgsd.device)
    if positions is None:
        positions = torch.arange(S - T, S, device=query_bhtd.device)
    else:
        check_positions(positions, B, T)
        if memory is None:
            key_positions = positions
    return rope(query_bhtd, positions), rope(key_bgsd, key_positions)
