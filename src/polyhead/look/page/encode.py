"""Compact encoding of maps and keys: quantized, deflated, base64; coarser until they fit."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Sequence
from ctypes import string_at
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pack_keys", "pack_maps"]

# (levels of a cell, number of halvings of its map), finest first.
_MAPS = ((255, 0), (127, 0), (63, 0), (31, 0), (31, 1), (31, 2), (15, 3))
# (levels of a weight, smallest weight that is kept), finest first.
_KEYS = (
    *((levels, 0.0) for levels in (255, 63, 31)),
    *((31, least) for least in (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1)),
    *(
        (15, least)
        for least in (0.1, 0.11, 0.12, 0.13, 0.15, 0.17, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9)
    ),
)
Detail = TypeVar("Detail")


def pack_maps(maps: Sequence[Tensor], edges: Sequence[int], budget: int) -> dict[str, Any]:
    """Encode the maps of all heads in `budget` characters, or at the coarsest detail.

    A cell is round(levels * sqrt(weight / scale)), with scale the largest weight of its map. Its
    difference from the cell above is stored, modulo 256: vertical stripes cost almost nothing.

    Args:
        maps: one (n, n) tensor of mean weights per head.
        edges: n + 1 token indices: row and column i of a map are tokens edges[i] .. edges[i+1] - 1.
        budget: characters.
    """

    def coarse(head: int, halvings: int) -> Tensor:
        cells = maps[head].float().nan_to_num(0.0)
        if halvings == 0:
            return cells
        join = _joining(edges, _halved(edges, halvings))
        return join @ cells @ join.mT

    def encode(head: int, detail: tuple[int, int]) -> str:
        levels, halvings = detail
        cells = coarse(head, halvings)
        codes = _codes(cells / _largest(cells), levels)
        return _deflated(codes - F.pad(codes[:-1], (0, 0, 1, 0)), zlib.Z_RLE)

    (levels, halvings), data = _finest(_MAPS, encode, len(maps), budget) or (
        _MAPS[-1],
        [encode(head, _MAPS[-1]) for head in range(len(maps))],
    )
    return {
        "edges": _halved(edges, halvings),
        "levels": levels,
        "scales": [float(f"{_largest(coarse(head, halvings)):.6g}") for head in range(len(maps))],
        "data": data,
    }


def pack_keys(
    keys: Sequence[Tensor], weights: Sequence[Tensor], budget: int
) -> dict[str, Any] | None:
    """Encode the most attended keys of all tokens and heads in `budget` characters; None: too many.

    Per head: the number of keys kept per token, one byte per token; then for all kept keys, in
    token order and the most attended first, round(levels * sqrt(weight)), one byte per key; then
    (query - key) mod T, T itself for key 0, in `bytes` bytes per key: all low bytes first.

    Args:
        keys, weights: (T, n) as from `top_keys`, one pair per head.
        budget: characters.
    """
    T, given = keys[0].shape
    size = 1 + (T > 0xFF) + (T > 0xFFFF)

    def kept(head: int, levels: int, least: float) -> tuple[Tensor, Tensor]:
        codes = _codes(weights[head], levels)
        return codes, (codes > 0) & (weights[head] >= least)

    def encode(head: int, detail: tuple[int, float]) -> str:
        codes, on = kept(head, *detail)
        distances = (torch.arange(T)[:, None] - keys[head].long()) % T
        distances = distances.masked_fill_(keys[head] == 0, T)[on]
        places = [distances >> (8 * place) & 0xFF for place in range(size)]
        parts = [on.sum(dim=1), codes[on], *places]
        return _deflated(torch.cat([part.to(torch.uint8) for part in parts]))

    found = _finest(_KEYS, encode, len(keys), budget)
    if found is None:
        return None
    (levels, least), data = found
    return {
        "given": given,
        "levels": levels,
        "least": least,
        "bytes": size,
        "held": [_held(weights[head], kept(head, levels, least)[1]) for head in range(len(keys))],
        "data": data,
    }


def _finest(
    details: Sequence[Detail], encode: Callable[[int, Detail], str], heads: int, budget: int
) -> tuple[Detail, list[str]] | None:
    """Return the first detail at which all heads fit; a sample of heads skips hopeless ones."""
    some = range(0, heads, max(1, heads // 20))
    for detail in details:
        if sum(len(encode(head, detail)) for head in some) * heads > budget * len(some):
            continue
        data = [encode(head, detail) for head in range(heads)]
        if sum(map(len, data)) <= budget:
            return detail, data
    return None


def _halved(edges: Sequence[int], halvings: int) -> list[int]:
    return [*edges[: -1 : 2**halvings], edges[-1]]


def _joining(edges: Sequence[int], bins: Sequence[int]) -> Tensor:
    """Pooling matrix (bins, cells): from means over cells to means over bins of tokens."""
    sizes = torch.tensor(edges).diff().float()
    join = torch.zeros(len(bins) - 1, len(sizes))
    at = {edge: i for i, edge in enumerate(edges)}
    for row, (first, last) in enumerate(pairwise(bins)):
        cells = slice(at[first], at[last])
        join[row, cells] = sizes[cells] / sizes[cells].sum()
    return join


def _largest(cells: Tensor) -> float:
    return max(cells.max().item(), 1e-30)


def _codes(weight_mass: Tensor, levels: int) -> Tensor:
    return (
        (weight_mass.float().nan_to_num(0.0).clamp(0.0, 1.0).sqrt() * levels)
        .round()
        .to(torch.uint8)
    )


def _held(weights_tn: Tensor, kept_tn: Tensor) -> float:
    """Mean weight per token on the keys that are kept."""
    return round(weights_tn.float().masked_fill(~kept_tn, 0.0).sum(dim=1).mean().item(), 3)


def _deflated(values: Tensor, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> str:
    values = values.contiguous()
    deflate = zlib.compressobj(6, strategy=strategy)
    raw = string_at(values.data_ptr(), values.numel())
    return base64.b64encode(deflate.compress(raw) + deflate.flush()).decode()
