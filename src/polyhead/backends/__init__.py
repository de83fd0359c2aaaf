"""The ordered table of backends, and the choice among them.

A backend is a value. `why_not(call)` lists every reason against a call (none: it can run) from
shapes, dtypes, devices and the mask's structure, never from tensor values. The first backend of
the table without a reason runs; one that was asked for by name runs or raises with its reasons.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from polyhead.backends import cpu, flex, reference, sdpa
from polyhead.backends.double_backward import Derivative
from polyhead.cache_view import CacheView
from polyhead.call import AttentionCall, Aux
from polyhead.errors import ArgumentError, BackendError, DtypeError
from polyhead.mask import Mask

__all__ = [
    "BACKENDS",
    "REFERENCE",
    "Backend",
    "BackendChoice",
    "BackendName",
    "backends",
    "candidates",
    "choose",
    "choose_for_aux",
    "is_automatic",
    "skip_reasons",
    "use_backend",
]


CanRun: TypeAlias = Callable[[str], bool]
FastPath: TypeAlias = Callable[
    [Tensor, Tensor | CacheView, Tensor | CacheView, Mask | None, float | None], Tensor | None
]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    Attributes:
        name: how `backend=` and `explain` call it.
        why_not: every reason why it cannot run a call; an empty list says it can.
        run: the output (B, H, T, E), and the aux this backend has at hand.
        notes: how it would run a call, for `explain`.
        aux: names of what it gives beside the output; the definition computes the rest.
        auto_skip: the reasons why "auto" leaves a call to others though this backend could run
            it, given `can_run(name)` for the other backends.
        first_order_only: whether `run` has first derivatives only, of its output and its lse; the
            definition then gives all others, of a `weights` or `stats` too.
        derivative: its forward and backward pass without an autograd graph, which is faster than
            that of `run`; or None.
        reads_cache_views: whether `run` reads a call's keys and values where a cache holds them
            (`call.cache_views`); otherwise it is given the call `materialized()`.
        fast_path: (query, key, value, mask, scale) -> the output of a plain call in inference,
            without validation and dispatch; None: not eligible, take the general path.
        summary: what it is, in a line.
    """

    name: str
    why_not: Callable[[AttentionCall], list[str]]
    run: Callable[[AttentionCall], tuple[Tensor, Aux]]
    notes: Callable[[AttentionCall], list[str]] = lambda call: []
    aux: frozenset[str] = frozenset()
    auto_skip: Callable[[AttentionCall, CanRun], list[str]] | None = None
    first_order_only: bool = False
    derivative: Derivative | None = None
    reads_cache_views: Callable[[AttentionCall], bool] = lambda call: False
    fast_path: FastPath | None = None
    summary: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.summary}" if self.summary else self.name


REFERENCE = Backend(
    "reference",
    reference.why_not,
    reference.run,
    reference.notes,
    aux=frozenset({"weights", "mean_weights", "lse", "stats"}),
    summary="the definition, in plain PyTorch; runs everything, holds T x S scores",
)

# In order of preference. The definition runs everything, so it stands last.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "cpu",
        cpu.why_not,
        cpu.run,
        cpu.notes,
        aux=frozenset({"weights", "mean_weights", "lse", "stats"}),
        auto_skip=cpu.auto_skip,
        first_order_only=True,
        derivative=Derivative(cpu.forward, cpu.backward),
        reads_cache_views=cpu.reads_cache_views,
        fast_path=cpu.try_fast_path,
        summary="polyhead's own C++ kernels for the processor; every mask and variant fused",
    ),
    Backend(
        "sdpa",
        sdpa.why_not,
        sdpa.run,
        sdpa.notes,
        first_order_only=True,
        summary="torch's scaled_dot_product_attention, where a fused kernel of it runs",
    ),
    Backend(
        "flex",
        flex.why_not,
        flex.run,
        flex.notes,
        auto_skip=flex.auto_skip,
        first_order_only=True,
        summary="torch's flex_attention, compiled for each kind of call",
    ),
    REFERENCE,
)

# Editors complete these names; another string is refused when it is used.
BackendName: TypeAlias = Literal["auto", "cpu", "sdpa", "flex", "reference"]
BackendChoice: TypeAlias = BackendName | str | Backend | Sequence[BackendName | str | Backend]
"""Argument `backend=`: "auto", a name, a `Backend`, or several in order of preference."""


class _Preferred(threading.local):
    """What "auto" stands for where torch.compile, which traces no ContextVar, asks: in each thread
    what was entered last of all that was not left."""

    def __init__(self) -> None:
        self.backend: BackendChoice = "auto"
        self.entered: dict[object, BackendChoice] = {}

    def enter(self, key: object, backend: BackendChoice) -> None:
        self.entered[key] = self.backend = backend

    def leave(self, key: object) -> None:
        self.entered.pop(key, None)
        self.backend = next(reversed(self.entered.values()), "auto")


