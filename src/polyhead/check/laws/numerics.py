"""Laws of numerics: finite, in the requested dtype, accurate, and independent of memory layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyhead.check.law import (
    NotApplicable,
    Verdict,
    broken,
    first_line,
    holds,
    law,
    reported,
)
from polyhead.check.laws.causality import need_causal, worst
from polyhead.check.probe.sight import band
from polyhead.check.subject import Subject, by, difference
from polyhead.check.tolerance import Narrowest, Spy

__all__ = ["LAWS"]

_HALVES = (torch.bfloat16, torch.float16)


@law
def output_is_finite(subject: Subject) -> Verdict:
    """Finite inputs of ordinary size give a finite output.

    Why: one NaN in a row spreads to every token of the next layer.

    Would have caught: a mask that excludes every key for the first token; an inverted causal mask,
    whose last row is empty.
    """
    bad = ~subject.run(subject.input(2)).isfinite()
    if bad.any():
        tokens = bad.any(dim=-1).any(dim=0).nonzero().flatten().tolist()
        return broken(f"the output at tokens {tokens} is not finite", tokens=tokens)
    return holds()


@law
def odd_sizes_run(subject: Subject) -> Verdict:
    """Any number of rows and tokens runs: 1, odd, prime, not a multiple of a block.

    Why: the last batch is smaller, and sequences have any length.

    Would have caught: kernels that require multiples of their block size, `squeeze()` at one token.
    """
    most = subject.claims.max_tokens or 17
    features = subject.run(subject.input()).shape[-1]
    for B, T in ((1, 1), (3, 1), (2, min(3, most)), (1, min(17, most))):
        y = subject.run(subject.input(B, T))
        if y.shape != (B, T, features):
            return broken(f"{B} rows of {T} tokens gave an output of shape {tuple(y.shape)}")
        if not y.isfinite().all():
            return broken(f"{B} rows of {T} tokens gave values that are not finite")
    return holds()


@law
def layout_in_memory_does_not_matter(subject: Subject) -> Verdict:
    """The strides of the input do not change the output.

    Why: a slice or a transpose is a legal input with the same values.

    Would have caught: kernels that ignore strides, `view` on a tensor that the caller may
    transpose.
    """
    x = subject.input(2)
    T, d_in = x.shape[1:]
    wide = torch.full((2, T, 2 * d_in), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    for name, other in (
        ("transposed", x.transpose(1, 2).contiguous().transpose(1, 2)),
        ("every other feature of a wider tensor", wide[..., ::2]),
    ):
        try:
            y = subject.run(other, as_it_is=True)
        except RuntimeError as error:
            return reported(f"an input with other strides is refused: {str(error).splitlines()[0]}")
        apart = difference(y, subject.run(x))
        if apart.max() > subject.allowed(x):
            return broken(f"the same values, {name}, gave a different output, by {by(apart)}")
    return holds()


@law
def inputs_are_not_modified(subject: Subject) -> Verdict:
    """The call does not modify its input.

    Why: the residual connection adds the input to the output, after the call.

    Would have caught: in-place scaling or rotary positions applied to a view of the input.
    """
    x = subject.input(2)
    before = x.clone()
    subject.run(x, as_it_is=True)
    return holds() if torch.equal(x, before) else broken("the call modified its input")


@law
def dtype_is_kept(subject: Subject) -> Verdict:
    """The output has the dtype of the input and weights.

    Why: a silent cast costs memory or accuracy, and the next layer raises for the other dtype.

    Would have caught: masks and rotary tables built in float32, which promote a bfloat16 module's
    output to float32; modules that cast to bfloat16 silently.
    """
    for dtype in (torch.float32, *_HALVES):
        try:
            with torch.no_grad():
                y = subject.call(subject.copy(dtype), subject.input().to(dtype)).output
        except RuntimeError as error:
            if dtype == torch.float32:
                raise
            return reported(f"{dtype} does not run: {first_line(error)}")
        if y.dtype != dtype:
            return broken(f"an input in {dtype} gave an output in {y.dtype}")
    return holds()


@law
def no_hidden_downcast(subject: Subject) -> Verdict:
    """In float32, no internal operation runs in half precision.

    Why: bfloat16 has 8 significant bits. Callers who pass float32 did not choose that.

    Would have caught: kernel wrappers that silently cast their inputs to half precision, and the
    output back.
    """
    x, spy = subject.input().float(), Narrowest()
    module = subject.copy(torch.float32)
    with torch.no_grad(), spy:
        subject.call(module, x)
    if torch.finfo(spy.dtype).eps > torch.finfo(torch.float32).eps:
        return broken(f"a float32 module computes in {spy.dtype} internally")
    return holds()


@law
def float32_is_close_to_float64(subject: Subject) -> Verdict:
    """In float32 the output matches float64, within this module's rounding error.

    Why: an undocumented approximation is a bug that looks like noise.

    Would have caught: softmax or rotary tables always computed in half precision.
    """
    return _close(subject, torch.float32)


@law
def half_precision_is_close_to_float64(subject: Subject) -> Verdict:
    """In bfloat16 and float16 the output matches float64, within rounding error.

    Why: fused kernels accumulate in float32. A half-precision sum loses digits with every key.

    Would have caught: masks filled with -1e9, which overflows in float16; sums in half precision;
    position indices beyond the integers that bfloat16 represents.
    """
    for dtype in _HALVES:
        verdict = _close(subject, dtype)
        if verdict.message:
            return verdict
    return holds()


def _close(subject: Subject, dtype: torch.dtype) -> Verdict:
    if not subject.runs_in_float64:
        raise NotApplicable("it does not run in float64")
    x = subject.input(2).to(dtype)
    rounded = subject.copy(dtype)
    with torch.no_grad():
        actual = subject.call(rounded, x).output.double()
        exact = subject.call(rounded.double(), x.double()).output
    allowed = subject.allowed(x.double(), dtype)
    apart = difference(actual, exact)
    if apart.max() > allowed:
        return broken(f"in {dtype} the output is {by(apart)} off; allowed: {allowed:.2g}")
    return holds()


@law
def large_inputs_stay_finite(subject: Subject) -> Verdict:
    """Inputs scaled by 10,000 give finite outputs and gradients.

    Why: activations of trained models have outliers, and the softmax of large scores is still
    defined.

    Would have caught: exp() without subtracting the largest score first.
    """
    module = subject.copy(torch.float32)
    x = (1e4 * subject.input()).float().requires_grad_()
    with torch.enable_grad():
        y = subject.call(module, x).output
    if not y.isfinite().all():
        return broken("inputs scaled by 10,000 gave an output that is not finite")
    (gradient,) = torch.autograd.grad(y.sum(), x)
    if not gradient.isfinite().all():
        return broken("inputs scaled by 10,000 gave a gradient that is not finite")
    return holds()


@law
def mask_survives_large_scores(subject: Subject) -> Verdict:
    """Later tokens stay masked when scores are large.

    Why: a masked score must be -inf, or below every possible score.

    Would have caught: masked scores set to 0, or to a constant such as -100, which outliers exceed;
    scores multiplied by the mask.
    """
    need_causal(subject)
    x, other = 64 * subject.input(), 64 * subject.input(salt=1)
    T = x.shape[1]
    before = subject.run(x)
    columns = []
    for s in range(T):
        changed = x.clone()
        changed[:, s] = other[:, s]
        columns.append(difference(subject.run(changed), before).amax(dim=(0, 2)))
    influence = torch.stack(columns, dim=1)
    future = ~band(T, True, None).to(influence.device)
    t, s, change = worst(influence, future & influence.isfinite())
    if change > subject.allowed(x):
        return broken(
            f"with inputs scaled by 64 the output at token {t} changed by {change:.2g} when "
            f"token {s} changed: masked scores are not low enough"
        )
    return holds()


@law
def memory_growth(subject: Subject) -> Verdict:
    """The largest tensor grows linearly or quadratically with the sequence length.

    Why: T x T scores per head fill the memory long before the model does. It is reported and
    not judged.

    Would have caught: fused kernels that silently fall back to the materialized scores.
    """
    T = min(128, subject.claims.max_tokens or 128)
    if T < 32:
        raise NotApplicable(f"it accepts {T} tokens only")
    module = subject.copy(torch.float32)
    largest = []
    for tokens in (T // 2, T):
        sizes = _LargestTensor()
        try:
            with torch.no_grad(), sizes:
                subject.call(module, subject.input(1, tokens).float())
        except (RuntimeError, ValueError, IndexError):
            raise NotApplicable(f"it does not accept {tokens} tokens") from None
        largest.append(sizes.largest)
    growth = largest[1] / largest[0]
    kind = "quadratic" if growth > 3 else "linear"
    return reported(f"{kind}: twice the tokens, {growth:.1f} times the largest tensor")


class _LargestTensor(Spy):
    """Counts the elements of the largest tensor that operations produce."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                held = item.untyped_storage().nbytes() // item.element_size()
                self.largest = max(self.largest, held)
        return result


LAWS = (
    output_is_finite,
    odd_sizes_run,
    layout_in_memory_does_not_matter,
    inputs_are_not_modified,
    dtype_is_kept,
    no_hidden_downcast,
    float32_is_close_to_float64,
    half_precision_is_close_to_float64,
    large_inputs_stay_finite,
    mask_survives_large_scores,
    memory_growth,
)
