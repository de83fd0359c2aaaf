"""Laws of the definition: where the layout of the weights is known, every digit can be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polyhead.call import AttentionCall, AuxRequest
from polyhead.check.facts import band
from polyhead.check.heads import out_projection
from polyhead.check.hypotheses import explanation
from polyhead.check.law import NotApplicable, Verdict, broken, holds, module_law
from polyhead.check.layouts import Weights, recognise
from polyhead.check.subject import Claims, Subject, by, difference
from polyhead.convert import from_transformers
from polyhead.errors import ConversionError

__all__ = ["defined_output"]


@module_law
def output_is_the_definitions(subject: Subject) -> Verdict:
    """The output is softmax(scale * q k^T) v, computed from the module's weights in float64.

    Why: every other law leaves something open; this one does not. Wrong attention of many kinds
    trains, only worse.

    Would have caught: a missing scale, heads merged without transposing back, key heads in another
    order, softmax over the wrong axis: all found in published code.
    """
    x = subject.input(2)
    actual = subject.run(x)
    defined, weights = _definition(subject)
    with torch.no_grad():
        apart = difference(actual, defined(x))
    allowed = 4 * subject.allowed(x)
    if apart.max() <= allowed:
        return holds()
    if weights is None:
        return broken(f"the output is {by(apart)} off the definition")

    found = explanation(
        actual, x, weights, allowed, causal=subject.claims.causal, window=subject.claims.window
    )
    if found is None:
        return broken(f"the output is {by(apart)} off the definition; no usual mistake explains it")
    if found.harmless:
        return holds(found.cause)
    return broken(
        f"the output is {by(apart)} off the definition, and exactly that of this mistake: "
        f"{found.cause}",
        cause=found.cause,
    )


@module_law
def gradients_are_the_definitions(subject: Subject) -> Verdict:
    """The gradients of the input and of the weights are those of the definition.

    Why: a forward pass can be right and its backward wrong: kernels have both by hand.

    Would have caught: gradients of shared key heads that are not summed over their group.
    """
    if subject.dtype != torch.float64:
        raise NotApplicable("the definition runs in float64")
    x = subject.input(2).requires_grad_()
    defined, weights = _definition(subject)
    if weights is None:
        raise NotApplicable("it is converted, and its weights with it")
    parameters = [x, *(p for p in subject.exact.parameters() if p.requires_grad)]
    direction = subject.input(2, salt=3)[..., :1]
    with torch.enable_grad():
        expected, actual = defined(x), subject.call(subject.exact, x).output
        if difference(actual.detach(), expected.detach()).max() > 4 * subject.allowed(x.detach()):
            raise NotApplicable("its output already is not the definition's, or in another order")
        pairs = [
            torch.autograd.grad((y * direction).sum(), parameters, allow_unused=True)
            for y in (actual, expected)
        ]
    allowed = 16 * subject.allowed(x.detach()) * x.numel()
    for theirs, exact in zip(*pairs, strict=True):
        if theirs is None or exact is None:
            continue
        apart = difference(theirs, exact)
        if apart.max() > allowed:
            return broken(f"a gradient is {by(apart)} off the definition's")
    return holds()


def _definition(subject: Subject) -> tuple[Callable[[Tensor], Tensor], Weights | None]:
    """What the output should be, as a function of the input, and the weights it uses."""
    if subject.calling.style == "transformers":
        out_projection(subject)  # or there is more around the attention
        return _converted(subject), None
    claims = subject.claims
    if claims.positions is not None:
        raise NotApplicable(f"it has positions ({claims.how.get('positions', claims.positions)})")
    if subject.weights is not None:
        if claims.num_heads is None:
            raise NotApplicable("the number of heads is not known; pass num_heads=")
        weights = Weights(num_heads=claims.num_heads, **subject.weights(subject.exact))
        return _from_weights(claims, weights), weights
    if claims.features:
        raise NotApplicable(f"it is more than plain attention ({', '.join(claims.features)})")
    weights = recognise(subject.exact, claims.num_heads)
    if weights.query.shape[1] != claims.d_in:
        raise NotApplicable("its layout is not known: its queries' layer is given parts of x")
    return _from_weights(claims, weights), weights


def _from_weights(claims: Claims, weights: Weights) -> Callable[[Tensor], Tensor]:
    return lambda x: defined_output(x, weights, claims.causal, claims.window, claims.scale)


def _converted(subject: Subject) -> nn.Module:
    try:
        return from_transformers(subject.exact).to(subject.dtype).eval()
    except ConversionError as error:
        raise NotApplicable(f"its layout is not known: {error}") from None


def defined_output(
    x: Tensor, weights: Weights, causal: bool, window: int | None, scale: float | None = None
) -> Tensor:
    """What attention with these weights gives, by the definition that every backend is held to."""
    from polyhead.backends.reference import run
    from polyhead.mask import dense

    H = weights.num_heads
    D = weights.query.shape[0] // H
    G = weights.key.shape[0] // D
    parts = (
        (weights.query, weights.query_bias, H),
        (weights.key, weights.key_bias, G),
        (weights.value, weights.value_bias, G),
    )
    query, key, value = (
        torch.nn.functional.linear(x, w, b).unflatten(2, (count, -1)).transpose(1, 2)
        for w, b, count in parts
    )
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=dense(band(x.shape[1], causal, window).to(x.device)),
        bias=None,
        scale=D**-0.5 if scale is None else scale,
        softcap=None,
        sinks=None,
        alibi_slopes=None,
        dropout=0.0,
        aux=AuxRequest(),
    )
    merged = run(call)[0].transpose(1, 2).flatten(2)
    if weights.out is None:
        return merged
    return torch.nn.functional.linear(merged, weights.out, weights.out_bias)
