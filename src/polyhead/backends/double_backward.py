"""Derivatives that a kernel lacks, from the reference: second ones, and those of its aux."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from polyhead.backends import reference
from polyhead.call import BACKEND_STATS, NO_AUX, AttentionCall, Aux, AuxRequest, HeadStats
from polyhead.errors import BackendError

__all__ = ["DIFFERENTIATED_AUX", "Derivative", "run_twice_differentiable"]

Run = Callable[[AttentionCall], tuple[Tensor, Aux]]

# The aux that the backward pass of a kernel has a gradient of.
DIFFERENTIATED_AUX = frozenset({"lse"})


@dataclass(frozen=True)
class Derivative:
    """Forward and backward pass of a kernel, called without an autograd graph of its own.

    Attributes:
        forward: call -> (output, aux, saved tensors, options): what `run` gives, and the state
            that `backward` needs beside the call's tensors and the output.
        backward: (call, output, saved, options, gradient of the output, gradient of lse) -> the
            gradients of the call's tensors that require grad, by name. A gradient is None if the
            result was not used.
    """

    forward: Callable[[AttentionCall], tuple[Tensor, Aux, tuple[Tensor, ...], Any]]
    backward: Callable[
        [AttentionCall, Tensor, tuple[Tensor, ...], Any, Tensor | None, Tensor | None],
        dict[str, Tensor],
    ]


class _Differentiable(Protocol):
    """The part of a `Backend` that is read here."""

    @property
    def run(self) -> Run: ...
    @property
    def derivative(self) -> Derivative | None: ...


def run_twice_differentiable(backend: _Differentiable, call: AttentionCall) -> tuple[Tensor, Aux]:
    """`backend.run(call)`, differentiable twice.

    The first derivative of output and lse is the kernel's own, unless a second one was announced
    (`create_graph=True`): then both come from the reference. Weights and statistics are the
    kernel's numbers; their derivatives come from the reference, which runs only if a gradient
    reaches them.
    """
    tensors = call.tensors
    results: tuple[Tensor, ...] = _TwiceDifferentiable.apply(  # type: ignore[no-untyped-call]
        backend, call, tuple(tensors), *tensors.values()
    )
    if not call.aux.names:
        return results[0], NO_AUX
    named = dict(zip(_names(call.aux), results, strict=True))
    stats = [named.pop(name) for name in BACKEND_STATS] if call.aux.stats else None
    return named.pop("output"), Aux(**named, stats=HeadStats(*stats) if stats else None)


class _TwiceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: _Differentiable,
        call: AttentionCall,
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.backend, ctx.call, ctx.names = backend, call, names
        ctx.set_materialize_grads(False)
        if backend.derivative is not None:
            output, aux, saved, ctx.options = backend.derivative.forward(call)
            ctx.save_for_backward(*tensors, output, *saved)
            returned = _named(output, aux)
        else:
            ctx.generator = _generator_state(call)
            ctx.save_for_backward(*tensors)
            # The kernel's own graph is inside this node, on detached copies.
            ctx.leaves, ctx.results = _run_apart(backend.run, call, names, tensors)
            returned = {name: ctx.results[name].detach() for name in _names(call.aux)}
            ctx.results, _ = _split(ctx.results)
        if call.aux.names and {n for n, x in call.tensors.items() if x.requires_grad} == {"value"}:
            # Weights do not depend on values.
            _, others = _split(returned)
            ctx.mark_non_differentiable(*others.values())
        return tuple(returned[name] for name in _names(call.aux))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # raises torch's own error if the graph was freed
        tensors, state = saved[: len(ctx.names)], saved[len(ctx.names) :]
        given = zip(_names(ctx.call.aux), grads, strict=True)
        used = {name: grad for name, grad in given if grad is not None}
        if torch.is_grad_enabled():  # create_graph=True
            found = _gradients_of_definition(ctx, tensors, used)
        else:
            kernels, others = _split(used)
            found = (
                _gradients_of_graph(ctx, tensors, kernels)
                if ctx.backend.derivative is None
                else _gradients_of_kernel(ctx, tensors, state, kernels)
            )
            if others:
                more = _gradients_of_definition(ctx, tensors, others)
                found = {name: grad + more[name] for name, grad in found.items()}
        return (None,) * 3 + tuple(found.get(name) for name in ctx.names)


def _gradients_of_kernel(
    ctx: Any, tensors: tuple[Tensor, ...], state: tuple[Tensor, ...], used: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The kernel's backward pass."""
    if not used:
        wanted = zip(ctx.names, tensors, strict=True)
        return {name: torch.zeros_like(x) for name, x in wanted if x.requires_grad}
    found: dict[str, Tensor] = ctx.backend.derivative.backward(
        ctx.call, state[0], state[1:], ctx.options, used.get("output"), used.get("lse")
    )
    return found


