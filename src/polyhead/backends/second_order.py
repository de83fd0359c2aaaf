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

_TENSORS = ("query", "key", "value", "bias", "sinks", "alibi_slopes")


def run_twice_differentiable(run: Run, call: AttentionCall) -> Tensor:
    """The output of `run(call)`, whose gradient can be differentiated again.

    The first derivative is the kernel's own, unless a second one was announced
    (`create_graph=True`): then both come from the definition.
    """
    names = tuple(name for name in _TENSORS if getattr(call, name) is not None)
    tensors = [getattr(call, name) for name in names]
    output: Tensor = _TwiceDifferentiable.apply(run, call.without_aux(), names, *tensors)  # type: ignore[no-untyped-call]
    return output


class _TwiceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        call: AttentionCall,
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.run, ctx.call, ctx.names = run, call, names
        ctx.save_for_backward(*tensors)
        # The kernel's own graph waits inside this node, on copies that have no past.
        ctx.leaves, ctx.output = _run_apart(run, call, names, tensors)
        return ctx.output.detach()  # type: ignore[no-any-return]

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
            leaves, output = tensors, reference.run(again)[0]
        elif ctx.output is None:  # a second pass over a retained graph
            leaves, output = _run_apart(ctx.run, ctx.call, ctx.names, tensors)
        else:
            leaves, output = ctx.leaves, ctx.output
            # What the kernel saved must not outlive this pass, as in any other graph.
            ctx.leaves = ctx.output = None
        given = iter(
            torch.autograd.grad(
                output,
                [leaf for leaf, want in zip(leaves, wanted, strict=True) if want],
                grads[0],
                create_graph=torch.is_grad_enabled(),
            )
        )
        return (None,) * 3 + tuple(next(given) if want else None for want in wanted)


def _with(call: AttentionCall, names: tuple[str, ...], tensors: Sequence[Tensor]) -> AttentionCall:
    changes: dict[str, Any] = dict(zip(names, tensors, strict=True))
    return replace(call, **changes)


def _run_apart(
    run: Run, call: AttentionCall, names: tuple[str, ...], tensors: tuple[Tensor, ...]
) -> tuple[list[Tensor], Tensor]:
    """Run on detached tensors, under autograd: these leaves, and the output."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        output, _ = run(_with(call, names, leaves))
    return leaves, output
