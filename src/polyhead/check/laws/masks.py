"""Laws of the mask argument: masked tokens have no influence, all others keep theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law, reported
from polyhead.check.probe.heads import need_no_absolute_positions
from polyhead.check.subject import Subject, by, difference

__all__ = ["LAWS"]


def need_mask(subject: Subject) -> None:
    if subject.calling.mask is None:
        raise NotApplicable("no known mask argument")


def hiding(subject: Subject, *tokens: int, B: int = 2, T: int | None = None) -> Tensor:
    """Mask argument that excludes these tokens for every query."""
    hidden = torch.zeros(B, T or subject.T, dtype=torch.bool)
    hidden[:, list(tokens)] = True
    return subject.showing(hidden)


@law
def mask_that_shows_all_changes_nothing(subject: Subject) -> Verdict:
    """A mask that excludes no token gives the output without a mask.

    Why: it is the simplest mask.

    Would have caught: boolean masks added to the scores as 0 and 1; inverted polarity.
    """
    need_mask(subject)
    x = subject.input(2)
    if subject.calling.supplies is not None:
        raise NotApplicable("it is always called with a mask")
    apart = difference(subject.run(x, allowed=hiding(subject)), subject.run(x))
    if apart.max() > subject.allowed(x):
        return broken(f"a mask that excludes no token changed the output, by {by(apart)}")
    return holds()


@law
def hidden_tokens_have_no_influence(subject: Subject) -> Verdict:
    """A masked token does not change the outputs at other tokens.

    Why: padding is noise, and other documents must not leak into this one.

    Would have caught: masks of the wrong polarity (True means "ignore" in nn.MultiheadAttention and
    "attend" in scaled_dot_product_attention), masks that broadcast along the wrong axis.
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
            f"the output at token {t} changed by {by(apart)} when the masked token {j} changed",
            hidden_seen=True,
        )
    return holds()


@law
def shown_tokens_keep_their_influence(subject: Subject) -> Verdict:
    """A token that is not masked still changes the outputs at later tokens.

    Why: a mask of the wrong polarity excludes the sequence and keeps the padding.

    Would have caught: `masked_fill(mask, -inf)` in place of `masked_fill(~mask, -inf)`.
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
            f"the output at token {last} did not change with token {last - 1}, though only token 0 "
            "is masked",
            shown_unseen=True,
        )
    return holds()


@law
def padding_on_the_right_changes_nothing(subject: Subject) -> Verdict:
    """Rows with masked padding on the right give, at their real tokens, the output without padding.

    Why: batches contain sequences of different lengths.

    Would have caught: padding masks applied to queries instead of keys; means over the padded
    length.
    """
    need_mask(subject)
    return _padded(subject, left=False)


@law
def padding_on_the_left_changes_nothing(subject: Subject) -> Verdict:
    """Rows with masked padding on the left give, at their real tokens, the output without padding.

    Why: batches of prompts are padded on the left for generation.

    Would have caught: NaN of empty padding rows that spreads; rotary positions that are not
    relative.
    """
    need_mask(subject)
    need_no_absolute_positions(subject)
    if (pattern := subject.claims.pattern) is not None and not pattern.relative:
        raise NotApplicable(
            f"its attention pattern depends on absolute positions ({pattern.words})"
        )
    return _padded(subject, left=True)


def _padded(subject: Subject, *, left: bool) -> Verdict:
    T, pads = subject.T, (1, 3)
    x = subject.input(2)
    hidden = torch.zeros(2, T, dtype=torch.bool)
    mask = subject.calling.mask
    # A square mask is the same for every batch row.
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
                f"row {row}, with {pads[row]} tokens of padding on the {side}, gave a different "
                f"output than without padding, by {by(apart)}"
            )
    return holds()


@law
def empty_rows_are_finite(subject: Subject) -> Verdict:
    """A query that may attend to no key gives a finite output and finite gradients.

    Why: left padding creates such rows. Their NaN is not read, but 0 * NaN in the backward pass is
    NaN in every weight. (With an additive mask it is reported and not judged: -inf for a whole row
    is the caller's choice.)

    Would have caught: nn.MultiheadAttention, which gives NaN in three of four configurations.
    """
    need_mask(subject)
    hidden = torch.ones(2, subject.T, dtype=torch.bool)
    mask = subject.calling.mask
    if mask is None or mask.form != "square":
        hidden[1] = False
    # The lowest float64 value overflows in modules that compute in float32 internally.
    narrow = torch.float32 if subject.precision == torch.float32 else None
    module = subject.exact if narrow is None else subject.copy(narrow)
    x = subject.input(2).to(narrow).requires_grad_()
    with torch.enable_grad():
        y = subject.call(module, x, allowed=subject.showing(hidden)).output
        if not y.isfinite().all():
            told = broken if mask is None or mask.true_means != "add" else reported
            return told("a row of masked tokens only gave an output that is not finite")
        (gradient,) = torch.autograd.grad(y.sum(), x)
    if not gradient.isfinite().all():
        return broken("a row of masked tokens only gave gradients that are not finite")
    return holds()


LAWS = (
    mask_that_shows_all_changes_nothing,
    hidden_tokens_have_no_influence,
    shown_tokens_keep_their_influence,
    padding_on_the_right_changes_nothing,
    padding_on_the_left_changes_nothing,
    empty_rows_are_finite,
)
