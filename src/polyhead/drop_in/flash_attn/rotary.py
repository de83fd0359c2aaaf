"""Rotary embedding from tables of cosines and sines: `flash_attn.layers.rotary`."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.drop_in.flash_attn.validate import check_integers, check_packed
from polyhead.errors import ArgumentError, DtypeError, ShapeError, check_count
from polyhead.positions import rotate
from polyhead.validate import check_is_tensor

__all__ = [
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]


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


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """`apply_rotary_emb` of tokens at positions 0, 1, ..., or with tables of each row.

    Args:
        x: (batch_size, seqlen, nheads, headdim).
        cos, sin: (seqlen, rotary_dim / 2) or (batch_size, seqlen, rotary_dim / 2).
        interleaved: as in `apply_rotary_emb`.

    >>> quarter = torch.tensor([[0.0]]), torch.tensor([[1.0]])                    # 90 degrees
    >>> apply_rotary_emb_torch(torch.tensor([[[[1.0, 2.0]]]]), *quarter).flatten()
    tensor([-2.,  1.])
    """
    check_is_tensor("x", x)
    if cos.ndim == 2:
        return apply_rotary_emb(x, cos, sin, interleaved)
    if x.ndim != 4 or cos.shape[:2] != x.shape[:2]:
        raise ShapeError(
            "cos",
            "must be (batch_size, seqlen, rotary_dim / 2) of x, (batch_size, seqlen, nheads, "
            f"headdim) = {tuple(x.shape)}",
            tuple(cos.shape),
            "pass tables of (seqlen, rotary_dim / 2) if all rows have the same",
        )
    check_tables("cos", cos.flatten(0, 1), "sin", sin.flatten(0, 1), x)
    rows = torch.arange(cos.shape[0] * cos.shape[1], device=x.device).view(cos.shape[:2])
    return rotate_at(x, cos.flatten(0, 1), sin.flatten(0, 1), rows, interleaved)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate the queries and keys of packed tensors in place.

    Args:
        qkv: (batch_size, seqlen, 3, nheads, headdim), or with num_heads_q (batch_size, seqlen,
            num_heads_q + 2 * num_heads_k, headdim).
        cos, sin: as in `apply_rotary_emb`.
        cos_k, sin_k: of keys; None: the same.
        interleaved, seqlen_offsets: as in `apply_rotary_emb`.
        num_heads_q: query heads of a tensor of 4 dimensions.

    Returns:
        qkv.

    >>> quarter = torch.tensor([[0.0]]), torch.tensor([[1.0]])                    # 90 degrees
    >>> apply_rotary_emb_qkv_(torch.tensor([1.0, 2.0]).repeat(1, 1, 3, 1, 1), *quarter)[0, 0, :, 0]
    tensor([[-2.,  1.],
            [-2.,  1.],
            [ 1.,  2.]])
    """
    check_is_tensor("qkv", qkv)
    if qkv.ndim == 5 and qkv.shape[2] == 3:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif qkv.ndim == 4 and num_heads_q is not None and (qkv.shape[2] - num_heads_q) % 2 == 0:
        check_count("num_heads_q", num_heads_q, 1)
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]
    else:
        raise ShapeError(
            "qkv",
            "must be (batch_size, seqlen, 3, nheads, headdim), or (batch_size, seqlen, "
            "num_heads_q + 2 * num_heads_k, headdim) with num_heads_q",
            f"{tuple(qkv.shape)}, num_heads_q = {num_heads_q}",
            "check the order of dimensions",
        )
    cos_k, sin_k = (cos if cos_k is None else cos_k), (sin if sin_k is None else sin_k)
    of_k = apply_rotary_emb(k, cos_k, sin_k, interleaved, seqlen_offsets=seqlen_offsets)
    apply_rotary_emb(q, cos, sin, interleaved, inplace=True, seqlen_offsets=seqlen_offsets)
    k.copy_(of_k)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotate the keys of a packed tensor in place.

    Args:
        kv: (batch_size, seqlen, 2, nheads, headdim).
        cos, sin, interleaved, seqlen_offsets: as in `apply_rotary_emb`.

    Returns:
        kv.

    >>> quarter = torch.tensor([[0.0]]), torch.tensor([[1.0]])                    # 90 degrees
    >>> apply_rotary_emb_kv_(torch.tensor([1.0, 2.0]).repeat(1, 1, 2, 1, 1), *quarter)[0, 0, :, 0]
    tensor([[-2.,  1.],
            [ 1.,  2.]])
    """
    check_packed("kv", kv, "(batch_size, seqlen, 2, nheads, headdim)", 5, 2)
    k = kv[:, :, 0]
    apply_rotary_emb(k, cos, sin, interleaved, inplace=True, seqlen_offsets=seqlen_offsets)
    return kv


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
