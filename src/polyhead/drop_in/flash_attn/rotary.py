"""Rotary embedding from tables of cosines and sines: `flash_attn.layers.rotary`."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.drop_in.flash_attn.validate import check_integers
from polyhead.errors import ArgumentError, DtypeError, ShapeError, check_count
from polyhead.positions import rotate
from polyhead.validate import check_is_tensor

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func"]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first features of each head by the angles of each token's position.

    Args:
        x: (batch_size, seqlen, nheads, headdim), or with cu_seqlens (total, nheads, headdim).
        cos, sin: (seqlen_rotary, rotary_dim / 2) in x's dtype or float32; row p is of position p.
        interleaved: the features of pair i: 2i and 2i + 1 if True, i and i + rotary_dim / 2 if
            False.
        inplace: write the result to x.
        seqlen_offsets: position of the first token, for all or for each of (batch_size,).
        cu_seqlens: (batch_size + 1,) bounds of packed sequences.
        max_seqlen: no effect: the lengths are in cu_seqlens.

    Returns:
        The rotated tensor, computed in float32 (float64 for float64) and rounded once; x if
        `inplace`.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: an argument breaks a rule.

    >>> quarter = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])      # 0, 90 degrees
    >>> apply_rotary_emb(torch.tensor([[[[1.0, 2.0]], [[1.0, 2.0]]]]), *quarter)[0, :, 0]
    tensor([[ 1.,  2.],
            [-2.,  1.]])
    """
    check_is_tensor("x", x)
    packed = cu_seqlens is not None
    layout = "(total, nheads, headdim)" if packed else "(batch_size, seqlen, nheads, headdim)"
    if x.ndim != (3 if packed else 4):
        raise ShapeError("x", f"must be {layout}", tuple(x.shape), "check the order of dimensions")
    check_tables("cos", cos, "sin", sin, x)
    if cu_seqlens is None:
        offsets = _offsets(seqlen_offsets, x.shape[0], x)
        positions = offsets[:, None] + torch.arange(x.shape[1], device=x.device)
    else:
        check_integers("cu_seqlens", cu_seqlens, "(batch_size + 1,)", (-1,), x)
        bounds = cu_seqlens.long()
        lengths = bounds.diff()
        if not len(bounds) or bounds[0] != 0 or bool((lengths < 0).any()) or bounds[-1] != len(x):
            raise ArgumentError(
                "cu_seqlens",
                f"must begin with 0, never decrease, and end with x's {len(x)} tokens",
                cu_seqlens.tolist(),
                "pass the cumulative sum of the lengths, with a leading 0",
            )
        first = _offsets(seqlen_offsets, len(lengths), x) - bounds[:-1]
        positions = torch.arange(len(x), device=x.device) + first.repeat_interleave(lengths)
    check_positions("cos", positions, cos)
    rotated = rotate_at(x, cos, sin, positions, interleaved)
    return x.copy_(rotated) if inplace else rotated


apply_rotary_emb_func = apply_rotary_emb


def rotate_at(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotate x (..., heads, features) by the rows `positions` (...) of the tables."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    angles = (table[positions].to(compute).unsqueeze(-2) for table in (cos, sin))
    return rotate(x.to(compute), *angles, interleaved=interleaved).to(x.dtype)


def check_tables(cos_name: str, cos: Tensor, sin_name: str, sin: Tensor, x: Tensor) -> None:
    """Raise unless cos and sin are (positions, R / 2) with R at most x's features."""
    for name, table in ((cos_name, cos), (sin_name, sin)):
        check_is_tensor(name, table)
        if table.dtype not in (x.dtype, torch.float32):
            rule = f"must be {x.dtype}, as the features, or float32"
            raise DtypeError(name, rule, table.dtype, "cast it")
        most = x.shape[-1] // 2
        if table.ndim != 2 or not 1 <= table.shape[1] <= most or table.shape != cos.shape:
            raise ShapeError(
                name,
                f"must be (seqlen_rotary, rotary_dim / 2), the second from 1 to headdim / 2 = "
                f"{most}, both tables of one shape",
                tuple(table.shape),
                "pass one column per pair of features",
            )


def check_positions(name: str, positions: Tensor, table: Tensor) -> None:
    """Raise unless the table has a row for each position."""
    if not positions.numel():
        return
    first, last = int(positions.min()), int(positions.max())
    if first < 0 or last >= len(table):
        raise ShapeError(
            name,
            f"must have a row for each position, {first} to {last}",
            f"{len(table)} rows",
            "pass longer tables" if first >= 0 else "count positions from 0",
        )


def _offsets(seqlen_offsets: int | Tensor, rows: int, x: Tensor) -> Tensor:
    if isinstance(seqlen_offsets, Tensor):
        check_integers("seqlen_offsets", seqlen_offsets, "(batch_size,)", (rows,), x)
        return seqlen_offsets.long()
    check_count("seqlen_offsets", seqlen_offsets, 0)
    return torch.full((rows,), seqlen_offsets, device=x.device)
