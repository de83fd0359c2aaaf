"""Laws of state: what is saved comes back, what is promised is kept."""

from __future__ import annotations

import contextlib

import torch

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law, reported
from polyhead.check.subject import Subject, by, difference, seeded

__all__ = ["LAWS"]


@law
def parameters_are_filled(subject: Subject) -> Verdict:
    """Every parameter and buffer has numbers of its own when the module is made.

    Why: memory that nobody filled holds whatever was there before: zeros today, NaN tomorrow.

    Would have caught: `nn.Parameter(torch.empty(...))` and `nn.Parameter(torch.Tensor(...))` whose
    initialization was forgotten.
    """
    if subject.make is None:
        raise NotApplicable("how it is made is not known; pass make=")
    if subject.unfilled:
        names = ", ".join(subject.unfilled)
        return broken(
            f"{names}: made by torch.empty, or by torch.Tensor, and never filled",
            unfilled=subject.unfilled,
        )
    return holds()


@law
def state_dict_round_trips(subject: Subject) -> Verdict:
    """A state dict loaded into another instance gives the same outputs.

    Why: it is how a model is saved.

    Would have caught: weights that are no parameters, buffers made in forward, tables that depend
    on what was seen before.
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
        return broken(f"another instance with the same state dict is {by(apart)} off")
    return holds()


@law
def calls_are_stateless(subject: Subject) -> Verdict:
    """What was computed before, of whatever length, does not change what is computed now.

    Why: a module is a function; what it remembers is told, as a cache is.

    Would have caught: masks and rotary tables cached by the first length, or without a parameter
    that they depend on; caches that are not reset.
    """
    # Longer than whatever was seen so far, as what is kept may be kept for all copies.
    seen = subject.longest
    roomy = subject.claims.max_tokens is None and subject.takes(seen + 2)
    fresh = subject.copy()
    x = subject.input(2, seen + 2 if roomy else subject.T)
    with torch.no_grad():
        before = subject.call(fresh, x).output
        for T in (2, seen + 5 if roomy else subject.claims.max_tokens or 2 * subject.T):
            with contextlib.suppress(RuntimeError, IndexError, ValueError):  # too long for it
                subject.call(fresh, subject.input(1, T, salt=2))
        apart = difference(subject.call(fresh, x).output, before)
    if apart.max() > subject.allowed(x):
        return broken(
            f"after texts of other lengths the same text gave another output, by {by(apart)}"
        )
    return holds()


@law
def too_long_is_refused(subject: Subject) -> Verdict:
    """More tokens than promised are refused, or computed right.

    Why: cut or repeated silently, a text's end is never read.

    Would have caught: masks sliced to the shorter length, which broadcast at one token; positions
    that wrap around.
    """
    most = subject.claims.max_tokens
    if most is None:
        raise NotApplicable("it promises no length")
    x = subject.input(1, most + 1)
    try:
        y = subject.run(x)
    except (ValueError, IndexError, AssertionError):
        return holds()
    except RuntimeError as error:
        return reported(
            f"{most + 1} tokens are refused, not in words that say so: {str(error).splitlines()[0]}"
        )
    if y.shape[1] != most + 1:
        return broken(f"of {most + 1} tokens {y.shape[1]} came back")
    if subject.claims.causal:
        apart = difference(y[:, :most], subject.run(x[:, :most]))
        if apart.max() > subject.allowed(x):
            return broken(f"one token more than {most} changed what came before, by {by(apart)}")
    return holds()


LAWS = (
    parameters_are_filled,
    state_dict_round_trips,
    calls_are_stateless,
    too_long_is_refused,
)
