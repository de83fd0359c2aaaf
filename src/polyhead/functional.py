"""`attention()`: check what was asked, choose who runs it, run it. `explain()`: say who and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from polyhead.backends import (
    BACKENDS,
    Backend,
    BackendChoice,
    candidates,
    choose,
    is_automatic,
    skip_reasons,
)
from polyhead.backends.double_backward import DIFFERENTIATED_AUX, run_twice_differentiable
from polyhead.backends.reference import compute_aux
from polyhead.backends.tracing import is_traced
from polyhead.cache_view import CacheView
from polyhead.call import NO_AUX, AttentionCall, Aux, AuxRequest
from polyhead.errors import BackendError
from polyhead.mask import Mask
from polyhead.validate import autocasts, build_call

__all__ = ["Explanation", "attention", "explain", "observe"]

_observer: ContextVar[Callable[[AttentionCall], None] | None] = ContextVar("observer", default=None)

_OUTPUT_ONLY = AuxRequest()
# Of the first backend that "auto" tries.
_FAST_PATH = BACKENDS[0].fast_path


@overload
def attention(
    query: Tensor,
    key: Tensor | CacheView,
    value: Tensor | CacheView,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    query_offset: int | Tensor | None = None,
    backend: BackendChoice = "auto",
    return_aux: None = None,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor | CacheView,
    value: Tensor | CacheView,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    query_offset: int | Tensor | None = None,
    backend: BackendChoice = "auto",
    return_aux: AuxRequest,
) -> tuple[Tensor, Aux]: ...


def attention(
    query: Tensor,
    key: Tensor | CacheView,
    value: Tensor | CacheView,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    query_offset: int | Tensor | None = None,
    backend: BackendChoice = "auto",
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """Multi-head attention of queries over keys: softmax(scale * query @ key^T) @ value.

    Args:
        query: (B, H, T, D) float32, bfloat16, float16 or float64; the output has its dtype.
        key: (B, G, S, D), G a divisor of H: query head h uses key head h // (H / G).
        value: (B, G, S, E). Key and value may also be what a cache's `append_as_views` or
            `read_as_views` gives: a backend that can reads it there, others get tensors made of it.
        mask: who may attend (`polyhead.mask`); None: everybody. A query with nothing to attend
            to gives zeros.
        bias: numbers added to the scores, broadcastable to (B, H, T, S); the query's dtype or
            float32. -inf forbids.
        scale: factor on the scores; None: 1 / sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap), before the bias.
        sinks: (H,) one extra logit a head that takes weight and gives no value.
        alibi_slopes: (H,) a score falls by slope * |query position - key position|
            (`polyhead.alibi_slopes`); positions as in a mask.
        dropout: probability with which a weight is dropped, in [0, 1); applied whenever it is
            not 0, so pass 0 in evaluation.
        query_offset: position of query 0 among the keys, an int, or (B,) integers if it differs by
            batch row; None: S - T, so that the last query has the position of the last key (or
            from the lengths of the cached rows). Masks and ALiBi count from it.
        backend: "auto" (or what `use_backend` says), a name, a `Backend`, or several in order of
            preference. One that is asked for runs or raises; there is no silent fallback.
        return_aux: what to return beside the output. Never changes the output.

    Returns:
        output (B, H, T, E), or (output, Aux) if `return_aux` is given.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: an argument breaks a rule.
        BackendError: the backend asked for cannot run this call; every reason is listed.

    Formula: `polyhead.backends.reference`; Vaswani et al. 2017, section 3.2.

    >>> import polyhead as ph
    >>> query, key, value = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8)
    >>> ph.attention(query, key, value, mask=ph.mask.causal()).shape
    torch.Size([1, 4, 3, 8])
    """
    if (
        (bias is None and softcap is None and sinks is None and alibi_slopes is None)
        and dropout == 0.0
        and query_offset is None
        and (return_aux is None or return_aux == _OUTPUT_ONLY)
        and (scale is None or isinstance(scale, float))
        and is_automatic(backend)
        and not torch.compiler.is_compiling()  # which traces no ContextVar
        and _observer.get() is None
        and _FAST_PATH is not None
        and (output := _FAST_PATH(query, key, value, mask, scale)) is not None
    ):
        return output if return_aux is None else (output, NO_AUX)
    call = build_call(
        query,
        key,
        value,
        mask,
        bias,
        scale,
        softcap,
        sinks,
        alibi_slopes,
        dropout,
        _OUTPUT_ONLY if return_aux is None else return_aux,
        query_offset,
    )
    # (Nobody looks into a compiled graph.)
    if not torch.compiler.is_compiling() and (observer := _observer.get()) is not None:
        observer(call.materialized())
    chosen = choose(call, backend)
    # Autocast would cast inside a backend, and degrade even the definition: a caller's autocast
    # decides the dtype of query, key and value, and that is the dtype of the output.
    if autocasts(query):
        with torch.autocast(query.device.type, enabled=False):
            output, aux = _run(chosen, call)
    else:
        output, aux = _run(chosen, call)
    return output if return_aux is None else (output, aux)


@contextmanager
def observe(observer: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Tell `observer` of every call of `attention` in here, before it runs.

    >>> import polyhead as ph
    >>> query = key = value = torch.ones(1, 2, 3, 8)
    >>> with observe(lambda call: print(call.H, "heads,", call.T, "queries")):
    ...     _ = ph.attention(query, key, value)
    2 heads, 3 queries
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call and why no other does. Printing it gives a table.

    Attributes:
        chosen: name of the backend that runs, or None if all refuse.
        notes: how it would run the call.
        reasons: for every backend, each reason against it; empty where it could run.
        auto_skip: for backends that could run and that "auto" leaves out all the same, why.
    """

    chosen: str | None
    notes: tuple[str, ...]
    reasons: dict[str, tuple[str, ...]]
    auto_skip: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"runs: {self.chosen or 'nothing, every backend asked for refuses'}"]
        lines += [f"  {note}" for note in self.notes]
        for name, reasons in self.reasons.items():
            if name == self.chosen:
                continue
            auto_skip = self.auto_skip.get(name, ())
            could = "could run, if asked for by name" if auto_skip else "could run"
            lines.append(f"{name}: " + ("cannot run" if reasons else could))
            lines += [f"  {reason}" for reason in (*reasons, *auto_skip)]
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """In a notebook's cell: as it is printed."""
        printer.text(str(self))


