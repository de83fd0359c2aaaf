"""Laws of positions and token order."""

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
        raise NotApplicable(f"it has a sparse attention pattern ({pattern.words})")


@law
def permutation_equivariant(subject: Subject) -> Verdict:
    """Without positions, permuting the tokens that a query attends to keeps its output.

    Why: attention without positions is a function of a set. Heads split along the wrong axis act as
    accidental positions.

    Would have caught: `view(B, heads, T, size)` in place of a view and a transpose, in an encoder,
    where no causal mask exposes it.
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
            raise NotApplicable("tokens do not attend to every token they may attend to")
        _need_plain_scores(subject)
        return broken(
            f"permuted tokens gave a different output, by {by(apart)}, though it has no positions: "
            "are heads split along the wrong axis?"
        )
    return holds()


def _need_plain_scores(subject: Subject) -> None:
    """Require that no unnamed positions act on the scores. Positions act on scores alone; heads cut
    along the wrong axis mix tokens before the scores.
    """
    try:
        learned_rows(subject)
    except NotApplicable as reason:
        if str(reason) in BY_PLACE:
            raise


@law
def identical_tokens_agree(subject: Subject) -> Verdict:
    """A sequence of one repeated token gives the output of that token alone at every position.

    Why: all values are equal and weights sum to 1, so their weighted mean is that value, for any
    scores, scale, mask or rotary positions.

    Would have caught: softmax over the wrong axis, masking after the softmax without renormalizing,
    weights that were never normalized.
    """
    if "sinks" in subject.claims.features:
        raise NotApplicable("it has attention sinks, which take weight and have no value")
    need_no_absolute_positions(subject)
    token = subject.input(2, 1)
    alone, repeated = subject.run(token), subject.run(token.expand(-1, subject.T, -1))
    apart = difference(repeated, alone.expand_as(repeated))
    if apart.max() > subject.allowed(subject.input(2)):
        t = int(apart.amax(dim=(0, 2)).argmax())
        return broken(
            f"at position {t} of {subject.T} identical tokens the output differs by {by(apart)} "
            "from that of the token alone: weights do not sum to 1 over keys"
        )
    return holds()


@law
def relative_positions_are_relative(subject: Subject) -> Verdict:
    """The ratio of two adjacent tokens' weights does not depend on their absolute positions.

    Why: rotary positions, ALiBi and learned distances depend on the distance alone; therefore they
    work with a cache, with padding, and for longer sequences.

    Would have caught: rotary positions applied to queries and not to keys, or by two different
    rules; distances counted from the start of the sequence.
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
            raise NotApplicable("its contexts are not weighted means of values")
        preferences.append(shares[0, :, -2] / shares[0, :, -1])
    apart = difference(*preferences)
    # Rotary tables are float32 for every dtype.
    allowed = 64 * subject.allowed(x, torch.float32) * float(preferences[0].abs().max())
    if apart.max() > max(allowed, 64 * subject.allowed(x)):
        return broken(
            f"the last token's weights of the token before it and of itself have the ratio "
            f"{preferences[0].max():.3g} in a sequence of two, and one that differs by {by(apart)} "
            "in a sequence of three: its positions are not relative"
        )
    return holds()


@law
def positions_tell_order(subject: Subject) -> Verdict:
    """With rotary positions or ALiBi, swapping two tokens changes the output.

    Why: positions without effect raise no error, and the model cannot learn word order.

    Would have caught: rotary positions applied along the head axis instead of the token axis,
    tables that are built and not applied.
    """
    found = subject.claims.how.get("positions", "")
    positions = subject.claims.positions or ""
    if not _ROTARY.search(positions) or subject.calling.style == "transformers":
        raise NotApplicable("it has no positions that always have an effect")
    if subject.claims.window == 1:
        raise NotApplicable("its window is one token")
    need_no_pattern(subject)
    x = subject.input(1, 3)
    apart = difference(subject.run(x[:, [1, 0, 2]]), subject.run(x))[:, -1]
    if apart.max() > subject.allowed(x):
        return holds()
    told = broken if found.startswith("it has") else reported
    return told(
        f"swapping the first two tokens does not change the output at the third, with {positions}"
    )


LAWS = (
    permutation_equivariant,
    identical_tokens_agree,
    relative_positions_are_relative,
    positions_tell_order,
)
