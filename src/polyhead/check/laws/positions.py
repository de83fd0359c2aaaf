"""Laws of order and positions."""

from __future__ import annotations

import re

import torch

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law, reported
from polyhead.check.probe.definition import is_defined_as_seen
from polyhead.check.probe.heads import (
    need_no_absolute_positions,
    need_no_positions,
    need_plain_values,
    shares_of,
)
from polyhead.check.probe.rows import BY_PLACE, learned_rows
from polyhead.check.subject import Subject, by, difference

__all__ = ["LAWS"]

_ROTARY = re.compile(r"rope|rotary|inv_freq|freqs|alibi", re.I)


def need_no_pattern(subject: Subject) -> None:
    if (pattern := subject.claims.pattern) is not None:
        raise NotApplicable(f"a token sees some tokens and not others ({pattern.words})")


@law
def permutation_equivariant(subject: Subject) -> Verdict:
    """Without positions, attention reads a set: another order of the tokens seen, same output.

    Why: whatever tells two orders apart is a position, and there should be none. Heads cut out of
    the wrong axis are one by accident.

    Would have caught: `view(B, heads, T, size)` instead of a view and a transpose, in an encoder,
    where no mask is there to be broken.
    """
    claims = subject.claims
    need_no_positions(subject)
    if claims.window is not None:
        raise NotApplicable("it has a window")
    need_no_pattern(subject)
    x = subject.input(2)
    order = torch.arange(subject.T)
    if claims.causal:
        order[:-1] = order[:-1].roll(1)
        before, after = subject.run(x)[:, -1:], subject.run(x[:, order])[:, -1:]
    else:
        order = order.roll(1)
        before, after = subject.run(x)[:, order], subject.run(x[:, order])
    apart = difference(before, after)
    if apart.max() > subject.allowed(x):
        if not subject.sees.equal(claims.shown(subject.T).to(x.device)) and is_defined_as_seen(
            subject
        ):
            raise NotApplicable("it does not see every token that it may")
        _need_plain_scores(subject)
        return broken(
            f"tokens in another order gave another output, by {by(apart)}, though nothing "
            "gives it positions: is it cut into heads along the wrong axis?"
        )
    return holds()


def _need_plain_scores(subject: Subject) -> None:
    """Positions that nothing names act on scores alone; heads that are cut along the wrong axis mix
    tokens before that."""
    try:
        learned_rows(subject)
    except NotApplicable as reason:
        if str(reason) in BY_PLACE:
            raise


@law
def identical_tokens_agree(subject: Subject) -> Verdict:
    """A text of one token, repeated, gives at every place what the token gives alone.

    Why: all values are the same, and weights sum to 1; so their weighted mean is that value,
    whatever the scores, the scale, the mask or the rotary positions.

    Would have caught: softmax over the wrong axis, masking after the softmax without dividing
    again, weights that were never normalised.
    """
    if "sinks" in subject.claims.features:
        raise NotApplicable("it has sinks, which take weight and give no value")
    need_no_absolute_positions(subject)
    token = subject.input(2, 1)
    alone, repeated = subject.run(token), subject.run(token.expand(-1, subject.T, -1))
    apart = difference(repeated, alone.expand_as(repeated))
    if apart.max() > subject.allowed(subject.input(2)):
        t = int(apart.amax(dim=(0, 2)).argmax())
        return broken(
            f"at place {t} of {subject.T} identical tokens the output is another, by "
            f"{by(apart)}, than that of the token alone: weights do not sum to 1 over keys"
        )
    return holds()


@law
def relative_positions_are_relative(subject: Subject) -> Verdict:
    """How much a token prefers its neighbour to itself does not depend on where the two stand.

    Why: rotary positions, ALiBi and learned distances all depend on the distance alone; that is
    why they work behind a cache, behind padding, and for longer texts.

    Would have caught: rotary positions applied to queries and not to keys, or to them in two
    different ways; distances counted from the start of the text.
    """
    claims = subject.claims
    if claims.positions is None:
        raise NotApplicable("it has no positions")
    need_plain_values(subject)
    need_no_pattern(subject)
    if claims.window is not None and claims.window < 3:
        raise NotApplicable(f"its window is {claims.window} tokens")
    x = subject.input(1, 3)
    preferences = []
    for tokens in (x[:, 1:], x):
        misfit, shares = shares_of(subject, tokens)
        if misfit > 16 * subject.allowed(x):
            raise NotApplicable("its contexts are no means of values")
        preferences.append(shares[0, :, -2] / shares[0, :, -1])
    apart = difference(*preferences)
    # Tables of angles are made in float32 whatever the dtype.
    allowed = 64 * subject.allowed(x, torch.float32) * float(preferences[0].abs().max())
    if apart.max() > max(allowed, 64 * subject.allowed(x)):
        return broken(
            f"the last token weighs the one before it against itself by {preferences[0].max():.3g} "
            f"in a text of two, and by {by(apart)} more or less with one token before: its "
            "positions are not relative"
        )
    return holds()


@law
def positions_tell_order(subject: Subject) -> Verdict:
    """With rotary positions or ALiBi, two orders of the same tokens are told apart.

    Why: positions that have no effect are no error anywhere, and the model cannot read.

    Would have caught: rotary positions turned along the heads' axis and not the tokens', tables
    that are made and not applied.
    """
    found = subject.claims.how.get("positions", "")
    positions = subject.claims.positions or ""
    if not _ROTARY.search(positions) or subject.calling.style == "transformers":
        raise NotApplicable("it has no positions that always act")
    if subject.claims.window == 1:
        raise NotApplicable("its window is one token")
    need_no_pattern(subject)
    x = subject.input(1, 3)
    apart = difference(subject.run(x[:, [1, 0, 2]]), subject.run(x))[:, -1]
    if apart.max() > subject.allowed(x):
        return holds()
    told = broken if found.startswith("it has") else reported
    return told(f"the first two tokens swapped give the third the same output, with {positions}")


LAWS = (
    permutation_equivariant,
    identical_tokens_agree,
    relative_positions_are_relative,
    positions_tell_order,
)
