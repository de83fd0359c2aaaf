"""Numbers per cache row: their validation, and the tokens of a padded chunk that are appended."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyhead.errors import ArgumentError, DtypeError, ShapeError

__all__ = ["appended_tokens", "check_per_row"]


def check_per_row(name: str, numbers: Tensor | Sequence[int], most: Tensor) -> Tensor:
    """One number per row, (B,) int64 on the CPU, each from 0 to that of `most`.

    >>> check_per_row("lengths", [1, 2], torch.tensor([3, 3]))
    tensor([1, 2])
    """
    given = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers)
    if given.dtype not in (torch.int32, torch.int64):
        raise DtypeError(name, "must be int32 or int64", given.dtype, "convert with .long()")
    if given.shape != most.shape:
        rule = f"must be (B,) = ({len(most)},), one per row"
        raise ShapeError(name, rule, tuple(given.shape), "give one for each row")
    given = given.long().cpu()
    if not bool(((given >= 0) & (given <= most)).all()):
        rule = f"must be from 0 to {most.tolist()}"
        raise ArgumentError(name, rule, given.tolist(), "count the tokens of each row")
    return given


def appended_tokens(counts: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Row and index of the tokens of a chunk of T that rows append: the first counts[b] of row b.

    >>> appended_tokens(torch.tensor([2, 0, 1]), 3)
    (tensor([0, 0, 2]), tensor([0, 1, 0]))
    """
    row, token = (torch.arange(T) < counts[:, None]).nonzero(as_tuple=True)
    return row, token
