"""Laws of state: initialization, state dict round trips, stateless calls, the maximum length."""

from __future__ import annotations

import contextlib

import torch

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law, reported
from polyhead.check.subject import Subject, by, difference, seeded

__all__ = ["LAWS"]


@law
def parameters_are_filled(subject: Subject) -> Verdict:
    """Every parameter and buffer is initialized when the module is constructed.

    Why: uninitialized memory holds arbitrary values: zeros today, NaN tomorrow.

    Would have caught: `nn.Parameter(torch.empty(...))` and `nn.Parameter(torch.Tensor(...))` whose
    initialization was forgotten.
    """
    if subject.make is None:
        raise NotApplicable("unknown constructor; pass make=")
    if subject.unfilled:
        names = ", ".join(subject.unfilled)
        return broken(
            f"{names}: created by torch.empty or torch.Tensor and never initialized",
            unfilled=subject.unfilled,
        )
    return holds()


@law
def state_dict_round_trips(subject: Subject) -> Verdict:
    """A state dict loaded into another instance gives the same outputs.

    Why: it is how models are saved.

    Would have caught: weights that are not parameters, buffers created in forward, tables that
    depend on earlier calls.
    """
    x = subject.input(2)
    if subject.make is not None:
        with seeded(subject.seed + 1, subject.device):
            other = subject.make().to(subject.device).to(subject.dtype).eval()
    else:
        other = subject.copy()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
    other.load_state_dict(subject.exact.state_dict())
    with torch.no_grad():
        apart = difference(subject.call(other, x).output, subject.run(x))
    if apart.max() > subject.allowed(x):
        return broken(
            f"another instance with the same state dict gave an output that differs by {by(apart)}"
        )
    return holds()


@law
def calls_are_stateless(subject: Subject) -> Verdict:
    """Earlier calls, of any length, do not change the output.

    Why: a module is a function; state between calls must be explicit, as a cache is.

    Would have caught: masks and rotary tables cached by the first length, or without a parameter
    that they depend on; caches that are not reset.
    """
    # Longer than every earlier call: copies may share cached state.
    seen = subject.longest
    roomy = subject.claims.max_tokens is None and subject.takes(seen + 2)
    fresh = subject.copy()
    x = subject.input(2, seen + 2 if roomy else subject.T)
    with torch.no_grad():
        before = subject.call(fresh, x).output
        for T in (2, seen + 5 if roomy else subject.claims.max_tokens or 2 * subject.T):
            with contextlib.suppress(RuntimeError, IndexError, ValueError):  # too long
                subject.call(fresh, subject.input(1, T, salt=2))
        apart = difference(subject.call(fresh, x).output, before)
    if apart.max() > subject.allowed(x):
        return broken(
            f"after calls of other lengths the same input gave a different output, by {by(apart)}"
        )
    return holds()


@law
def too_long_is_refused(subject: Subject) -> Verdict:
    """More tokens than the maximum length are refused, or computed correctly.

    Why: otherwise the end of the sequence is silently truncated or repeated.

    Would have caught: masks sliced to the shorter length, which broadcast at one token; positions
    that wrap around.
    """
    most = subject.claims.max_tokens
    if most is None:
        raise NotApplicable("it has no maximum length")
    x = subject.input(1, most + 1)
    try:
        y = subject.run(x)
    except (ValueError, IndexError, AssertionError):
        return holds()
    except RuntimeError as error:
        return reported(
            f"{most + 1} tokens are refused, with an unrelated error: {str(error).splitlines()[0]}"
        )
    if y.shape[1] != most + 1:
        return broken(f"{most + 1} tokens gave outputs for {y.shape[1]}")
    if subject.claims.causal:
        apart = difference(y[:, :most], subject.run(x[:, :most]))
        if apart.max() > subject.allowed(x):
            return broken(
                f"one token more than {most} changed the outputs before it, by {by(apart)}"
            )
    return holds()


LAWS = (
    parameters_are_filled,
    state_dict_round_trips,
    calls_are_stateless,
    too_long_is_refused,
)
