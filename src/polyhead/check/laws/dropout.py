"""Laws of dropout: on weights, in training only, and fair."""

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
    """In training, the output averaged over many dropout masks is that of evaluation.

    Why: kept weights grow by 1 / (1 - p), so that nothing shifts when dropout is switched off.

    Would have caught: dropout on scores before the softmax, weights divided by their sum again
    after dropout, a missing 1 / (1 - p).
    """
    x = subject.input()
    trained = subject.copy().train()
    need_dropout(subject, trained)
    out_projection(subject)  # or what is behind the attention bends the mean
    many = x.expand(512, -1, -1)
    with torch.no_grad():
        try:
            expected = contexts_of(subject, subject.exact, x)
            drawn = contexts_of(subject, trained, many)
        except NotApplicable:
            expected = subject.run(x)
            drawn = subject.call(trained, many).output
    # One number a draw: along the expected output, so that many small shifts add up.
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
    """Dropout acts on attention weights: each is dropped, or kept and larger by one factor.

    Why: it is what the paper and the lecture do. Of two tokens a head's context is w times one's
    value and u times the other's; with dropout w and u are 0, or what they were times 1 / (1 - p).

    Would have caught: dropout on scores before the softmax, which drops nothing; on values or
    contexts, feature by feature; kept weights not scaled, or divided by their sum again.
    """
    module = subject.copy().train()
    need_dropout(subject, module)
    need_plain_values(subject)
    misfit, kept = shares_of(subject, subject.input(1, 2))
    drawn_misfit, drawn = shares_of(subject, subject.input(1, 2), module=module, draws=64)
    allowed = 16 * subject.allowed(subject.input(1, 2))
    if misfit > allowed:
        raise NotApplicable("its contexts are no means of values without dropout either")
    if drawn_misfit > allowed:
        return broken(
            "of one head's context some features were dropped and others kept: dropout acts on "
            "features, not on attention weights",
            dropped="features",
        )
    factor = drawn / kept
    rounding = 1e3 * allowed / float(kept.abs().min())
    if rounding > 1e-3:
        raise NotApplicable("its rounding hides by how much kept weights are scaled")
    if (factor - 1).abs().max() <= rounding:
        return reported("dropout acts behind the heads, not on attention weights")
    dropped = factor.abs() <= rounding
    if not dropped.any():
        return broken(
            "weights change in training and none is ever dropped: dropout acts on scores, before "
            "the softmax",
            dropped="scores",
        )
    scaled = factor[~dropped]
    if scaled.numel() and scaled.max() - scaled.min() > rounding:
        return broken(
            f"what is kept is multiplied by {scaled.min():.3g} here and by {scaled.max():.3g} "
            "there: weights are divided by their sum again after dropout",
            dropped="renormalised",
        )
    if scaled.numel() and scaled.max() <= 1 + rounding:
        return broken("kept weights are not scaled by 1 / (1 - p)", dropped="unscaled")
    return holds()


def need_dropout(subject: Subject, trained: nn.Module) -> None:
    if not draws_random_numbers(subject, trained):
        raise NotApplicable("training draws no random numbers: there is no dropout")


LAWS = (
    dropout_is_unbiased,
    dropout_drops_weights,
)
