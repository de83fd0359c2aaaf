"""Options that all functions share: validated, as masks and numbers of `attention()`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

from torch import Tensor

import polyhead.mask
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from polyhead.mask import Mask
from polyhead.validate import check_is_tensor, check_number

__all__ = ["Options", "is_local", "read_options"]

_NO_LIMIT = -1


@dataclass(frozen=True, eq=False)
class Options:
    """Options of one call.

    Attributes:
        mask: of `causal` and `window_size`; None: all keys.
        scale: factor on the scores; None: 1 / sqrt(D).
        softcap: of the scores; None: no cap.
        slopes: ALiBi slopes, (H,), or (rows, H) if they differ between rows; None: no bias.
        dropout: probability in [0, 1).
    """

    mask: Mask | None
    scale: float | None
    softcap: float | None
    slopes: Tensor | None
    dropout: float

    def within(self, mask: Mask) -> Options:
        """Options whose mask holds in addition."""
        return replace(self, mask=mask if self.mask is None else self.mask & mask)

    def for_rows(self, rows: Tensor) -> Options:
        """Options of these batch rows, (n,) int64."""
        if self.slopes is None or self.slopes.ndim == 1:
            return self
        return replace(self, slopes=_merged(self.slopes[rows]))


def read_options(
    q: Tensor,
    rows: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Options:
    """Validate the options of a call of `rows` batch rows; q is (..., H, D)."""
    _check_number_in("dropout_p", dropout_p, "must be in [0, 1)", 0.0, 1.0, "pass 0.0 for none")
    if softmax_scale is not None:
        remedy = "leave it out for 1 / sqrt(headdim)"
        check_number("softmax_scale", softmax_scale, remedy)
        if not math.isfinite(softmax_scale):
            raise ArgumentError("softmax_scale", "must be finite", softmax_scale, remedy)
    _check_number_in(
        "softcap", softcap, "must be at least 0 and finite", 0.0, math.inf, "pass 0.0 for no cap"
    )
    return Options(
        _mask(causal, window_size),
        softmax_scale,
        float(softcap) or None,
        None if alibi_slopes is None else _slopes(alibi_slopes, q, rows),
        float(dropout_p),
    )


def is_local(window_size: Sequence[int]) -> bool:
    """True if the window has a limit."""
    return tuple(window_size) != (_NO_LIMIT, _NO_LIMIT)


def _mask(causal: bool, window_size: Sequence[int]) -> Mask | None:
    _check_window(window_size)
    before, after = (None if size == _NO_LIMIT else int(size) for size in window_size)
    if causal:
        mask = polyhead.mask.causal()  # which implies any limit after the query
        return mask if before is None else mask & polyhead.mask.window(before=before)
    if before is None and after is None:
        return None
    return polyhead.mask.window(before=before, after=after)


def _check_window(window_size: Sequence[int]) -> None:
    rule = "must be (left, right), integers of at least -1"
    remedy = "pass -1 for no limit, (-1, -1) for no window"
    if not isinstance(window_size, Sequence) or isinstance(window_size, str):
        raise DtypeError("window_size", rule, repr(window_size), remedy)
    integers = all(isinstance(x, Integral) and not isinstance(x, bool) for x in window_size)
    if len(window_size) != 2 or not integers or min(window_size) < _NO_LIMIT:
        raise ArgumentError("window_size", rule, repr(tuple(window_size)), remedy)


def _check_number_in(
    name: str, number: float, rule: str, least: float, below: float, remedy: str
) -> None:
    if not isinstance(number, bool):  # `self.training and p` is False in evaluation
        check_number(name, number, remedy)
    if not least <= number < below:
        raise ArgumentError(name, rule, number, remedy)


def _slopes(slopes: Tensor, q: Tensor, rows: int) -> Tensor:
    check_is_tensor("alibi_slopes", slopes)
    H = q.shape[-2]
    if slopes.shape not in ((H,), (rows, H)):
        raise ShapeError(
            "alibi_slopes",
            f"must be (nheads,) = ({H},) or (batch_size, nheads) = ({rows}, {H})",
            tuple(slopes.shape),
            "give one for each query head",
        )
    if not slopes.is_floating_point():
        raise DtypeError(
            "alibi_slopes", "must be floating point", slopes.dtype, "convert with .float()"
        )
    if slopes.device != q.device:
        raise DeviceError(
            "alibi_slopes", f"must be on q's device, {q.device}", slopes.device, "move one"
        )
    return _merged(slopes.detach())  # no gradient, as in flash-attn


def _merged(slopes: Tensor) -> Tensor:
    """The slopes as (H,) if they are the same for all rows."""
    if slopes.ndim == 1 or not bool((slopes == slopes[:1]).all()):
        return slopes
    return slopes[0] if len(slopes) else slopes.sum(dim=0)
