"""Operations without weights around the core of an attention: norms, residuals, factors.

Observed in one call: each token of the projections' input is a scaled and shifted token of the
module's input; each token of the output is a sum of the projection's, the input's and a shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.check.probe.core import Seen
from polyhead.check.subject import difference

__all__ = ["behind_the_attention", "in_front_of_it"]


def in_front_of_it(seen: Seen, x: Tensor, rounding: float) -> str | None:
    """Describe the input of the projections relative to x (1, T, d_in); None if it is x."""
    for given in seen.inputs:
        if given.numel() != x.numel():
            return "its projections receive other tokens than its input"
        axes = [a for a in range(given.ndim) if given.shape[a] == x.shape[1]]
        forms = [given.movedim(a, 0).reshape(x[0].shape) for a in axes]
        if any(_equal(form, x[0], rounding) for form in forms):
            continue
        if any(_sum_of(form, (x[0],), rounding) is not None for form in forms):
            return "each token is normalized or scaled before its projections"
        return "its projections receive something other than its input"
    return None


def behind_the_attention(seen: Seen, x: Tensor, rounding: float) -> str | None:
    """Describe the operation after the output projection; None if there is none."""
    if seen.behind.shape != seen.output.shape or seen.output.ndim != 3:
        return "its output is not that of its output projection"
    output, behind = seen.output[0], seen.behind[0]
    if _equal(output, behind, rounding):
        return None
    parts = (behind, x[0]) if x.shape == seen.output.shape else (behind,)
    shares = _sum_of(output, parts, rounding)
    if shares is None:
        return "other operations follow its output projection"
    if difference(shares, shares[:1]).max() > 1e3 * rounding or len(parts) == 1:
        return "each token is normalized or scaled after its output projection"
    a, b, _ = shares[0].tolist()
    added = f" and {b:.4g} times the input" if abs(b) > 1e3 * rounding else ""
    return f"the output is {a:.4g} times the projection's{added}"


def _equal(a: Tensor, b: Tensor, rounding: float) -> bool:
    return bool(difference(a, b).max() <= rounding * (1 + b.abs().max()))


def _sum_of(whole: Tensor, parts: tuple[Tensor, ...], rounding: float) -> Tensor | None:
    """(T, n + 1) coefficients of each part and of 1 in each token of `whole`; None if they do not
    explain it.
    """
    columns = torch.stack([*parts, torch.ones_like(whole)], dim=-1)
    if whole.shape[-1] <= columns.shape[-1] or not columns.isfinite().all():
        return None
    shares = torch.linalg.lstsq(columns, whole[..., None]).solution
    return shares[..., 0] if _equal((columns @ shares)[..., 0], whole, 64 * rounding) else None
