"""Laws of gradients: they reach every parameter, and match finite differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law, reported
from polyhead.check.subject import Subject

__all__ = ["LAWS"]

_STEP = 2.0**-17  # near the cube root of float64's eps: best for central differences


def need_float64(subject: Subject) -> nn.Module:
    if subject.dtype != torch.float64:
        raise NotApplicable("finite differences need float64")
    return subject.exact


@law
def gradient_reaches_every_parameter(subject: Subject) -> Verdict:
    """Every parameter receives a gradient.

    Why: a parameter without a gradient never trains, and no error is raised.

    Would have caught: projections that are created and not used, `.data` and `.detach()` in the
    forward pass, keys projected by the query layer.
    """
    parameters = {n: p for n, p in subject.exact.named_parameters() if p.requires_grad}
    if not parameters:
        raise NotApplicable("it has no parameters")
    x = subject.input(2)
    with torch.enable_grad():
        y = subject.call(subject.exact, x).output
        weighted = (y * subject.input(2, salt=3)[..., :1]).sum()
        gradients = torch.autograd.grad(weighted, list(parameters.values()), allow_unused=True)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if gradient is None:
            return broken(f"{name} is not used in the output", unused=name)
        if not gradient.isfinite().all():
            return broken(f"the gradient of {name} is not finite")
        # A key bias shifts all scores of a query equally: its exact gradient is zero.
        if parameter.ndim > 1 and not gradient.any():
            return broken(f"the gradient of {name} is zero")
    return holds()


@law
def gradient_matches_finite_differences(subject: Subject) -> Verdict:
    """Gradients of the input and of every parameter match finite differences.

    Why: a custom backward pass, or a detach, can be wrong while the forward pass is right.

    Would have caught: scores detached for a statistic and then used in the output; a custom
    backward without the mask or the softcap.
    """
    module = need_float64(subject)
    x = subject.input(2).requires_grad_()
    leaves = {"the input": x} | {n: p for n, p in module.named_parameters() if p.requires_grad}
    direction = subject.input(2, salt=3)[..., :1]

    def value() -> Tensor:
        return (subject.call(module, x).output * direction).sum()

    with torch.enable_grad():
        gradients = torch.autograd.grad(value(), list(leaves.values()), allow_unused=True)
    rounding = subject.allowed(x.detach()) * direction.numel()
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        step = _random_like(leaf, subject.seed)
        slope = 0.0 if gradient is None else (gradient * step).sum().item()
        near, far = (_central(value, leaf, step * h) / h for h in (_STEP, 2 * _STEP))
        # The error of central differences grows with the square of the step.
        allowed = 2 * abs(far - near) + 4 * rounding / _STEP
        if not abs(slope - near) <= allowed:
            return broken(
                f"the gradient of {name} along a random direction is {slope:.6g}, and finite "
                f"differences give {near:.6g}"
            )
    return holds()


@law
def second_derivative_is_right_or_refused(subject: Subject) -> Verdict:
    """The second derivative matches finite differences, or is refused.

    Why: gradient penalties and influence functions need it. An error is better than a wrong one.

    Would have caught: kernels whose backward pass is a constant to autograd. (torch's own fused
    kernels refuse it, which is reported and not judged.)
    """
    module = need_float64(subject)
    x = subject.input().requires_grad_()
    direction = subject.input(salt=3)[..., :1]
    along, step = (_random_like(x, subject.seed + k) for k in (1, 2))

    def slope() -> Tensor:
        value = (subject.call(module, x).output * direction).sum()
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return (gradient * along).sum()

    with torch.enable_grad():
        try:
            (second,) = torch.autograd.grad(slope(), x)
        except RuntimeError as error:
            return reported(f"refused: {str(error).splitlines()[0]}")
        near, far = (_central(slope, x, step * h, grad=True) / h for h in (_STEP, 2 * _STEP))
    actual = (second * step).sum().item()
    rounding = subject.allowed(x.detach()) * direction.numel()
    if not abs(actual - near) <= 2 * abs(far - near) + 16 * rounding / _STEP:
        return broken(
            f"the second derivative along random directions is {actual:.6g}, and finite "
            f"differences give {near:.6g}"
        )
    return holds()


@law
def parameters_are_registered(subject: Subject) -> Verdict:
    """Every learned tensor is among the module's parameters.

    Why: an unregistered tensor is not saved, not moved to the GPU, and not passed to the optimizer.

    Would have caught: heads kept in a plain list instead of an nn.ModuleList.
    """
    with torch.enable_grad():
        output = subject.call(subject.exact, subject.input()).output
    known = {id(p) for p in subject.exact.parameters()}
    for leaf in _leaves(output):
        if id(leaf) not in known:
            return broken(
                f"a tensor of shape {tuple(leaf.shape)} requires grad and is not a parameter: "
                "is it in a plain list or dict?"
            )
    return holds()


def _leaves(output: Tensor) -> Sequence[Tensor]:
    found, seen, left = [], set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        left += [following for following, _ in node.next_functions]
    return found


def _central(value: object, leaf: Tensor, step: Tensor, *, grad: bool = False) -> float:
    """(value(leaf + step) - value(leaf - step)) / 2."""
    ends = []
    before = leaf.detach().clone()
    for sign in (1, -1):
        with torch.no_grad():
            leaf.copy_(before + sign * step)
        with torch.set_grad_enabled(grad):
            ends.append(value().item())  # type: ignore[operator]
    with torch.no_grad():
        leaf.copy_(before)
    return float(ends[0] - ends[1]) / 2


def _random_like(leaf: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 17)
    return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)


LAWS = (
    gradient_reaches_every_parameter,
    gradient_matches_finite_differences,
    second_derivative_is_right_or_refused,
    parameters_are_registered,
)
