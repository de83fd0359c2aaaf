"""The checks that modules make: of their constructor's arguments and of what they are called on."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.arguments import autocasts, check_is_tensor
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from polyhead.mask import Mask
from polyhead.positions import Rope

__all__ = ["check_dropout", "check_input", "check_positions", "check_rope", "check_sizes"]


def check_sizes(**sizes: int) -> None:
    """Every size is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ShapeError(name, "must be an integer of at least 1", repr(size), "count from 1")


def check_dropout(dropout: float) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ArgumentError(
            "dropout", "must be a probability in [0, 1)", dropout, "pass 0.0 for none"
        )


def check_rope(rope: Rope | None, head_dim: int) -> None:
    if rope is None:
        return
    if not isinstance(rope, Rope):
        raise DtypeError(
            "rope", "must be a polyhead.Rope or None", repr(rope), "pass Rope(theta=10_000.0)"
        )
    if rope.rotary_dim is None and head_dim % 2:
        raise ShapeError("head_dim", "must be even with rope", head_dim, "change it or drop rope")
    if rope.rotary_dim is not None and rope.rotary_dim > head_dim:
        raise ShapeError(
            "rope",
            f"must turn at most head_dim = {head_dim} features",
            f"rotary_dim = {rope.rotary_dim}",
            "let fewer turn",
        )


def check_mask(mask: Mask | None) -> None:
    if mask is not None and not isinstance(mask, Mask):
        raise DtypeError(
            "mask",
            "must be a polyhead.mask.Mask or None",
            type(mask).__name__,
            "wrap a bool tensor in polyhead.mask.dense (True = may attend)",
        )


def check_input(
    name: str, x: Tensor, weight: Tensor, d_in: int, context_length: int | None = None
) -> None:
    """`x` is (B, tokens, d_in), of the weight's dtype and device, and not too long."""
    check_is_tensor(name, x)
    if x.ndim != 3:
        raise ShapeError(
            name,
            f"must have 3 dimensions (batch, tokens, d_in = {d_in})",
            tuple(x.shape),
            "add the batch with x[None]" if x.ndim == 2 else "reshape it",
        )
    if not x.is_floating_point():
        raise DtypeError(
            name, "must be floating point", x.dtype, "embed token ids before attention"
        )
    if x.shape[2] != d_in:
        raise ShapeError(
            name, f"must have d_in = {d_in} features", x.shape[2], "match the constructor's d_in"
        )
    if context_length is not None and x.shape[1] > context_length:
        raise ShapeError(
            name,
            f"must have at most context_length = {context_length} tokens",
            x.shape[1],
            "shorten it, or build the module with a larger context_length",
        )
    if x.device != weight.device:
        raise DeviceError(
            name, f"must be on the module's device, {weight.device}", x.device, "move one"
        )
    if x.dtype != weight.dtype and weight.is_floating_point() and not autocasts(x.device):
        raise DtypeError(
            name,
            f"must have the module's dtype, {weight.dtype}",
            x.dtype,
            "cast one: nothing is cast silently",
        )


def check_positions(positions: Tensor, B: int, T: int) -> None:
    if not isinstance(positions, Tensor):
        raise DtypeError(
            "positions",
            "must be a tensor of integers",
            type(positions).__name__,
            "torch.as_tensor it",
        )
    integers = not (positions.is_floating_point() or positions.dtype == torch.bool)
    if not integers or tuple(positions.shape) not in {(T,), (B, T)}:
        raise ShapeError(
            "positions",
            f"must be integers of shape (T,) = ({T},) or (B, T) = ({B}, {T})",
            f"{positions.dtype} {tuple(positions.shape)}",
            "one position a query token",
        )
