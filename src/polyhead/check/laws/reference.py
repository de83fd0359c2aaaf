"""Laws of the reference: modules with a known weight layout match it in every digit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from polyhead.check.diagnose.known_mistakes import Hypothesis, explanation
from polyhead.check.law import NotApplicable, Outcome, Verdict, broken, holds, law
from polyhead.check.probe.definition import CoreJudged, defined_output, judged_by_its_core
from polyhead.check.probe.heads import need_no_positions, need_plain, out_projection
from polyhead.check.probe.layouts import Weights, recognise
from polyhead.check.subject import Claims, Subject, by, difference
from polyhead.convert import from_transformers
from polyhead.errors import PolyheadError

__all__ = ["LAWS"]


@law
def output_matches_reference(subject: Subject) -> Verdict:
    """The output is softmax(scale * q k^T) v, computed from the module's weights in float64.

    Why: other laws test single properties; this one tests the whole output. Many kinds of wrong
    attention train, only worse. (The row order of a fused weight, and operations without weights
    around the attention, are learned and reported.)

    Would have caught: a missing scale, heads merged without transposing back, KV heads in another
    order, softmax over the wrong axis: all found in published code.
    """
    x = subject.input(2)
    actual = subject.run(x)
    mistake, weights = None, None
    try:
        defined, weights = _definition(subject)
    except NotApplicable as reason:
        unknown = reason
    else:
        allowed = 4 * subject.allowed(x)
        with torch.no_grad():
            apart = difference(actual, defined(x))
        if apart.max() <= allowed:
            return holds()
        off = f"the output differs from the reference by {by(apart)}"
        if weights is None:
            return broken(off)
        claims = subject.claims
        mistake = explanation(actual, x, weights, allowed, shown=claims.shown(subject.T))
        if mistake is not None and mistake.harmless:
            return holds(mistake.cause)
        if subject.weights is not None:
            return _told(off, mistake)
    try:
        verdict = judged_by_its_core(subject)
    except NotApplicable as reason:
        verdict = None
        unknown = reason if weights is not None else unknown
    if verdict is not None and (mistake is None or verdict.outcome is not Outcome.BROKEN):
        return verdict
    if mistake is not None:
        return _told(off, mistake)
    raise unknown


@law
def gradients_match_reference(subject: Subject) -> Verdict:
    """The gradients of the input and of the weights match the reference.

    Why: the backward pass can be wrong while the forward pass is right: kernels write both by hand.

    Would have caught: gradients of shared KV heads that are not summed over their group.
    """
    if subject.dtype != torch.float64:
        raise NotApplicable("the reference runs in float64")
    x = subject.input(2).requires_grad_()
    try:
        defined, weights = _definition(subject)
    except NotApplicable as reason:
        return _gradients_of_its_core(subject, str(reason))
    if weights is None:
        raise NotApplicable("it is compared with a converted copy, which has other weights")
    parameters = [x, *(p for p in subject.exact.parameters() if p.requires_grad)]
    direction = subject.input(2, salt=3)[..., :1]
    with torch.enable_grad():
        expected, actual = defined(x), subject.call(subject.exact, x).output
        if difference(actual.detach(), expected.detach()).max() > 4 * subject.allowed(x.detach()):
            return _gradients_of_its_core(subject, "its output already differs from the reference")
        pairs = [
            torch.autograd.grad((y * direction).sum(), parameters, allow_unused=True)
            for y in (actual, expected)
        ]
    return _same_gradients(pairs, 16 * subject.allowed(x.detach()) * x.numel())


def _gradients_of_its_core(subject: Subject, reason: str) -> Verdict:
    try:
        judged = CoreJudged.of(subject)
    except NotApplicable:
        raise NotApplicable(reason) from None
    if judged.apart > judged.allowed:
        raise NotApplicable("its output already differs from the reference")
    given = judged.projected.clone().requires_grad_()
    direction = subject.input(salt=3)[0, :, :1]
    with torch.enable_grad():
        pairs = [
            torch.autograd.grad((run(given) * direction).sum(), given)
            for run in (judged.actual, judged.defined)
        ]
    return _same_gradients(pairs, 16 * judged.allowed * given.numel())


def _same_gradients(pairs: Sequence[Sequence[Tensor | None]], allowed: float) -> Verdict:
    for theirs, exact in zip(*pairs, strict=True):
        if theirs is None or exact is None:
            continue
        apart = difference(theirs, exact)
        if apart.max() > allowed:
            return broken(f"a gradient differs from the reference by {by(apart)}")
    return holds()


def _told(off: str, mistake: Hypothesis | None) -> Verdict:
    if mistake is None:
        return broken(f"{off}; it matches no known mistake")
    return broken(
        f"{off}, and exactly matches a known mistake: {mistake.cause}", cause=mistake.cause
    )


def _definition(subject: Subject) -> tuple[Callable[[Tensor], Tensor], Weights | None]:
    """Expected output as a function of the input, and the weights it uses."""
    if subject.calling.style == "transformers":
        out_projection(subject)  # or other operations surround the attention
        return _converted(subject), None
    claims = subject.claims
    need_no_positions(subject)
    if subject.weights is not None:
        if claims.num_heads is None:
            raise NotApplicable("the number of heads is unknown; pass num_heads=")
        weights = Weights(num_heads=claims.num_heads, **subject.weights(subject.exact))
        return _from_weights(claims, weights), weights
    need_plain(subject)
    weights = recognise(subject.exact, claims.num_heads)
    if weights.query.shape[1] != claims.d_in:
        raise NotApplicable("unknown layout: its query layer receives parts of x")
    return _from_weights(claims, weights), weights


def _from_weights(claims: Claims, weights: Weights) -> Callable[[Tensor], Tensor]:
    return lambda x: defined_output(x, weights, claims.shown(x.shape[1]), claims.scale)


def _converted(subject: Subject) -> nn.Module:
    try:
        return from_transformers(subject.exact).to(subject.dtype).eval()
    except PolyheadError as error:
        raise NotApplicable(f"unknown layout: {error}") from None


LAWS = (
    output_matches_reference,
    gradients_match_reference,
)
