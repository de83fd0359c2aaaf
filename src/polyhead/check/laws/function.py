"""Laws of functions of query, key and value: generated calls match the reference."""

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
    """Require an argument for this purpose; polyhead's own functions take every rule as a mask."""
    if not subject.polyhead:
        subject.name_of(purpose)


def _misfit(subject: FunctionSubject, case: Case) -> str | None:
    """Description of the error of a call, or None if it is within tolerance."""
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
    return f"the output is {apart:.2g} off; allowed: {allowed:.2g}"


def _hold(subject: FunctionSubject, cases: Iterator[Case]) -> Verdict:
    """Require that every call is right; a broken verdict shows the smallest wrong one."""
    for case in cases:
        if _misfit(subject, case) is not None:
            smallest = shrink(case, lambda c: _still_wrong(subject, c))
            return broken(f"{smallest}: {_misfit(subject, smallest)}", case=str(smallest))
    return holds()


def _still_wrong(subject: FunctionSubject, case: Case) -> bool:
    try:
        return _misfit(subject, case) is not None
    except Exception:  # a different failure from the one being shrunk
        return False


def _other_length(case: Case, numbers: random.Random) -> int:
    return max(1, case.S + numbers.choice((-3, 1, 4)))


@law
def plain_calls_are_right(subject: FunctionSubject) -> Verdict:
    """The output is softmax(query key^T / sqrt(D)) value, for any sizes, with T = S and T != S.

    Why: it is scaled dot-product attention.

    Would have caught: a missing scale, softmax over the wrong axis, swapped sizes.
    """
    same = _hold(subject, draw(subject.seed, _COUNT))
    return same if same.message else _hold(subject, draw(subject.seed, _COUNT, S=_other_length))


@law
def causal_calls_are_right(subject: FunctionSubject) -> Verdict:
    """With is_causal, query t attends to keys 0 to t.

    Why: otherwise the model copies the next token instead of predicting it.

    Would have caught: inverted and off-by-one masks.
    """
    _need(subject, "causal")
    return _hold(subject, draw(subject.seed, _COUNT, causal="end"))


@law
def causal_alignment(subject: FunctionSubject) -> Verdict:
    """With is_causal and fewer queries than keys, queries align at the start or at the end.

    Why: both conventions exist (torch aligns at the start, flash-attention at the end), and
    decoding with a cache needs the end. The alignment is reported; only a mask that is neither
    breaks the law.

    Would have caught: flash-attention's change from one convention to the other in version 2.1.
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
            return reported(f"with fewer queries than keys, queries align at the {where}")
    return verdicts["end"]


@law
def boolean_masks_are_right(subject: FunctionSubject) -> Verdict:
    """A boolean mask excludes exactly the masked keys.

    Why: True means "attend" in scaled_dot_product_attention and "ignore" in nn.MultiheadAttention.

    Would have caught: `masked_fill(mask, -inf)` in place of `masked_fill(~mask, -inf)`.
    """
    _need(subject, "mask")
    return _hold(subject, draw(subject.seed, _COUNT, mask="boolean"))


@law
def additive_masks_are_right(subject: FunctionSubject) -> Verdict:
    """An additive mask is added to the scores; -inf excludes a key.

    Why: transformers passes masks in this form.

    Would have caught: additive values read as booleans, where 0 becomes False and excludes the key.
    """
    if subject.polyhead:
        raise NotApplicable("its masks are objects; bias= adds to the scores")
    subject.name_of("mask")
    return _hold(subject, draw(subject.seed, _COUNT, mask="additive"))


@law
def empty_rows_stay_finite(subject: FunctionSubject) -> Verdict:
    """A query that may attend to no key gives zeros, or at least no NaN.

    Why: left padding creates such rows, and their NaN reaches every weight in the backward pass.

    Would have caught: the NaN of a softmax over -inf only; masks of finfo.min, which give the mean
    of the values.
    """
    _need(subject, "mask")
    for case in draw(subject.seed, 4, mask="empty"):
        row = subject.run(case)[:, :, 0]
        if not row.isfinite().all():
            return broken(f"{case}: an empty row gives values that are not finite")
        if row.any():
            return reported("an empty row gives finite values other than zeros")
    return holds()


@law
def gqa_matches_reference(subject: FunctionSubject) -> Verdict:
    """With H query heads and G KV heads, query head h uses KV head h // (H / G).

    Why: checkpoints are trained with this order.

    Would have caught: x-transformers, which groups heads in another order.
    """
    grouped = {"H": lambda case, numbers: case.G * numbers.choice((2, 3))}
    case = next(draw(subject.seed, 1, **grouped))
    try:
        subject.run(case)
    except (RuntimeError, ValueError, TypeError) as error:
        raise NotApplicable(
            f"it does not support grouped-query attention: {str(error).splitlines()[0]}"
        ) from None
    return _hold(subject, draw(subject.seed, _COUNT, **grouped))


@law
def values_may_have_another_size(subject: FunctionSubject) -> Verdict:
    """Values may have another head size than queries and keys.

    Why: multi-head latent attention has such heads.

    Would have caught: outputs allocated with the shape of the query.
    """
    return _hold(subject, draw(subject.seed, _COUNT, E=lambda case, _: case.D + 2))


@law
def scale_is_obeyed(subject: FunctionSubject) -> Verdict:
    """A given scale replaces 1 / sqrt(D).

    Why: many models define a scale of their own.

    Would have caught: a scale argument that is accepted and ignored.
    """
    subject.name_of("scale")
    return _hold(subject, draw(subject.seed, _COUNT, scale=0.7))


@law
def softcap_is_obeyed(subject: FunctionSubject) -> Verdict:
    """With softcap c, scores become c tanh(scores / c).

    Why: Gemma 2 is trained with it.

    Would have caught: kernels that omit the softcap in their backward pass, or ignore it silently.
    """
    subject.name_of("softcap")
    return _hold(subject, draw(subject.seed, _COUNT, softcap=0.8, size=2.0))


@law
def extreme_values_stay_right(subject: FunctionSubject) -> Verdict:
    """Large scores give the right output, without NaN.

    Why: trained models have outliers.

    Would have caught: exp() without subtracting the largest score first.
    """
    return _hold(subject, draw(subject.seed, _COUNT, size=30.0))


@law
def rows_and_heads_do_not_mix(subject: FunctionSubject) -> Verdict:
    """The output of one batch row and head does not depend on another row or head.

    Why: heads are independent, and batch rows belong to different users.

    Would have caught: sums over the wrong axis, swapped strides.
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
        return broken(
            f"another row or head changed by {apart.max():.2g} when row 1, head 2 changed"
        )
    return holds()


