"""Laws of functions of query, key and value: on generated calls they equal the definition."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polyhead.check.diagnose.cases import Case, draw, shrink
from polyhead.check.function_subject import FunctionSubject, definition
from polyhead.check.law import NotApplicable, Verdict, broken, holds, law, reported
from polyhead.check.subject import difference, seeded
from polyhead.check.tolerance import as_good_as_eager

__all__ = ["LAWS"]

_COUNT = 12


def _need(subject: FunctionSubject, purpose: str) -> None:
    """polyhead's own functions take every rule as a mask."""
    if not subject.polyhead:
        subject.name_of(purpose)


def _misfit(subject: FunctionSubject, case: Case) -> str | None:
    """How the output of a case is wrong, or None."""
    inputs = case.inputs(subject.dtype)
    actual = subject.run(case, inputs)
    exact = definition(case, [t.double() for t in inputs])
    if actual.shape != exact.shape:
        return f"the shape is {tuple(actual.shape)} and not {tuple(exact.shape)}"
    eager = definition(case, inputs)
    largest_score = inputs[0].double().norm(dim=-1).max() * inputs[1].double().norm(dim=-1).max()
    largest_score *= case.D**-0.5 if case.scale is None else abs(case.scale)
    allowed = as_good_as_eager(eager, exact, largest_score.item(), inputs[2].abs().max().item())
    apart = difference(actual.double(), exact).max().item()
    if apart <= allowed:
        return None
    return f"the output is {apart:.2g} off, allowed are {allowed:.2g}"


def _hold(subject: FunctionSubject, cases: Iterator[Case]) -> Verdict:
    """Every case is right, or the smallest that is wrong is shown."""
    for case in cases:
        if _misfit(subject, case) is not None:
            smallest = shrink(case, lambda c: _still_wrong(subject, c))
            return broken(f"{smallest}: {_misfit(subject, smallest)}", case=str(smallest))
    return holds()


def _still_wrong(subject: FunctionSubject, case: Case) -> bool:
    try:
        return _misfit(subject, case) is not None
    except Exception:  # another fault than the one that is followed
        return False


def _other_length(case: Case, numbers: random.Random) -> int:
    return max(1, case.S + numbers.choice((-3, 1, 4)))


@law
def plain_calls_are_right(subject: FunctionSubject) -> Verdict:
    """softmax(query key^T / sqrt(D)) value, for any sizes, T and S alike and different.

    Why: it is the definition.

    Would have caught: a missing scale, softmax over the wrong axis, sizes swapped.
    """
    same = _hold(subject, draw(subject.seed, _COUNT))
    return same if same.message else _hold(subject, draw(subject.seed, _COUNT, S=_other_length))


@law
def causal_calls_are_right(subject: FunctionSubject) -> Verdict:
    """With is_causal, query t sees keys 0 to t.

    Why: else it reads its answer off the next token.

    Would have caught: masks that are inverted, or off by one.
    """
    _need(subject, "causal")
    return _hold(subject, draw(subject.seed, _COUNT, causal="end"))


@law
def causal_alignment(subject: FunctionSubject) -> Verdict:
    """Where fewer queries than keys stand under is_causal: at the start, or at the end.

    Why: both are in use (torch's function aligns at the start, flash-attention at the end), and a
    cache needs the end. It is reported, and judged only if it is neither.

    Would have caught: flash-attention's change from one to the other in version 2.1.
    """
    _need(subject, "causal")
    verdicts = {
        where: _hold(
            subject,
            draw(subject.seed, _COUNT, causal=where, S=lambda c, _: c.T + 3),
        )
        for where in ("end", "start")
    }
    for where, verdict in verdicts.items():
        if not verdict.message:
            return reported(f"query 0 of fewer queries than keys stands at the {where}")
    return verdicts["end"]


@law
def boolean_masks_are_right(subject: FunctionSubject) -> Verdict:
    """A boolean mask hides what it should hide, and nothing else.

    Why: True shows in scaled_dot_product_attention and hides in nn.MultiheadAttention.

    Would have caught: `masked_fill(mask, -inf)` for `masked_fill(~mask, -inf)`.
    """
    _need(subject, "mask")
    return _hold(subject, draw(subject.seed, _COUNT, mask="boolean"))


@law
def additive_masks_are_right(subject: FunctionSubject) -> Verdict:
    """A mask of numbers is added to the scores; -inf hides.

    Why: it is how transformers passes masks.

    Would have caught: numbers read as booleans: 0 is False, and hides.
    """
    if subject.polyhead:
        raise NotApplicable("its masks are objects; numbers are added by bias=")
    subject.name_of("mask")
    return _hold(subject, draw(subject.seed, _COUNT, mask="additive"))