def _gradients_of_graph(
    ctx: Any, tensors: tuple[Tensor, ...], used: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The backward pass of the kernel's own graph."""
    leaves, results = ctx.leaves, ctx.results
    # What the kernel saved must not outlive this pass, as in any other graph.
    ctx.leaves = ctx.results = None
    if results is None and used:  # a second pass over a retained graph, with the same dropout
        call = replace(ctx.call, aux=_request(used))
        with torch.random.fork_rng(_cuda(call), enabled=ctx.generator is not None):
            _restore_generator(call, ctx.generator)
            leaves, results = _run_apart(ctx.backend.run, call, ctx.names, tensors)
    return _gradients(ctx.names, results, tensors if leaves is None else leaves, used)


def _gradients_of_definition(
    ctx: Any, tensors: tuple[Tensor, ...], used: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The backward pass of the reference; differentiable again if grad mode is on."""
    if "output" in used and ctx.call.dropout > 0.0:
        raise BackendError(
            {
                "reference": [
                    "cannot repeat the dropout of another backend twice; got "
                    f"dropout = {ctx.call.dropout} and create_graph=True"
                ]
            }
        )
    with _without_autocast(ctx.call):
        with torch.enable_grad():
            # Views: one tensor may be two of the call's, or be made of another, and each has to
            # have its own share of the gradient.
            leaves = [tensor.view_as(tensor) for tensor in tensors]
            call = replace(_with(ctx.call, ctx.names, leaves), aux=_request(used))
            if "output" in used:
                results = _named(*reference.run(call))
            else:
                results = _named(None, reference.compute_aux(call))
        return _gradients(ctx.names, results, leaves, used)


def _with(call: AttentionCall, names: tuple[str, ...], tensors: Sequence[Tensor]) -> AttentionCall:
    changes: dict[str, Any] = dict(zip(names, tensors, strict=True))
    return replace(call, **changes)


def _run_apart(
    run: Run, call: AttentionCall, names: tuple[str, ...], tensors: tuple[Tensor, ...]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run on detached tensors, under autograd: these leaves, and the results."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        results = _named(*run(_with(call, names, leaves)))
    return leaves, results


def _generator_state(call: AttentionCall) -> Tensor | None:
    """Where the generator stands that dropout draws from, if it will be drawn from."""
    if call.dropout == 0.0:
        return None
    if call.device.type == "cuda":
        return torch.cuda.get_rng_state(call.device)
    return torch.get_rng_state()


def _restore_generator(call: AttentionCall, state: Tensor | None) -> None:
    if state is not None and call.device.type == "cuda":
        torch.cuda.set_rng_state(state, call.device)
    elif state is not None:
        torch.set_rng_state(state)


def _cuda(call: AttentionCall) -> list[torch.device]:
    return [call.device] if call.device.type == "cuda" else []


def _without_autocast(call: AttentionCall) -> AbstractContextManager[Any]:
    """As in the forward pass: a caller's autocast would degrade even the definition."""
    kind = call.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _gradients(
    names: tuple[str, ...],
    results: dict[str, Tensor],
    leaves: Sequence[Tensor],
    used: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients by name of every leaf that requires one, given those of the results in `used`."""
    wanted = {name: x for name, x in zip(names, leaves, strict=True) if x.requires_grad}
    # Where a mask allows nothing at all, the output is zeros that depend on nothing.
    pairs = [(results[name], grad) for name, grad in used.items() if results[name].requires_grad]
    if not pairs:
        return {name: torch.zeros_like(leaf) for name, leaf in wanted.items()}
    found = torch.autograd.grad(
        [result for result, _ in pairs],
        [*wanted.values()],
        [grad for _, grad in pairs],
        create_graph=torch.is_grad_enabled(),
        materialize_grads=True,
    )
    return dict(zip(wanted, found, strict=True))


def _names(asked: AuxRequest) -> tuple[str, ...]:
    """What a call returns, a name for each tensor."""
    names = ["output"]
    for name in asked.names:
        names += BACKEND_STATS if name == "stats" else [name]
    return tuple(names)


def _named(output: Tensor | None, aux: Aux) -> dict[str, Tensor]:
    """What a run returned, by these names."""
    found = {"output": output, **vars(aux)}
    stats = found.pop("stats")
    found |= {} if stats is None else stats.tensors
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _request(names: Iterable[str]) -> AuxRequest:
    """That which returns the tensors of these names."""
    asked = {"stats" if name in BACKEND_STATS else name for name in names if name != "output"}
    return AuxRequest(**dict.fromkeys(asked, True))


def _split(named: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the kernel's own backward pass has gradients of, and the rest."""
    kernels = {
        name: tensor
        for name, tensor in named.items()
        if name == "output" or name in DIFFERENTIATED_AUX
    }
    return kernels, {name: tensor for name, tensor in named.items() if name not in kernels}