@law
def every_argument_counts(subject: FunctionSubject) -> Verdict:
    """Every accepted argument changes the output.

    Why: an ignored argument gives wrong results without an error.

    Would have caught: backends that ignore a mask or a scale that they do not support.
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
            return broken(f"{name} is accepted and ignored")
    return holds()


@law
def dropout_keeps_the_mean(subject: FunctionSubject) -> Verdict:
    """With dropout p, the mean over many draws is the output without dropout.

    Why: kept weights are scaled by 1 / (1 - p).

    Would have caught: dropout that is accepted and ignored; kept weights that are not scaled.
    """
    name = subject.name_of("dropout")
    case = Case(B=400, H=2, G=2, T=3, S=3, D=4, E=4, seed=subject.seed)
    query, key, _ = case.inputs(subject.dtype)
    ones = torch.ones(case.B, case.G, case.S, case.E, dtype=subject.dtype)
    with seeded(subject.seed, torch.device("cpu")):
        try:
            kept = subject.run(case, (query, key, ones), **{name: 0.3}).double()
        except TypeError:  # takes a layer, as the Annotated Transformer does
            layer = torch.nn.Dropout(0.3)
            kept = subject.run(case, (query, key, ones), **{name: layer}).double()
    if kept.std() < 1e-6:
        return broken(f"{name}=0.3 is accepted and drops no weight")
    rows = kept.mean(dim=(1, 2, 3))
    mean, error = rows.mean().item(), rows.std().item() / case.B**0.5
    if abs(mean - 1) > 6 * error:
        return broken(f"the weights sum to {mean:.3f} on average, not to 1")
    return holds()


@law
def dtype_is_preserved(subject: FunctionSubject) -> Verdict:
    """The output has the dtype of the inputs.

    Why: the next layer raises for another dtype.

    Would have caught: silent casts to bfloat16, or up to float32.
    """
    case = Case(B=2, H=2, G=2, T=3, S=3, D=4, E=4, seed=subject.seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = subject.run(case, case.inputs(dtype))
        if y.dtype != dtype:
            return broken(f"inputs in {dtype} gave an output in {y.dtype}")
    return holds()


@law
def inputs_are_not_modified(subject: FunctionSubject) -> Verdict:
    """The call does not modify its inputs, and their strides do not change the output.

    Why: the inputs belong to the caller.

    Would have caught: in-place scaling of the query; kernels that ignore strides.
    """
    case = Case(B=2, H=2, G=2, T=5, S=5, D=4, E=4, seed=subject.seed)
    inputs = case.inputs(subject.dtype)
    expected = subject.run(case, [t.clone() for t in inputs])
    for name, strided in (
        ("contiguous", [t.clone() for t in inputs]),
        ("transposed", [t.mT.contiguous().mT for t in inputs]),
        ("tokens first", [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]),
    ):
        copies = [t.clone() for t in strided]
        y = subject.run(case, strided)
        if not all(torch.equal(a, b) for a, b in zip(strided, copies, strict=True)):
            return broken(f"inputs ({name} in memory) were modified by the call")
        allowed = as_good_as_eager(expected, expected.double(), 4.0, 4.0)
        if difference(y, expected).max() > allowed:
            return broken(f"inputs ({name} in memory) gave a different output")
    return holds()


@law
def gradients_are_right(subject: FunctionSubject) -> Verdict:
    """Gradients with respect to query, key and value match the reference.

    Why: the backward pass of a kernel is written by hand.

    Would have caught: gradients of shared KV heads that are not summed over their group.
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