@law
def empty_rows_stay_finite(subject: FunctionSubject) -> Verdict:
    """A query that may attend to nothing gives zeros, or at least no NaN.

    Why: left padding makes such rows, and their NaN reaches every weight in the backward pass.

    Would have caught: NaN of a softmax of -inf; masks of finfo.min, which give the mean of values.
    """
    _need(subject, "mask")
    for case in draw(subject.seed, 4, mask="empty"):
        row = subject.run(case)[:, :, 0]
        if not row.isfinite().all():
            return broken(f"{case}: an empty row gives numbers that are not finite")
        if row.any():
            return reported("an empty row gives something other than zeros, and finite")
    return holds()


@law
def gqa_matches_reference(subject: FunctionSubject) -> Verdict:
    """With H query heads over G key heads, query head h uses key head h // (H / G).

    Why: checkpoints are made for this order.

    Would have caught: x-transformers groups heads in another order.
    """
    grouped = {"H": lambda case, numbers: case.G * numbers.choice((2, 3))}
    case = next(draw(subject.seed, 1, **grouped))
    try:
        subject.run(case)
    except (RuntimeError, ValueError, TypeError) as error:
        raise NotApplicable(f"it refuses grouped heads: {str(error).splitlines()[0]}") from None
    return _hold(subject, draw(subject.seed, _COUNT, **grouped))


@law
def values_may_have_another_size(subject: FunctionSubject) -> Verdict:
    """Values may have another size than queries and keys.

    Why: multi-head latent attention has such heads.

    Would have caught: outputs made with the shape of the query.
    """
    return _hold(subject, draw(subject.seed, _COUNT, E=lambda case, _: case.D + 2))


@law
def scale_is_obeyed(subject: FunctionSubject) -> Verdict:
    """A scale that is given replaces 1 / sqrt(D).

    Why: many models have one of their own.

    Would have caught: arguments that are accepted and dropped.
    """
    subject.name_of("scale")
    return _hold(subject, draw(subject.seed, _COUNT, scale=0.7))


@law
def softcap_is_obeyed(subject: FunctionSubject) -> Verdict:
    """With softcap c, scores become c tanh(scores / c).

    Why: Gemma 2 is trained with it.

    Would have caught: kernels that drop the softcap in their backward, or without a word.
    """
    subject.name_of("softcap")
    return _hold(subject, draw(subject.seed, _COUNT, softcap=0.8, size=2.0))


@law
def extreme_values_stay_right(subject: FunctionSubject) -> Verdict:
    """Large scores give what they should give, and no NaN.

    Why: trained models have outliers.

    Would have caught: exp() without subtracting the largest score first.
    """
    return _hold(subject, draw(subject.seed, _COUNT, size=30.0))


@law
def rows_and_heads_do_not_mix(subject: FunctionSubject) -> Verdict:
    """What one batch row or head gives does not depend on another.

    Why: heads are independent, and so are users.

    Would have caught: sums over the wrong axis, strides swapped.
    """
    case = Case(B=2, H=3, G=3, T=5, S=5, D=4, E=4, seed=subject.seed)
    inputs = case.inputs(subject.dtype)
    before = subject.run(case, inputs)
    changed = [t.clone() for t in inputs]
    for t, other in zip(
        changed, replace(case, seed=case.seed + 1).inputs(subject.dtype), strict=True
    ):
        t[1, 2] = other[1, 2]
    apart = difference(subject.run(case, changed), before)
    apart[1, 2] = 0
    if apart.max() > 0:
        return broken(f"another row or head changed by {apart.max():.2g} with row 1, head 2")
    return holds()


@law
def every_argument_counts(subject: FunctionSubject) -> Verdict:
    """Each argument that is accepted changes the output.

    Why: what is accepted and dropped is a lie.

    Would have caught: backends that drop a mask or a scale that they do not have.
    """
    case = Case(B=2, H=2, G=2, T=5, S=5, D=4, E=4, seed=subject.seed)
    plain = subject.run(case)
    changes: dict[str, dict[str, object]] = {
        "causal": {"causal": "end"},
        "mask": {"mask": "boolean"},
        "scale": {"scale": 2.0},
        "softcap": {"softcap": 0.3},
    }
    for purpose, change in changes.items():
        if purpose not in subject.names and not (subject.polyhead and purpose == "causal"):
            continue
        if torch.equal(subject.run(replace(case, **change)), plain):  # type: ignore[arg-type]
            name = subject.names.get(purpose, purpose)
            return broken(f"{name} is accepted and changes nothing")
    return holds()


