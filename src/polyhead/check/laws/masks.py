"""Laws of the mask argument: what is hidden has no influence, what is shown keeps it."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law, reported
from polyhead.check.probe.heads import need_no_absolute_positions
from polyhead.check.subject import Subject, by, difference

__all__ = ["LAWS"]


def need_mask(subject: Subject) -> None:
    if subject.calling.mask is None:
        raise NotApplicable("it has no mask argument that is known")


def hiding(subject: Subject, *tokens: int, B: int = 2, T: int | None = None) -> Tensor:
    """The mask that hides these tokens from everybody."""
    hidden = torch.zeros(B, T or subject.T, dtype=torch.bool)
    hidden[:, list(tokens)] = True
    return subject.showing(hidden)


@law
def mask_that_shows_all_changes_nothing(subject: Subject) -> Verdict:
    """A mask that hides nothing gives the output of no mask.

    Why: it is the plainest thing that a mask can say.

    Would have caught: boolean masks that are added to the scores as 0 and 1; polarity turned
    around.
    """
    need_mask(subject)
    x = subject.input(2)
    if subject.calling.supplies is not None:
        raise NotApplicable("the check always passes it a mask")
    apart = difference(subject.run(x, allowed=hiding(subject)), subject.run(x))
    if apart.max() > subject.allowed(x):
        return broken(f"a mask that shows all changed the output, by {by(apart)}")
    return holds()


@law
def hidden_tokens_have_no_influence(subject: Subject) -> Verdict:
    """A token that the mask hides does not change what others give.

    Why: padding is noise, and another document is none of this one's business.

    Would have caught: masks of the wrong polarity (True hides in nn.MultiheadAttention and shows
    in scaled_dot_product_attention), masks that broadcast along the wrong axis.
    """
    need_mask(subject)
    x = subject.input(2)
    j = subject.T // 2
    changed = x.clone()
    changed[:, j] = subject.input(2, salt=1)[:, j]
    mask = hiding(subject, j)
    apart = difference(subject.run(changed, allowed=mask), subject.run(x, allowed=mask))
    apart[:, j] = 0
    if apart.max() > subject.allowed(x):
        t = int(apart.amax(dim=(0, 2)).argmax())
        return broken(
            f"the output at token {t} changed by {by(apart)} when token {j} changed, which the "
            "mask hides",
            hidden_seen=True,
        )
    return holds()


@law
def shown_tokens_keep_their_influence(subject: Subject) -> Verdict:
    """A token that the mask shows still changes what later tokens give.

    Why: a mask of the wrong polarity hides the text and shows the padding.

    Would have caught: `masked_fill(mask, -inf)` for `masked_fill(~mask, -inf)`.
    """
    need_mask(subject)
    x = subject.input(2)
    last = subject.T - 1
    changed = x.clone()
    changed[:, last - 1] = subject.input(2, salt=1)[:, last - 1]
    mask = hiding(subject, 0)
    before, after = subject.run(x, allowed=mask), subject.run(changed, allowed=mask)
    if difference(before, after)[:, last].max() <= subject.allowed(x):
        return broken(
            f"the output at token {last} did not change with token {last - 1}, which a mask of "
            "token 0 leaves shown",
            shown_unseen=True,
        )
    return holds()


@law
def padding_on_the_right_changes_nothing(subject: Subject) -> Verdict:
    """Rows padded on the right, and masked, give at their real tokens what they give alone.

    Why: batches are made of texts of different length.

    Would have caught: padding masks given for queries in place of keys; averages over the padded
    length.
    """
    need_mask(subject)
    return _padded(subject, left=False)


@law
def padding_on_the_left_changes_nothing(subject: Subject) -> Verdict:
    """Rows padded on the left, and masked, give at their real tokens what they give alone.

    Why: it is how batches of prompts are padded for generating.

    Would have caught: empty rows of the padding turning to NaN and spreading; rotary positions
    that are not relative.
    """
    need_mask(subject)
    need_no_absolute_positions(subject)
    if (pattern := subject.claims.pattern) is not None and not pattern.relative:
        raise NotApplicable(f"who sees whom depends on the place in the text ({pattern.words})")
    return _padded(subject, left=True)


def _padded(subject: Subject, *, left: bool) -> Verdict:
    T, pads = subject.T, (1, 3)
    x = subject.input(2)
    hidden = torch.zeros(2, T, dtype=torch.bool)
    mask = subject.calling.mask
    # One that is square says the same of every row.
    rows = range(1 if mask is not None and mask.form == "square" else 2)
    for row in rows:
        n = pads[row]
        hidden[row, :n] = left
        hidden[row, T - n :] |= not left
    batch = x[: len(rows)]
    y = subject.run(batch, allowed=subject.showing(hidden[: len(rows)]))
    for row in rows:
        real = ~hidden[row]
        alone = subject.run(batch[row : row + 1, real])
        apart = difference(y[row, real], alone[0])
        if apart.max() > subject.allowed(x):
            side = "left" if left else "right"
            return broken(
                f"row {row}, with {pads[row]} tokens of padding on the {side}, gave another output "
                f"than alone, by {by(apart)}"
            )
    return holds()


@law
def empty_rows_are_finite(subject: Subject) -> Verdict:
    """A query that may attend to nothing gives a finite output and finite gradients.

    Why: left padding makes such rows. Their NaN is not read, and yet 0 * NaN in the backward pass
    is NaN in every weight. (Of a mask of numbers it is reported and not judged: whoever passes
    -inf for a whole row has asked for it.)

    Would have caught: nn.MultiheadAttention gives NaN in three of four of its configurations.
    """
    need_mask(subject)
    hidden = torch.ones(2, subject.T, dtype=torch.bool)
    mask = subject.calling.mask
    if mask is None or mask.form != "square":
        hidden[1] = False
    # Where it computes in float32 inside, float64's lowest number is infinite there.
    narrow = torch.float32 if subject.precision == torch.float32 else None
    module = subject.exact if narrow is None else subject.copy(narrow)
    x = subject.input(2).to(narrow).requires_grad_()
    with torch.enable_grad():
        y = subject.call(module, x, allowed=subject.showing(hidden)).output
        if not y.isfinite().all():
            told = broken if mask is None or mask.true_means != "add" else reported
            return told("a row whose tokens are all hidden gave numbers that are not finite")
        (gradient,) = torch.autograd.grad(y.sum(), x)
    if not gradient.isfinite().all():
        return broken("a row whose tokens are all hidden gave gradients that are not finite")
    return holds()


LAWS = (
    mask_that_shows_all_changes_nothing,
    hidden_tokens_have_no_influence,
    shown_tokens_keep_their_influence,
    padding_on_the_right_changes_nothing,
    padding_on_the_left_changes_nothing,
    empty_rows_are_finite,
)
