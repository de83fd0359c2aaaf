"""Validation of tensors, under the names of flash-attn's arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from polyhead.validate import check_is_tensor

__all__ = [
    "Names",
    "check_integers",
    "check_keys_and_values",
    "check_packed",
    "check_queries",
    "check_range",
    "check_same_kind",
]


class Names(NamedTuple):
    """Names of the arguments that held the queries, keys and values."""

    q: str = "q"
    k: str = "k"
    v: str = "v"


def check_same_kind(*named: tuple[str, Tensor]) -> None:
    """Raise unless all are dense floating point tensors of one dtype on one device."""
    for name, tensor in named:
        check_is_tensor(name, tensor)
        if not tensor.is_floating_point():
            raise DtypeError(name, "must be floating point", tensor.dtype, "convert it first")
    first, like = named[0]
    for name, tensor in named:
        if tensor.dtype != like.dtype:
            rule = f"must have {first}'s dtype, {like.dtype}"
            raise DtypeError(name, rule, tensor.dtype, "cast one")
        if tensor.device != like.device:
            rule = f"must be on {first}'s device, {like.device}"
            raise DeviceError(name, rule, tensor.device, "move one")


def check_queries(name: str, q: Tensor, layout: str, dims: int) -> None:
    """Raise unless q has `dims` dimensions, (..., H, D), and no empty head."""
    if q.ndim != dims or 0 in q.shape[-2:]:
        raise ShapeError(
            name,
            f"must be {layout}, with at least 1 head of at least 1 feature",
            tuple(q.shape),
            "check the order of dimensions",
        )


def check_keys_and_values(
    k: Tensor, v: Tensor, layout: str, leading: tuple[int, ...], q: Tensor, names: Names
) -> None:
    """Raise unless k is (*leading, G, D) with q's D and G a divisor of q's heads, and v like it.

    -1 in `leading`: any size. The heads of v may have another size.
    """
    H, D = q.shape[-2:]
    dims = len(leading) + 2
    fits = k.ndim == dims and k.shape[-1] == D
    if not fits or not _matches(k.shape[:-2], leading):
        raise ShapeError(
            names.k,
            f"must be {layout} = ({_sizes(leading)}, any, {D})",
            tuple(k.shape),
            "check the order of dimensions: tokens, then heads, then features",
        )
    G = k.shape[-2]
    if G == 0 or H % G:
        raise ShapeError(
            names.k,
            f"must have a number of heads that divides {names.q}'s {H}",
            G,
            "query head h uses KV head h // (nheads / nheads_k)",
        )
    if v.ndim != dims or v.shape[:-1] != k.shape[:-1]:
        raise ShapeError(
            names.v,
            f"must be {layout} with {names.k}'s {tuple(k.shape[:-1])}",
            tuple(v.shape),
            "check the order of dimensions: tokens, then heads, then features",
        )


def check_packed(name: str, x: Tensor, layout: str, dims: int, parts: int) -> None:
    """Raise unless x has `dims` dimensions, and `parts` tensors packed before its heads."""
    check_is_tensor(name, x)
    if x.ndim != dims or x.shape[-3] != parts:
        raise ShapeError(
            name, f"must be {layout}", tuple(x.shape), f"torch.stack the {parts} at dim={dims - 3}"
        )


def check_integers(name: str, x: Tensor, layout: str, sizes: tuple[int, ...], q: Tensor) -> None:
    """Raise unless x is an integer tensor of these sizes on q's device; -1: any size."""
    check_is_tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise DtypeError(name, "must be int32 or int64", x.dtype, "convert with .int()")
    if x.ndim != len(sizes) or not _matches(x.shape, sizes):
        comma = "," if len(sizes) == 1 else ""
        raise ShapeError(
            name, f"must be {layout} = ({_sizes(sizes)}{comma})", tuple(x.shape), "count the rows"
        )
    if x.device != q.device:
        raise DeviceError(name, f"must be on q's device, {q.device}", x.device, "move one")


def check_range(name: str, x: Tensor, least: int, most: int, rule: str, remedy: str) -> None:
    """Raise unless all elements are from `least` to `most`."""
    if x.numel() and not bool(((x >= least) & (x <= most)).all()):
        raise ArgumentError(name, rule, x.tolist(), remedy)


def _matches(shape: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    return all(want in (-1, have) for have, want in zip(shape, sizes, strict=True))


def _sizes(sizes: tuple[int, ...]) -> str:
    return ", ".join("any" if size == -1 else str(size) for size in sizes)
