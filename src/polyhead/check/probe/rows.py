"""Rows of the projections that are queries, keys and values, and of which head: learned from calls.

A fused weight may have its rows in any order. With one token, the contexts are values: each must
equal one of the projections' outputs. With two, a head's features share one weight, which separates
heads; and the derivatives of that weight's logit with respect to the first token's keys are scale
times the queries. If any of this fails, nothing is learned: heads cut along the wrong axis and
mixed tokens are not explained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.check.law import NotApplicable
from polyhead.check.probe.core import Core, core_of
from polyhead.check.probe.layouts import Weights
from polyhead.check.subject import Subject, difference

__all__ = ["BY_PLACE", "Rows", "learned_rows"]

# Each token has its own queries, keys and values, but scores are not just their products.
BY_PLACE = (
    "its scores are not products of the projected queries and keys",
    "its scores have a part that depends on no query and key: positions?",
)


@dataclass(frozen=True)
class Rows:
    """Rows of queries, keys and values among the R outputs of the projections.

    Attributes:
        query, key: (H, D), paired: row i of a head's query is multiplied by row i of its key.
        value: (H, E).
        merged: (H, E) positions of a head's features in the merged contexts.
        scale: factor on the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    merged: Tensor
    scale: float

    def weights(self, count: int, like: Tensor) -> Weights:
        """Weights that select these rows among `count` outputs."""
        picks = torch.eye(count, dtype=like.dtype, device=like.device)
        query, key, value = (picks[rows.flatten()] for rows in (self.query, self.key, self.value))
        return Weights(query, key, value, num_heads=len(self.query))

    @property
    def in_order(self) -> bool:
        """True if heads are merged one after the other, or in the order of their values, and heads
        that share keys are adjacent.
        """
        merged, values = self.merged.flatten(), self.value.flatten()
        together = bool((merged.diff() == 1).all())
        alike = bool((values[merged.argsort()].diff() > 0).all())
        changes = [k for h, k in enumerate(self._keys) if h == 0 or k != self._keys[h - 1]]
        return (together or alike) and len(changes) == len(set(changes))

    @property
    def _keys(self) -> list[tuple[int, ...]]:
        return [tuple(sorted(key)) for key in self.key.tolist()]

    @property
    def words(self) -> str:
        """Order of the rows in words: runs of rows of the projections' outputs."""
        role: dict[int, str] = {}
        for name, rows in (("q", self.query), ("k", self.key), ("v", self.value)):
            heads = dict.fromkeys(tuple(sorted(head)) for head in rows.tolist())
            for h, head in enumerate(heads):
                role |= dict.fromkeys(head, f"{name}{h}")
        shown: list[str] = []
        for _, word in sorted(role.items()):
            if not shown or shown[-1] != word:
                shown.append(word)
        return " ".join(shown[:8]) + (" ..." if len(shown) > 8 else "")


def learned_rows(subject: Subject) -> Rows:
    """Return the rows of a module's projections by their function.

    Raises:
        NotApplicable: they are not those of plain attention; the message names the mismatch.
    """
    if "rows" not in subject.notes:
        try:
            core = core_of(subject)
            with torch.enable_grad():
                subject.notes["rows"] = _learn(subject, core)
        except NotApplicable as reason:
            subject.notes["rows"] = str(reason)
        except Exception as error:  # of unknown code, with unexpected values
            subject.notes["rows"] = f"its projections cannot be replaced: {type(error).__name__}"
    found = subject.notes["rows"]
    if isinstance(found, str):
        raise NotApplicable(found)
    rows: Rows = found
    return rows


