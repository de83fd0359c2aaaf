"""Laws of the batch: batch rows are independent."""

from __future__ import annotations

import torch

from polyhead.check.law import Verdict, broken, holds, law
from polyhead.check.subject import Subject, by, difference

__all__ = ["LAWS"]


@law
def batch_rows_are_independent(subject: Subject) -> Verdict:
    """The output of one batch row does not depend on another row.

    Why: otherwise one user's text leaks into another user's output.

    Would have caught: a reshape that mixes batch and heads, a norm over the batch, packed documents
    that attend to each other.
    """
    x = subject.input(3)
    changed = x.clone()
    changed[1] = subject.input(3, salt=1)[1]
    apart = difference(subject.run(changed), subject.run(x))[[0, 2]]
    if apart.max() > subject.allowed(x):
        row = (0, 2)[int(apart.amax(dim=(1, 2)).argmax())]
        return broken(f"the output of batch row {row} changed by {by(apart)} when row 1 changed")
    return holds()


@law
def batch_rows_permute(subject: Subject) -> Verdict:
    """Permuting the batch rows permutes the outputs.

    Why: the index of a row in the batch carries no information.

    Would have caught: a mask or a cache indexed by the wrong row.
    """
    x, order = subject.input(3), [2, 0, 1]
    apart = difference(subject.run(x[order]), subject.run(x)[order])
    if apart.max() > subject.allowed(x):
        return broken(f"permuted batch rows gave different outputs, by {by(apart)}")
    return holds()


@law
def batch_of_one_agrees(subject: Subject) -> Verdict:
    """A batch of one row gives the same output as that row in a larger batch.

    Why: models are trained on batches and often run on a single sequence.

    Would have caught: `squeeze()` without a dimension, broadcasting that only fits a batch of one.
    """
    x = subject.input(3)
    alone = torch.cat([subject.run(row[None]) for row in x])
    apart = difference(alone, subject.run(x))
    if apart.max() > subject.allowed(x):
        return broken(f"a single row gave a different output than in a batch, by {by(apart)}")
    return holds()


LAWS = (
    batch_rows_are_independent,
    batch_rows_permute,
    batch_of_one_agrees,
)
