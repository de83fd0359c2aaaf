"""Second derivatives for kernels that have only first ones: through the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyhead.backends import reference
from polyhead.call import AttentionCall, Aux
from polyhead.errors import BackendError

__all__ = ["run_twice_differentiable"]

Run = Callable[[AttentionCall], tuple[Tensor, Aux]]


def run_twice_differentiable(run: Run, call: AttentionCall) -> tuple[Tensor, Aux]:
    """`run(call)`, whose gradient can be differentiated again: the output, and lse if asked for.

    The first derivative is the kernel's own, unless a second one was announced
    (`create_graph=True`): then both come from the definition.
    """
    tensors = call.tensors
    output, *lse = _TwiceDifferentiable.apply(run, call, tuple(tensors), *tensors.values())  # type: ignore[no-untyped-call]
    return output, Aux(lse=lse[0] if lse else None)


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
        ctx.generator = _generator_state(call)
        # The kernel's own graph waits inside this node, on copies that have no past.
        ctx.leaves, ctx.outputs = _run_apart(run, call, names, tensors)
        return tuple(output.detach() for output in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # raises torch's own error if the graph was freed
        wanted = [tensor.requires_grad for tensor in tensors]
        if torch.is_grad_enabled():  # create_graph=True
            if ctx.call.dropout > 0.0:
                raise BackendError(
                    {
                        "reference": [
                            "cannot repeat the dropout of another backend twice; got "
                            f"dropout = {ctx.call.dropout} and create_graph=True"
                        ]
                    }
                )
            again = _with(ctx.call, ctx.names, tensors)
            leaves, outputs = tensors, _outputs(*reference.run(again))
        elif ctx.outputs is None:  # a second pass over a retained graph, with the same dropout
            with torch.random.fork_rng(_cuda(ctx.call), enabled=ctx.generator is not None):
                _restore_generator(ctx.call, ctx.generator)
                leaves, outputs = _run_apart(ctx.run, ctx.call, ctx.names, tensors)
        else:
            leaves, outputs = ctx.leaves, ctx.outputs
            # What the kernel saved must not outlive this pass, as in any other graph.
            ctx.leaves = ctx.outputs = None
        given = iter(
            _gradients(
                outputs, [leaf for leaf, want in zip(leaves, wanted, strict=True) if want], grads
            )
        )
        return (None,) * 3 + tuple(next(given) if want else None for want in wanted)


def _with(call: AttentionCall, names: tuple[str, ...], tensors: Sequence[Tensor]) -> AttentionCall:
    changes: dict[str, Any] = dict(zip(names, tensors, strict=True))
    return replace(call, **changes)


def _run_apart(
    run: Run, call: AttentionCall, names: tuple[str, ...], tensors: tuple[Tensor, ...]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Run on detached tensors, under autograd: these leaves, and the outputs."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        outputs = _outputs(*run(_with(call, names, leaves)))
    return leaves, outputs


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


def _gradients(
    outputs: Sequence[Tensor], leaves: list[Tensor], grads: tuple[Tensor, ...]
) -> Sequence[Tensor]:
    # Where a mask allows nothing at all, zeros come out that depend on nothing.
    pairs = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if y.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(
        [output for output, _ in pairs],
        leaves,
        [grad for _, grad in pairs],
        create_graph=torch.is_grad_enabled(),
        materialize_grads=True,
    )


def _outputs(output: Tensor, aux: Aux) -> tuple[Tensor, ...]:
    return (output,) if aux.lse is None else (output, aux.lse)
