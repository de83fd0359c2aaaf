"""ALiBi: a bias linear in the distance, with one slope per head."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.errors import DtypeError, ShapeError, check_count

__all__ = ["alibi_slopes"]


def alibi_slopes(
    num_heads: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """ALiBi slopes, one per head.

    The bias of query position i and key position j is -slope * |i - j|.

        slope[h] = 2 ** (-8 (h + 1) / n)                    h < n, the largest power of two in H
        slope[h] = 2 ** (-4 (2 (h - n) + 1) / n)            the others: between the first n slopes

    Args:
        num_heads: H, at least 1; any number, not only a power of two.
        device, dtype: device and dtype of the slopes. They are computed on the device.

    Returns:
        (H,), equal to those of the paper's code, rounded once to dtype.

    Raises:
        ShapeError: num_heads is not an integer of at least 1.
        DtypeError: dtype is not floating point.

    Source: Press et al. 2022, "Train Short, Test Long", section 3, and its published code for
    numbers of heads that are not a power of two.

    >>> alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    >>> distance = (torch.arange(3)[:, None] - torch.arange(3)).abs()
    >>> (-alibi_slopes(4)[:, None, None] * distance).shape             # a bias for attention()
    torch.Size([4, 3, 3])
    """
    check_count("num_heads", num_heads, 1, "count from 1", ShapeError)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise DtypeError("dtype", "must be floating point", repr(dtype), "slopes are fractions")
    n = 1 << (num_heads.bit_length() - 1)
    steps = torch.cat(
        [
            torch.arange(2, 2 * n + 1, 2, device=device),
            torch.arange(1, 2 * (num_heads - n) + 1, 2, device=device),
        ]
    )
    # float64, as in the paper's code: float32 powers are off by many units in the last place.
    return torch.exp2(steps.to(torch.float64) * (-4 / n)).to(dtype)