_preferred = _Preferred()
# What it stands for elsewhere: tasks of one thread take turns, and each has its own.
_preferred_in_task: ContextVar[BackendChoice] = ContextVar("preferred", default="auto")


def backends() -> tuple[Backend, ...]:
    """All backends, in the order in which "auto" tries them.

    >>> for backend in backends():
    ...     print(backend)
    cpu: polyhead's own C++ kernels for the processor; every mask and variant fused
    sdpa: torch's scaled_dot_product_attention, where a fused kernel of it runs
    flex: torch's flex_attention, compiled for each kind of call
    reference: the definition, in plain PyTorch; runs everything, holds T x S scores
    """
    return BACKENDS


@contextmanager
def use_backend(backend: BackendChoice) -> Iterator[None]:
    """Within this context, in this thread and task, `backend="auto"` stands for `backend`.

    A call or a module that names its backend keeps it. What is named here runs or raises, as ever.

    Args:
        backend: as in `polyhead.attention`; "auto" within a list is the table's own order.

    Raises:
        ArgumentError, DtypeError: there is no such backend.

    >>> import torch, polyhead as ph
    >>> query = key = value = torch.ones(1, 2, 3, 8)
    >>> with ph.use_backend("reference"):
    ...     ph.explain(query, key, value).chosen
    'reference'
    """
    _expanded(backend)
    if torch.compiler.is_compiling():
        before = _preferred.backend
        _preferred.backend = backend
        try:
            yield
        finally:
            _preferred.backend = before
        return
    key = object()
    token = _preferred_in_task.set(backend)
    _preferred.enter(key, backend)
    try:
        yield
    finally:
        _preferred.leave(key)
        _preferred_in_task.reset(token)


def choose(call: AttentionCall, backend: BackendChoice = "auto") -> Backend:
    """The first candidate with no reason to refuse.

    Args:
        call: what is asked.
        backend: "auto" for what `use_backend` says, or else the table's order; a name, a
            `Backend`, or several in order of preference.

    Raises:
        BackendError: every candidate refused; it lists all their reasons.
        ArgumentError: there is no backend of that name.
    """
    refused: dict[str, list[str]] = {}
    for candidate, automatic in _expanded(_preference(backend)):
        reasons = candidate.why_not(call)
        if automatic and not reasons:
            reasons = skip_reasons(candidate, call)
        if not reasons:
            return candidate
        refused[candidate.name] = reasons
    raise BackendError(refused)


def skip_reasons(backend: Backend, call: AttentionCall) -> list[str]:
    """Every reason why "auto" leaves a call to other backends, of one that could run it."""
    if backend.auto_skip is None:
        return []
    return backend.auto_skip(call, lambda name: not _by_name(name).why_not(call))


def choose_for_aux(call: AttentionCall, names: Iterable[str]) -> Backend | None:
    """The first candidate that gives these aux in its own pass, without T x S memory.

    `auto_skip` does not count: its reasons concern the output, which is not computed here.

    Args:
        call: its aux alone are needed.
        names: of the aux.

    Returns:
        The backend, or None: the reference has to compute them in chunks.
    """
    for candidate in candidates("auto"):
        gives = candidate is not REFERENCE and candidate.aux.issuperset(names)
        if gives and not candidate.why_not(call):
            return candidate
    return None


def is_automatic(backend: BackendChoice) -> bool:
    """Whether the table's own order decides, here and now."""
    preferred = _preference(backend)
    return isinstance(preferred, str) and preferred == "auto"


def candidates(backend: BackendChoice) -> tuple[Backend, ...]:
    """The backends that `backend=` stands for here and now, in order."""
    return tuple(candidate for candidate, _ in _expanded(_preference(backend)))


def _preference(backend: BackendChoice) -> BackendChoice:
    # A list may compare with a string in ways of its own.
    if not (isinstance(backend, str) and backend == "auto"):
        return backend
    return _preferred.backend if torch.compiler.is_compiling() else _preferred_in_task.get()


def _expanded(backend: BackendChoice) -> tuple[tuple[Backend, bool], ...]:
    """Backends in order, and whether "auto" put each there: the table, as it stands."""
    if isinstance(backend, Backend):
        return ((backend, False),)
    if isinstance(backend, str):
        return _AUTOMATIC if backend == "auto" else ((_by_name(backend), False),)
    if isinstance(backend, Sequence) and backend:
        return tuple(entry for item in backend for entry in _expanded(item))
    raise DtypeError(
        "backend",
        "must be a name, a Backend, or a non-empty sequence of these",
        repr(backend),
        'pass "auto" to let polyhead choose',
    )


_AUTOMATIC = tuple((backend, True) for backend in BACKENDS)


def _by_name(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    known = ", ".join(["auto", *(backend.name for backend in BACKENDS)])
    raise ArgumentError("backend", f"must be one of {known}", repr(name), "choose one of these")
