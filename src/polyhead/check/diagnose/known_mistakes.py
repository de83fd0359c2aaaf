"""Known mistakes: attention with one thing changed.

If a module's weights are known and its output differs from the reference, each mistake is computed.
One that reproduces the module's output to the last digit is the cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.check.probe.layouts import Weights, interleaved
from polyhead.check.subject import difference

__all__ = ["Hypothesis", "explanation", "plain_attention"]


@dataclass(frozen=True)
class Hypothesis:
    """A changed attention.

    Attributes:
        cause: description of the change, as reported.
        harmless: True if it is an equivalent form of the same attention.
        compute: output from x and weights.
    """

    cause: str
    compute: Callable[[Tensor, Weights], Tensor]
    harmless: bool = False


def plain_attention(
    x: Tensor,
    weights: Weights,
    *,
    allowed: Tensor | None = None,
    scale: float | None = None,
    axis: int = -1,
    mask_how: str = "before",
    split: str = "transpose",
    merge: str = "transpose",
    grouping: str = "in order",
    turned: bool = False,
    roles: str = "qkv",
    residual: bool = False,
) -> Tensor:
    """Attention of x (B, T, d_in) in plain torch, with an option for a mistake in every step."""
    B, T, _ = x.shape
    H = weights.num_heads
    D = weights.query.shape[0] // H
    G = weights.key.shape[0] // D

    def heads(weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
        projected = F.linear(x, weight, bias)
        if split == "view":
            return projected.view(B, count, T, -1)
        return projected.view(B, T, count, -1).transpose(1, 2)

    query = heads(weights.query, weights.query_bias, H)
    key = heads(weights.key, weights.key_bias, G)
    value = heads(weights.value, weights.value_bias, G)
    if grouping == "tiled":
        key, value = (t.repeat(1, H // G, 1, 1) for t in (key, value))
    else:
        key, value = (t.repeat_interleave(H // G, dim=1) for t in (key, value))
    by_role = {"q": query, "k": key, "v": value}
    query, key, value = (by_role[role] for role in roles)
    scores = query @ key.mT * (D**-0.5 if scale is None else scale)
    scores = scores.mT if turned else scores
    if allowed is not None and mask_how == "before":
        scores = scores.masked_fill(~allowed, -math.inf)
    elif allowed is not None and mask_how == "multiplied":
        scores = scores * allowed
    elif allowed is not None and mask_how == "added":
        scores = scores + allowed
    attention = torch.softmax(scores, dim=axis)
    if allowed is not None and mask_how == "after":
        attention = attention * allowed
    contexts = attention @ value
    if merge == "view":
        merged = contexts.reshape(B, T, -1)
    elif merge == "features first":
        merged = contexts.permute(0, 2, 3, 1).flatten(2)
    else:
        merged = contexts.transpose(1, 2).flatten(2)
    y = merged if weights.out is None else F.linear(merged, weights.out, weights.out_bias)
    return y + x if residual else y


def explanation(
    actual: Tensor,
    x: Tensor,
    weights: Weights,
    allowed: float,
    *,
    shown: Tensor,
) -> Hypothesis | None:
    """Return the first hypothesis that reproduces the module's output, or None.

    Args:
        actual: the module's output.
        x: its input.
        weights: its weights.
        allowed: tolerance between equal outputs.
        shown: (T, T) mask that the module claims; True = may attend.
    """

    def matches(compute: Callable[[Tensor, Weights], Tensor]) -> bool:
        try:
            y = compute(x, weights)
        except (RuntimeError, IndexError):  # these shapes rule this mistake out
            return False
        return y.shape == actual.shape and bool(difference(y, actual).max() <= allowed)

    with torch.no_grad():
        mask = shown.to(x.device)
        for hypothesis in _hypotheses(weights, mask):
            if matches(hypothesis.compute):
                return hypothesis
        scale = _fitted_scale(actual, x, weights, mask)
        fitted = lambda x, w: plain_attention(x, w, allowed=mask, scale=scale)  # noqa: E731
        if matches(fitted):
            expected = (weights.query.shape[0] // weights.num_heads) ** -0.5
            if abs(scale / expected - 1) < 4 * torch.finfo(torch.float32).eps:
                return Hypothesis("its scale is rounded to float32", fitted, harmless=True)
            return Hypothesis(f"wrong scale: {scale:.4g}; expected {expected:.4g}", fitted)
    return None


def _fitted_scale(actual: Tensor, x: Tensor, weights: Weights, mask: Tensor) -> float:
    """Scale that best fits the output: grid search, then golden-section search."""

    def misfit(log_scale: float) -> float:
        y = plain_attention(x, weights, allowed=mask, scale=math.exp(log_scale))
        return (y - actual).square().sum().item() if y.shape == actual.shape else 0.0

    step = 0.25
    best = min((step * i for i in range(-28, 17)), key=misfit)
    low, high = best - step, best + step
    for _ in range(80):
        left, right = high - (high - low) * 0.618034, low + (high - low) * 0.618034
        low, high = (low, right) if misfit(left) < misfit(right) else (left, high)
    return math.exp((low + high) / 2)


def _hypotheses(weights: Weights, shown: Tensor) -> Iterator[Hypothesis]:
    mask = None if shown.all() else shown
    H = weights.num_heads
    D = weights.query.shape[0] // H

    def varied(cause: str, **change: object) -> Hypothesis:
        options = {"allowed": mask} | change
        return Hypothesis(cause, lambda x, w: plain_attention(x, w, **options))  # type: ignore[arg-type]

    for of in ("features", "heads"):
        yield Hypothesis(
            f"rows in another common order ({of} first)",
            lambda x, w, of=of: plain_attention(x, interleaved(w, of), allowed=mask),  # type: ignore[misc]
            harmless=True,
        )
    yield Hypothesis(
        "the input is added to the output",
        lambda x, w: plain_attention(x, w, allowed=mask, residual=True),
        harmless=True,
    )
    for scale, words in _scales(D, H):
        yield varied(f"{words}; expected 1 / sqrt(head_dim)", scale=scale)
    yield varied("softmax over the wrong axis: queries instead of keys", axis=-2)
    yield varied("softmax over the wrong axis: heads instead of keys", axis=1)
    yield varied("softmax over the wrong axis: over batch rows and not over keys", axis=0)
    yield varied("heads merged without transposing back first", merge="view")
    yield varied("heads merged feature by feature: transposed twice", merge="features first")
    yield varied("heads split by a view without a transpose", split="view")
    yield varied(
        "heads split and merged by a view, without transposes",
        split="view",
        merge="view",
    )
    yield varied("KV heads shared in another order: tiled, not interleaved", grouping="tiled")
    yield varied("scores transposed: key query^T instead of query key^T", turned=True)
    yield varied("keys and queries are swapped", roles="kqv")
    yield varied("keys and values are swapped", roles="qvk")
    yield varied("the queries are also used as keys", roles="qqv")
    yield varied("the keys are also used as values", roles="qkk")
    yield varied("the values are also used as keys", roles="qvv")
    without = lambda x, w: plain_attention(x, replace(w, out=None), allowed=mask)  # noqa: E731
    yield Hypothesis("the output projection is not applied", without)
    if mask is not None:
        yield from _mask_mistakes(varied, mask)


def _scales(D: int, H: int) -> list[tuple[float, str]]:
    return [
        (1.0, "missing scale"),
        (1 / D, "wrong scale: 1 / head_dim"),
        ((D * H) ** -0.5, "wrong scale: 1 / sqrt(num_heads * head_dim)"),
        (H**-0.5, "wrong scale: 1 / sqrt(num_heads)"),
        (D**0.5, "wrong scale: multiplied by sqrt(head_dim)"),
        (D**-0.25, "wrong scale: the square root is taken twice"),
    ]


def _mask_mistakes(varied: Callable[..., Hypothesis], mask: Tensor) -> Iterator[Hypothesis]:
    ones = torch.ones_like(mask)
    causal = not mask.triu(1).any()
    yield varied("no mask reaches the scores", allowed=None)
    yield varied("inverted mask: True and False are swapped", allowed=~mask)
    yield varied("inverted mask: True and False are swapped", allowed=~mask | ones.triu().tril())
    yield varied("mask applied after the softmax, without renormalizing", mask_how="after")
    yield varied("masked scores are 0 instead of -inf", mask_how="multiplied")
    yield varied("a boolean mask is added to the scores", mask_how="added")
    yield varied("a boolean mask is added to the scores", mask_how="added", allowed=~mask)
    if causal:
        yield varied(
            "off-by-one mask: every token also attends to the next one", allowed=ones.tril(1)
        )
        yield varied("off-by-one mask: no token attends to itself", allowed=ones.tril(-1))
    window = int(mask[-1].sum())
    if window < len(mask) and mask[-1, -window:].all():
        for wrong in (window + 1, window - 1):
            yield varied(
                f"window off by one: {wrong} tokens instead of {window}",
                allowed=(ones.triu(1 - wrong) & ones.tril(0 if causal else wrong - 1)),
            )
