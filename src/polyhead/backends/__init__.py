"""The ordered table of backends, and the choice among them.

A backend is a value. `why_not(call)` lists every reason against a call (none: it can run) from
shapes, dtypes, devices and the mask's structure, never from tensor values. The first backend of
the table without a reason runs; one that was asked for by name runs or raises with its reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from polyhead.backends import reference, sdpa
from polyhead.call import AttentionCall, Aux
from polyhead.errors import ArgumentError, BackendError, DtypeError

__all__ = ["BACKENDS", "REFERENCE", "Backend", "BackendChoice", "choose"]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    Attributes:
        name: how `backend=` and `explain` call it.
        why_not: every reason why it cannot run a call; an empty list says it can.
        run: the output (B, H, T, E), and the aux this backend has at hand.
        notes: how it would run a call, for `explain`.
        aux: names of what it gives beside the output; the definition computes the rest.
    """

    name: str
    why_not: Callable[[AttentionCall], list[str]]
    run: Callable[[AttentionCall], tuple[Tensor, Aux]]
    notes: Callable[[AttentionCall], list[str]] = lambda call: []
    aux: frozenset[str] = frozenset()


REFERENCE = Backend(
    "reference",
    reference.why_not,
    reference.run,
    reference.notes,
    aux=frozenset({"weights", "lse", "stats"}),
)

# In order of preference. The definition runs everything, so it stands last.
BACKENDS: tuple[Backend, ...] = (
    Backend("sdpa", sdpa.why_not, sdpa.run, sdpa.notes),
    REFERENCE,
)

BackendChoice = str | Backend | Sequence[str | Backend]


def choose(call: AttentionCall, backend: BackendChoice = "auto") -> Backend:
    """The first candidate with no reason to refuse.

    Args:
        call: what is asked.
        backend: "auto" for the table's order, a name, a `Backend`, or several in order of
            preference.

    Raises:
        BackendError: every candidate refused; it lists all their reasons.
        ArgumentError: there is no backend of that name.
    """
    refused: dict[str, list[str]] = {}
    for candidate in candidates(backend):
        reasons = candidate.why_not(call)
        if not reasons:
            return candidate
        refused[candidate.name] = reasons
    raise BackendError(refused)


def candidates(backend: BackendChoice) -> tuple[Backend, ...]:
    """The backends that `backend=` stands for, in order."""
    if isinstance(backend, Backend):
        return (backend,)
    if backend == "auto":
        return BACKENDS
    if isinstance(backend, str):
        return (_by_name(backend),)
    if isinstance(backend, Sequence) and backend:
        return tuple(entry for item in backend for entry in candidates(item))
    raise DtypeError(
        "backend",
        "must be a name, a Backend, or a non-empty sequence of these",
        repr(backend),
        'pass "auto" to let polyhead choose',
    )


def _by_name(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    known = ", ".join(["auto", *(backend.name for backend in BACKENDS)])
    raise ArgumentError("backend", f"must be one of {known}", repr(name), "choose one of these")
