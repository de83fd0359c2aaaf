"""What stands around the core of an attention and has no weights: norms, residuals, factors.

Seen in one call: each token that the projections are given is a multiple of the input's token,
shifted; each token of the output is a sum of the projection's, the input's and a shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.check.probe.core import Seen
from polyhead.check.subject import difference

__all__ = ["behind_the_attention", "in_front_of_it"]


def in_front_of_it(seen: Seen, x: Tensor, rounding: float) -> str | None:
    """What the projections are given instead of x (1, T, d_in), in words; None if it is x."""
    for given in seen.inputs:
        if given.numel() != x.numel():
            return "its projections are given other tokens than its input"
        axes = [a for a in range(given.ndim) if given.shape[a] == x.shape[1]]
        forms = [given.movedim(a, 0).reshape(x[0].shape) for a in axes]
        if any(_equal(form, x[0], rounding) for form in forms):
            continue
        if any(_sum_of(form, (x[0],), rounding) is not None for form in forms):
            return "each token is normalized, or multiplied, before its projections"
        return "its projections are given something else than its input"
    return None


def behind_the_attention(seen: Seen, x: Tensor, rounding: float) -> str | None:
    """What was done to the output projection's output, in words; None if nothing was."""
    if seen.behind.shape != seen.output.shape or seen.output.ndim != 3:
        return "its output is not that of its output projection"
    output, behind = seen.output[0], seen.behind[0]
    if _equal(output, behind, rounding):
        return None
    parts = (behind, x[0]) if x.shape == seen.output.shape else (behind,)
    shares = _sum_of(output, parts, rounding)
    if shares is None:
        return "more stands behind its output projection"
    if difference(shares, shares[:1]).max() > 1e3 * rounding or len(parts) == 1:
        return "each token is normalized, or multiplied, behind its output projection"
    a, b, _ = shares[0].tolist()
    added = f" and {b:.4g} times the input" if abs(b) > 1e3 * rounding else ""
    return f"the output is {a:.4g} times the projection's{added}"


def _equal(a: Tensor, b: Tensor, rounding: float) -> bool:
    return bool(difference(a, b).max() <= rounding * (1 + b.abs().max()))


def _sum_of(whole: Tensor, parts: tuple[Tensor, ...], rounding: float) -> Tensor | None:
    """(T, n + 1) how much of each part and of 1 is in each token of `whole`; None if there is
    something else in it."""
    columns = torch.stack([*parts, torch.ones_like(whole)], dim=-1)
    if whole.shape[-1] <= columns.shape[-1] or not columns.isfinite().all():
        return None
    shares = torch.linalg.lstsq(columns, whole[..., None]).solution
    return shares[..., 0] if _equal((columns @ shares)[..., 0], whole, 64 * rounding) else None
