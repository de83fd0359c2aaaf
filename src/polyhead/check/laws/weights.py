"""Laws of attention weights, for modules that return them."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law
from polyhead.check.probe.heads import contexts_of, need_plain_values, shares_of
from polyhead.check.probe.sight import band
from polyhead.check.subject import Subject, by, difference

__all__ = ["LAWS"]


def need_weights(subject: Subject, x: Tensor) -> Tensor:
    """Attention weights (B, H, T, T) of a call in evaluation."""
    with torch.no_grad():
        weights = subject.call(subject.exact, x, weights=True).weights
    if weights is None:
        raise NotApplicable("it returns no attention weights")
    return weights


@law
def weights_sum_to_one(subject: Subject) -> Verdict:
    """The attention weights of a query are not negative and sum to 1 over the keys.

    Why: they are a probability distribution over the keys.

    Would have caught: softmax over the wrong axis, weights returned after dropout, scores returned
    in place of weights.
    """
    x = subject.input(2)
    weights = need_weights(subject, x)
    if weights.min() < 0:
        return broken(f"there is a weight of {weights.min():.2g}")
    if "sinks" in subject.claims.features:
        raise NotApplicable("it has attention sinks, which take weight")
    total = weights.sum(dim=-1)
    apart = difference(total, torch.ones_like(total))
    if apart.max() > 4 * subject.allowed(x):
        rows = weights.sum(dim=-2)
        hint = "; they sum to 1 over queries" if torch.allclose(rows, torch.ones_like(rows)) else ""
        return broken(f"the weights of a query do not sum to 1 over keys, by {by(apart)}{hint}")
    return holds()


@law
def weights_hide_the_future(subject: Subject) -> Verdict:
    """In a causal module the weight on a later token is zero.

    Why: the attention map of a causal head is a lower triangle.

    Would have caught: keras, which dropped the causal mask whenever weights were requested.
    """
    if not subject.claims.causal:
        raise NotApplicable("it is not causal")
    weights = need_weights(subject, subject.input(2))
    T = weights.shape[-1]
    later = weights.masked_fill(band(T, True, None).to(weights.device), 0.0)
    if later.abs().max() > 0:
        return broken(f"there is a weight of {later.abs().max():.2g} on a later token")
    return holds()


@law
def asking_for_weights_changes_nothing(subject: Subject) -> Verdict:
    """The output is the same with and without requested weights.

    Why: inspection must show the model that runs.

    Would have caught: modules that run another kernel, without the mask or with dropout, as soon
    as weights are requested.
    """
    x = subject.input(2)
    need_weights(subject, x)
    if subject.calling.weights is None:
        raise NotApplicable("it always returns weights")
    with torch.no_grad():
        asked = subject.call(subject.exact, x, weights=True).output
    apart = difference(asked, subject.run(x))
    if apart.max() > subject.allowed(x):
        return broken(f"with requested weights the output differs by {by(apart)}")
    return holds()


@law
def weights_explain_the_output(subject: Subject) -> Verdict:
    """The context of a head is its weights times its values, and a value depends on its token
    alone.

    Why: weights that did not produce the output explain nothing.

    Would have caught: weights returned before the mask, or of another head; weights averaged over
    heads after the output was computed.
    """
    H = subject.claims.num_heads
    if subject.claims.features:
        raise NotApplicable(
            f"it is more than plain attention ({', '.join(subject.claims.features)})"
        )
    x = subject.input(2)
    weights = need_weights(subject, x)
    if weights.shape[1] != H:
        raise NotApplicable(f"it returns weights averaged over heads ({weights.shape[1]} head)")
    # Only the first token differs, so the values of all others must be equal.
    x[1, 1:] = x[0, 1:]
    weights = need_weights(subject, x)
    with torch.no_grad():
        contexts = contexts_of(subject, subject.exact, x).transpose(1, 2)
    if torch.linalg.cond(weights).max() > 1e6:
        raise NotApplicable(
            "its weights cannot be inverted: several tokens have nearly equal weights"
        )
    if subject.notes.get("gated"):
        raise NotApplicable("its heads are gated")
    values = torch.linalg.solve(weights, contexts)[:, :, 1:]
    apart = difference(values[0], values[1])
    allowed = subject.allowed(x) * float(torch.linalg.cond(weights).max())
    if apart.max() > 16 * allowed:
        return broken(
            "the weights did not produce the output: the values solved from them differ by "
            f"{by(apart)} between two sequences, at identical tokens"
        )
    return holds()


@law
def contexts_are_weighted_means(subject: Subject) -> Verdict:
    """Over two tokens, the context of each head is w times one value and 1 - w times the other.

    Why: attention is a weighted mean, in every head, for any scores.

    Would have caught: softmax over queries or heads in an encoder, where no causal mask exposes it.
    """
    need_plain_values(subject)
    if subject.claims.window == 1:
        raise NotApplicable("its window is one token")
    misfit, shares = shares_of(subject, subject.input(1, 2))
    allowed = 16 * subject.allowed(subject.input(1, 2))
    if misfit > allowed:
        return broken(
            f"a head's context over two tokens is not a weighted mean of their values, by "
            f"{by(misfit)}: are heads split along the wrong axis?"
        )
    totals = shares[0].sum(dim=-1)
    off = difference(totals, torch.ones_like(totals))
    if off.max() > 1e3 * allowed:
        wrong = totals[off.argmax()].item()
        return broken(f"the weights of two tokens sum to {wrong:.3g}, not to 1")
    return holds()


LAWS = (
    weights_sum_to_one,
    weights_hide_the_future,
    asking_for_weights_changes_nothing,
    weights_explain_the_output,
    contexts_are_weighted_means,
)
