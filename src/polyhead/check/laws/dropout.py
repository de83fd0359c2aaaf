"""Laws of dropout: on attention weights, in training only, unbiased."""

from __future__ import annotations

import torch
from torch import nn

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law, reported
from polyhead.check.probe.heads import contexts_of, need_plain_values, out_projection, shares_of
from polyhead.check.probe.ops import draws_random_numbers
from polyhead.check.subject import Subject

__all__ = ["LAWS"]


@law
def dropout_is_unbiased(subject: Subject) -> Verdict:
    """The mean output over many dropout masks in training is the output in evaluation.

    Why: dropout scales kept weights by 1 / (1 - p), so that nothing shifts when it is switched off.

    Would have caught: dropout on scores before the softmax, weights renormalized after dropout, a
    missing 1 / (1 - p).
    """
    x = subject.input()
    trained = subject.copy().train()
    need_dropout(subject, trained)
    out_projection(subject)  # operations after the attention could bias the mean
    many = x.expand(512, -1, -1)
    with torch.no_grad():
        try:
            expected = contexts_of(subject, subject.exact, x)
            drawn = contexts_of(subject, trained, many)
        except NotApplicable:
            expected = subject.run(x)
            drawn = subject.call(trained, many).output
    # One value per draw: projected on the expected output, so that many small shifts add up.
    direction = expected / expected.square().sum()
    along = ((drawn - expected) * direction).flatten(1).sum(dim=1)
    mean, error = along.mean().item(), along.std().item() / len(along) ** 0.5
    if abs(mean) > max(6 * error, 1e-4):
        return broken(
            f"the mean over {len(along)} dropout masks is {1 + mean:.3f} times the output of "
            f"evaluation, {abs(mean) / error:.0f} standard errors off"
        )
    return holds()


@law
def dropout_drops_weights(subject: Subject) -> Verdict:
    """Dropout acts on attention weights: each is set to 0, or scaled by 1 / (1 - p).

    Why: it is what the paper and the lecture do. Over two tokens, a head's context is w times one
    value and u times the other. With dropout, w and u each become 0 or are scaled by 1 / (1 - p).

    Would have caught: dropout on scores before the softmax, which drops nothing; dropout on
    features of values or contexts; kept weights that are not scaled, or that are renormalized.
    """
    module = subject.copy().train()
    need_dropout(subject, module)
    need_plain_values(subject)
    misfit, kept = shares_of(subject, subject.input(1, 2))
    drawn_misfit, drawn = shares_of(subject, subject.input(1, 2), module=module, draws=64)
    allowed = 16 * subject.allowed(subject.input(1, 2))
    if misfit > allowed:
        raise NotApplicable("its contexts are not weighted means of values, even without dropout")
    if drawn_misfit > allowed:
        return broken(
            "some features of a head's context were dropped and others kept: dropout acts on "
            "features, not on attention weights",
            dropped="features",
        )
    factor = drawn / kept
    rounding = 1e3 * allowed / float(kept.abs().min())
    if rounding > 1e-3:
        raise NotApplicable("the scale of kept weights is lost in rounding")
    if (factor - 1).abs().max() <= rounding:
        return reported("dropout acts after the heads, not on attention weights")
    dropped = factor.abs() <= rounding
    if not dropped.any():
        return broken(
            "weights change in training and none becomes 0: dropout acts on scores, before "
            "the softmax",
            dropped="scores",
        )
    scaled = factor[~dropped]
    if scaled.numel() and scaled.max() - scaled.min() > rounding:
        return broken(
            f"kept weights are scaled by factors from {scaled.min():.3g} to {scaled.max():.3g}: "
            "weights are renormalized after dropout",
            dropped="renormalized",
        )
    if scaled.numel() and scaled.max() <= 1 + rounding:
        return broken("kept weights are not scaled by 1 / (1 - p)", dropped="unscaled")
    return holds()


def need_dropout(subject: Subject, trained: nn.Module) -> None:
    if not draws_random_numbers(subject, trained):
        raise NotApplicable("no dropout: training draws no random numbers")


LAWS = (
    dropout_is_unbiased,
    dropout_drops_weights,
)
