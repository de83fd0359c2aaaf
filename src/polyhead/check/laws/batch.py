"""Laws of batch rows: they know nothing of each other."""

from __future__ import annotations

import torch

from polyhead.check.law import Verdict, broken, holds, law
from polyhead.check.subject import Subject, by, difference

__all__ = ["LAWS"]


@law
def batch_rows_are_independent(subject: Subject) -> Verdict:
    """What one batch row gives does not depend on what is in another.

    Why: else a user's text reaches another user's answer.

    Would have caught: a reshape that mixes batch and heads, normalising over the batch, packed
    documents that attend to each other.
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
    """Batch rows in another order give the same outputs in that order.

    Why: a row's place in the batch is no information.

    Would have caught: a mask or a cache indexed by the wrong row.
    """
    x, order = subject.input(3), [2, 0, 1]
    apart = difference(subject.run(x[order]), subject.run(x)[order])
    if apart.max() > subject.allowed(x):
        return broken(f"rows in another order gave other outputs, by {by(apart)}")
    return holds()


@law
def batch_of_one_agrees(subject: Subject) -> Verdict:
    """A row alone gives what it gives in a batch.

    Why: models are trained in batches and used one text at a time.

    Would have caught: `squeeze()` without an axis, broadcasting that only fits a batch of one.
    """
    x = subject.input(3)
    alone = torch.cat([subject.run(row[None]) for row in x])
    apart = difference(alone, subject.run(x))
    if apart.max() > subject.allowed(x):
        return broken(f"a row alone gave another output than in a batch, by {by(apart)}")
    return holds()


LAWS = (
    batch_rows_are_independent,
    batch_rows_permute,
    batch_of_one_agrees,
)