def explain(
    query: Tensor,
    key: Tensor | CacheView,
    value: Tensor | CacheView,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    query_offset: int | Tensor | None = None,
    backend: BackendChoice = "auto",
    return_aux: AuxRequest | None = None,
) -> Explanation:
    """Say which backend `attention()` would run for these arguments, and why not the others.

    Takes the arguments of `attention`, computes nothing, and raises the same errors for bad ones.

    >>> import polyhead as ph
    >>> query = key = value = torch.ones(1, 2, 3, 8, dtype=torch.float64)
    >>> print(ph.explain(query, key, value, softcap=30.0))
    runs: reference
      plain PyTorch, holds the T x S scores of every head: 0.0 MiB each copy
    cpu: cannot run
      runs float32, bfloat16 and float16; got float64
    sdpa: cannot run
      runs float32, bfloat16 and float16; got float64
      has no softcap; got softcap = 30.0
    flex: cannot run
      runs float32, bfloat16 and float16; got float64
    """
    call = build_call(
        query,
        key,
        value,
        mask,
        bias,
        scale,
        softcap,
        sinks,
        alibi_slopes,
        dropout,
        _OUTPUT_ONLY if return_aux is None else return_aux,
        query_offset,
    )
    asked = candidates(backend)
    names = {entry.name for entry in asked}
    others = [entry for entry in BACKENDS if entry.name not in names]
    reasons = {entry.name: tuple(entry.why_not(call)) for entry in (*asked, *others)}
    auto_skip = {
        entry.name: tuple(skip_reasons(entry, call))
        for entry in (*asked, *others)
        if entry.auto_skip is not None and not reasons[entry.name]
    }
    try:
        chosen = choose(call, backend)
    except BackendError:
        return Explanation(None, (), reasons, auto_skip)
    seen = _as_read_by(chosen, call)
    notes = chosen.notes(seen)
    if call.cache_views is not None and seen.cache_views is None:
        notes.append(_gathering_note(call, seen))
    if _gives_first_derivative_only(chosen, call):
        notes.append("second derivatives through the definition: they hold T x S scores")
    left = _left_to_definition(chosen, call)
    later = [name for name in _without_gradient(chosen, call) if name not in left]
    if later:
        notes.append(
            f"gradients of {', '.join(later)} through the definition: they hold T x S scores"
        )
    if left:
        notes.append(f"{', '.join(left)} computed apart, by reference: holds T x S scores")
    return Explanation(chosen.name, tuple(notes), reasons, auto_skip)


def _run(chosen: Backend, call: AttentionCall) -> tuple[Tensor, Aux]:
    """The output, and the aux with what the chosen backend does not give from the definition.

    The output comes from the chosen backend alone, so that asking for aux never changes it.
    """
    call = _as_read_by(chosen, call)
    left = _left_to_definition(chosen, call)
    asked = replace(call, aux=replace(call.aux, **dict.fromkeys(left, False))) if left else call
    # A graph, compiled or traced, has the derivatives of its operators, and records no other.
    is_graph = torch.compiler.is_compiling() or is_traced()
    if _gives_first_derivative_only(chosen, call) and not is_graph:
        output, aux = run_twice_differentiable(chosen, asked)
    else:
        output, aux = chosen.run(asked)
    if left:
        rest = compute_aux(
            replace(call.materialized(), aux=AuxRequest(**dict.fromkeys(left, True)))
        )
        aux = replace(aux, **{name: getattr(rest, name) for name in left})
    return output, aux


def _as_read_by(chosen: Backend, call: AttentionCall) -> AttentionCall:
    """The call as this backend takes it: keys and values as tensors, unless it reads a cache."""
    return (
        call if call.cache_views is None or chosen.reads_cache_views(call) else call.materialized()
    )


def _gathering_note(call: AttentionCall, gathered: AttentionCall) -> str:
    assert call.cache_views is not None
    mebibytes = (gathered.key.nbytes + gathered.value.nbytes) / 2**20
    return (
        f"keys and values made of what the cache holds ({call.cache_views[0]}): {mebibytes:.1f} MiB"
    )


def _gives_first_derivative_only(chosen: Backend, call: AttentionCall) -> bool:
    return chosen.first_order_only and call.needs_grad


def _without_gradient(chosen: Backend, call: AttentionCall) -> tuple[str, ...]:
    """What is asked for and the chosen backend gives, without the gradient that may be wanted."""
    if not _gives_first_derivative_only(chosen, call):
        return ()
    values = chosen.aux - DIFFERENTIATED_AUX
    return tuple(name for name in call.aux.names if name in values)


def _left_to_definition(chosen: Backend, call: AttentionCall) -> tuple[str, ...]:
    """What is asked for beside the output that the chosen backend does not give."""
    asked = call.aux.names
    if not asked:
        return ()
    # torch.compile cannot trace how a gradient comes later.
    untraced = _without_gradient(chosen, call) if torch.compiler.is_compiling() else ()
    return tuple(name for name in asked if name not in chosen.aux or name in untraced)