@law
def dropout_keeps_the_mean(subject: FunctionSubject) -> Verdict:
    """With dropout p, the mean over many draws is the output without it.

    Why: kept weights grow by 1 / (1 - p).

    Would have caught: dropout that is accepted and dropped; weights not scaled up.
    """
    name = subject.name_of("dropout")
    case = Case(B=400, H=2, G=2, T=3, S=3, D=4, E=4, seed=subject.seed)
    query, key, _ = case.inputs(subject.dtype)
    ones = torch.ones(case.B, case.G, case.S, case.E, dtype=subject.dtype)
    with seeded(subject.seed, torch.device("cpu")):
        try:
            kept = subject.run(case, (query, key, ones), **{name: 0.3}).double()
        except TypeError:  # where it takes a layer, as the Annotated Transformer does
            layer = torch.nn.Dropout(0.3)
            kept = subject.run(case, (query, key, ones), **{name: layer}).double()
    if kept.std() < 1e-6:
        return broken(f"{name}=0.3 is accepted and drops nothing")
    rows = kept.mean(dim=(1, 2, 3))
    mean, error = rows.mean().item(), rows.std().item() / case.B**0.5
    if abs(mean - 1) > 6 * error:
        return broken(f"what is kept sums to {mean:.3f} on average, not to 1")
    return holds()


@law
def dtype_is_preserved(subject: FunctionSubject) -> Verdict:
    """The dtype in is the dtype out.

    Why: the next layer refuses another.

    Would have caught: silent casts to bfloat16, or up to float32.
    """
    case = Case(B=2, H=2, G=2, T=3, S=3, D=4, E=4, seed=subject.seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = subject.run(case, case.inputs(dtype))
        if y.dtype != dtype:
            return broken(f"{dtype} in gave {y.dtype} out")
    return holds()


@law
def inputs_are_not_modified(subject: FunctionSubject) -> Verdict:
    """The call changes none of its inputs, whatever their strides, and strides change nothing.

    Why: they belong to the caller.

    Would have caught: in-place scaling of the query; kernels that read raw pointers.
    """
    case = Case(B=2, H=2, G=2, T=5, S=5, D=4, E=4, seed=subject.seed)
    inputs = case.inputs(subject.dtype)
    expected = subject.run(case, [t.clone() for t in inputs])
    for name, strided in (
        ("as they are", [t.clone() for t in inputs]),
        ("transposed", [t.mT.contiguous().mT for t in inputs]),
        ("tokens first", [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]),
    ):
        copies = [t.clone() for t in strided]
        y = subject.run(case, strided)
        if not all(torch.equal(a, b) for a, b in zip(strided, copies, strict=True)):
            return broken(f"inputs in memory {name} were changed by the call")
        allowed = as_good_as_eager(expected, expected.double(), 4.0, 4.0)
        if difference(y, expected).max() > allowed:
            return broken(f"inputs in memory {name} gave another output")
    return holds()


@law
def gradients_are_right(subject: FunctionSubject) -> Verdict:
    """Gradients of query, key and value are those of the definition.

    Why: a kernel's backward is written by hand.

    Would have caught: gradients of shared key heads that are not summed over their group.
    """
    case = Case(B=2, H=2, G=2, T=5, S=5, D=4, E=4, seed=subject.seed)

    def gradients(run: object, dtype: torch.dtype) -> Sequence[Tensor]:
        leaves = [t.clone().requires_grad_() for t in case.inputs(dtype)]
        with torch.enable_grad():
            y = run(case, leaves)  # type: ignore[operator]
            direction = case.inputs(dtype)[2].cos()
            return torch.autograd.grad((y * direction).sum(), leaves)

    actual = gradients(subject.run, subject.dtype)
    exact = gradients(definition, torch.float64)
    eager = gradients(definition, subject.dtype)
    for name, ours, true, plain in zip(
        ("query", "key", "value"), actual, exact, eager, strict=True
    ):
        apart = difference(ours.double(), true).max().item()
        if apart > as_good_as_eager(plain, true, 8.0, 8.0):
            return broken(f"the gradient of {name} is {apart:.2g} off")
    return holds()


LAWS = (
    plain_calls_are_right,
    causal_calls_are_right,
    causal_alignment,
    boolean_masks_are_right,
    additive_masks_are_right,
    empty_rows_stay_finite,
    gqa_matches_reference,
    values_may_have_another_size,
    scale_is_obeyed,
    softcap_is_obeyed,
    extreme_values_stay_right,
    rows_and_heads_do_not_mix,
    every_argument_counts,
    dropout_keeps_the_mean,
    dtype_is_preserved,
    inputs_are_not_modified,
    gradients_are_right,
)
