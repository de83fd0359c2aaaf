"""Derivatives that a kernel has not, through the definition: second ones, and those of its aux."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyhead.backends import reference
from polyhead.call import BACKEND_STATS, AttentionCall, Aux, AuxRequest, HeadStats
from polyhead.errors import BackendError

__all__ = ["DIFFERENTIATED_AUX", "run_twice_differentiable"]

Run = Callable[[AttentionCall], tuple[Tensor, Aux]]

# Of the aux a kernel may give, that which its own backward pass has a gradient of.
DIFFERENTIATED_AUX = frozenset({"lse"})


def run_twice_differentiable(run: Run, call: AttentionCall) -> tuple[Tensor, Aux]:
    """`run(call)`, whose output and aux can be differentiated, and their gradients again.

    The first derivative of output and lse is the kernel's own, unless a second one was announced
    (`create_graph=True`): then both come from the definition. Weights and statistics are the
    kernel's numbers; their derivatives come from the definition, which runs if a gradient reaches
    them and not before.
    """
    tensors = call.tensors
    results: tuple[Tensor, ...] = _TwiceDifferentiable.apply(  # type: ignore[no-untyped-call]
        run, call, tuple(tensors), *tensors.values()
    )
    named = dict(zip(_names(call.aux), results, strict=True))
    stats = [named.pop(name) for name in BACKEND_STATS] if call.aux.stats else None
    return named.pop("output"), Aux(**named, stats=HeadStats(*stats) if stats else None)


class _TwiceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        call: AttentionCall,
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.call, ctx.names = run, call, names
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.generator = _generator_state(call)
        # The kernel's own graph waits inside this node, on copies that have no past.
        ctx.leaves, results = _run_apart(run, call, names, tensors)
        ctx.results, others = _split(results)
        learnt = {name for name, x in zip(names, tensors, strict=True) if x.requires_grad}
        returned = {name: results[name].detach() for name in _names(call.aux)}
        if learnt == {"value"}:  # of which weights know nothing
            ctx.mark_non_differentiable(*(returned[name] for name in others))
        return tuple(returned.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # raises torch's own error if the graph was freed
        wanted = [tensor.requires_grad for tensor in tensors]
        given = zip(_names(ctx.call.aux), grads, strict=True)
        heard = {name: grad for name, grad in given if grad is not None}
        if torch.is_grad_enabled():  # create_graph=True
            found = iter(_gradients_of_definition(ctx, tensors, heard))
        else:
            kernels, others = _split(heard)
            parts = [_gradients_of_kernel(ctx, tensors, kernels)]
            if others:
                parts.append(_gradients_of_definition(ctx, tensors, others))
            found = (sum(terms[1:], terms[0]) for terms in zip(*parts, strict=True))
        return (None,) * 3 + tuple(next(found) if want else None for want in wanted)


def _gradients_of_kernel(
    ctx: Any, tensors: tuple[Tensor, ...], heard: dict[str, Tensor]
) -> Sequence[Tensor]:
    leaves, results = ctx.leaves, ctx.results
    # What the kernel saved must not outlive this pass, as in any other graph.
    ctx.leaves = ctx.results = None
    if results is None and heard:  # a second pass over a retained graph, with the same dropout
        call = replace(ctx.call, aux=_request(heard))
        with torch.random.fork_rng(_cuda(call), enabled=ctx.generator is not None):
            _restore_generator(call, ctx.generator)
            leaves, results = _run_apart(ctx.run, call, ctx.names, tensors)
    return _gradients(results, tensors if leaves is None else leaves, heard)


def _gradients_of_definition(
    ctx: Any, tensors: tuple[Tensor, ...], heard: dict[str, Tensor]
) -> Sequence[Tensor]:
    """Of the definition's own run on these; to be differentiated again if grad is on."""
    if "output" in heard and ctx.call.dropout > 0.0:
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
            call = replace(_with(ctx.call, ctx.names, leaves), aux=_request(heard))
            if "output" in heard:
                results = _named(*reference.run(call))
            else:
                results = _named(None, reference.compute_aux(call))
        return _gradients(results, leaves, heard)


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
    results: dict[str, Tensor], leaves: Sequence[Tensor], heard: dict[str, Tensor]
) -> Sequence[Tensor]:
    """Of every leaf that requires one, given those of the results that were heard of."""
    learnt = [leaf for leaf in leaves if leaf.requires_grad]
    # Where a mask allows nothing at all, zeros come out that depend on nothing.
    pairs = [(results[name], grad) for name, grad in heard.items() if results[name].requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in learnt]
    return torch.autograd.grad(
        [result for result, _ in pairs],
        learnt,
        [grad for _, grad in pairs],
        create_graph=torch.is_grad_enabled(),
        materialize_grads=True,
    )


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