def _learn(subject: Subject, core: Core) -> Rows:
    rounding = 2**10 * torch.finfo(subject.precision).eps
    first, last = _numbers(sum(core.widths), subject)
    values = _values(core(first[None])[0], first, rounding)
    given = torch.stack([first, last]).requires_grad_()
    contexts = core(given)[-1]
    shares = (contexts - given[1, values]) / (given[0, values] - given[1, values])
    heads = _heads(shares.detach(), rounding, subject.claims.num_heads)
    slopes = []
    for head in heads:
        share = shares[head].mean()
        logit = share.log() - (1 - share).log()
        (slope,) = torch.autograd.grad(logit, given, retain_graph=True)
        slopes.append(slope)
    acting = [_acting(slope, rounding) for slope in slopes]
    pairs = [
        _pairs(slope, last, *rows, rounding) for slope, rows in zip(slopes, acting, strict=True)
    ]
    if len({len(query) for query, _, _ in pairs}) != 1:
        raise NotApplicable("its heads have queries of different sizes")
    scale = torch.stack([ratio for *_, ratio in pairs])
    query, key = (torch.stack([pair[i] for pair in pairs]) for i in range(2))
    if (scale - scale.mean()).abs().max() > 64 * rounding * scale.abs().max():
        raise NotApplicable("its scores are not products: their scale differs per head")
    merged = torch.stack(heads)
    rows = Rows(query, key, values[merged], merged, float(scale.mean()))
    scores = rows.scale * (last[query] * (first - last)[key]).sum(dim=1)
    logits = torch.stack([shares[head].mean() for head in heads]).logit().detach()
    if difference(scores, logits).max() > 64 * rounding * (1 + scores.abs().max()):
        raise NotApplicable(BY_PLACE[1])
    return rows


def _numbers(count: int, subject: Subject) -> tuple[Tensor, Tensor]:
    """(R,) and (R,) random values: all different, none small, and no small differences."""
    generator = torch.Generator().manual_seed(subject.seed)
    sign = torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1
    drawn = [
        0.15 + 0.45 * torch.randperm(count, generator=generator).double() / count for _ in range(2)
    ]
    first, last = sign * drawn[0], -sign * drawn[1]
    return first.to(subject.device, subject.dtype), last.to(subject.device, subject.dtype)


def _values(contexts: Tensor, given: Tensor, rounding: float) -> Tensor:
    """(M,) index of the projections' output that equals each feature of one token's contexts."""
    apart = difference(contexts.detach()[:, None], given)
    nearest, which = apart.min(dim=1)
    if nearest.max() > rounding:
        raise NotApplicable("the contexts of one token are not outputs of its projections")
    return which


def _heads(shares: Tensor, rounding: float, num_heads: int | None) -> list[Tensor]:
    """Features (E,) of each head: those with one weight, between 0 and 1."""
    if not bool(((shares > 0) & (shares < 1)).all()):
        raise NotApplicable("the contexts of two tokens are not weighted means of their values")
    order = shares.argsort()
    breaks = (shares[order].diff() > 16 * rounding).nonzero().flatten() + 1
    heads = [head.sort().values for head in order.tensor_split(breaks.cpu())]
    if len({len(head) for head in heads}) != 1 or num_heads not in (None, len(heads)):
        raise NotApplicable("the features of a head do not share one weight")
    return sorted(heads, key=lambda head: int(head[0]))


def _acting(slope: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Queries (D,) and keys (D,) of a head, from its logit's derivatives (2, R): not yet paired."""
    acts = slope.abs() > 64 * rounding * slope.abs().max()
    key = acts[0].nonzero().flatten()
    query = (acts[1] & ~acts[0]).nonzero().flatten()
    if not bool(acts[1, key].all()) or len(key) == 0 or len(query) not in (0, len(key)):
        raise NotApplicable("a token's query and key depend on other tokens")
    if not len(query):
        query = key  # shared projection
    return query, key


def _pairs(
    slope: Tensor, last: Tensor, query: Tensor, key: Tensor, rounding: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (D,), the keys (D,) that they are multiplied by, and the scale."""
    by_slope = key[slope[0, key].argsort()]
    for descending in (False, True):
        by_size = query[last[query].argsort(descending=descending)]
        ratio = slope[0, by_slope] / last[by_size]
        if (ratio - ratio.mean()).abs().max() <= 64 * rounding * ratio.abs().max():
            return by_size, by_slope, ratio.mean()
    raise NotApplicable(BY_PLACE[0])
