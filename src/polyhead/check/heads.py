"""The contexts of each head, looked for inside a module: what enters its output projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyhead.check.law import NotApplicable
from polyhead.check.subject import Subject, difference

__all__ = ["contexts_of", "need_heads", "out_projection", "shares_of_two"]


def need_heads(subject: Subject) -> int:
    """The number of heads, where it is known and there are several."""
    if subject.claims.num_heads is None:
        raise NotApplicable("the number of heads is not known; pass num_heads=")
    if subject.claims.num_heads == 1:
        raise NotApplicable("it has one head")
    return subject.claims.num_heads


def contexts_of(subject: Subject, module: nn.Module, x: Tensor) -> Tensor:
    """(B, T, H, E) the heads' contexts of a call, with their graph if gradients are on.

    They are the input of the linear layer whose output is the module's; without one, the output
    itself.

    Raises:
        NotApplicable: they cannot be found.
    """
    if "features first" not in subject.notes:
        subject.notes["features first"] = _features_first(subject)
    return _contexts(subject, module, x, subject.notes["features first"])


def _contexts(subject: Subject, module: nn.Module, x: Tensor, features_first: bool) -> Tensor:
    H = subject.claims.num_heads
    if H is None:
        raise NotApplicable("the number of heads is not known; pass num_heads=")
    if not subject.calling.batch_first:
        raise NotApplicable("heads are looked into where the batch comes first only")
    name = out_projection(subject)
    if name is None:
        merged = subject.call(module, x).output
    else:
        seen: list[Tensor] = []
        layer = module.get_submodule(name)
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            subject.call(module, x)
        finally:
            hook.remove()
        merged = seen[-1]
    if merged.shape[:2] != x.shape[:2] or merged[0, 0].numel() % H:
        raise NotApplicable(f"what is merged, {tuple(merged.shape)}, is not {H} heads")
    if features_first:
        return merged.reshape(x.shape[0], x.shape[1], -1, H).transpose(2, 3)
    return merged.reshape(x.shape[0], x.shape[1], H, -1)


def _features_first(subject: Subject) -> bool:
    """Whether the heads are interleaved in what is merged: head h has features h, h + H, ...

    Found by what holds of every head: its context of two tokens is a mean of their values.
    """
    if subject.claims.features or subject.claims.window == 1:
        return False
    plain, turned = (shares_of_two(subject, order)[0] for order in (False, True))
    allowed = 16 * subject.allowed(subject.input(1, 2))
    return bool(plain > allowed >= turned)


def shares_of_two(subject: Subject, features_first: bool | None = None) -> tuple[Tensor, Tensor]:
    """How well each head's context of two tokens is w times one's value and u times the other's.

    Returns:
        The largest misfit, and w + u of each head, (H,).
    """
    x = subject.input(1, 2)
    if features_first is None:
        features_first = bool(subject.notes.get("features first"))
    with torch.no_grad():
        first, second, both = (
            _contexts(subject, subject.exact, part, features_first)[0, -1]
            for part in (x[:, :1], x[:, 1:], x)
        )
    if first.shape[-1] < 3:
        raise NotApplicable(f"its heads have {first.shape[-1]} features: too few to tell")
    values = torch.stack([first, second], dim=-1)
    if not (values.isfinite().all() and both.isfinite().all()):
        raise NotApplicable("one token, or two, give numbers that are not finite")
    shares = torch.linalg.lstsq(values, both[..., None]).solution
    misfit = difference((values @ shares)[..., 0], both).max()
    return misfit, shares.sum(dim=(1, 2))


def out_projection(subject: Subject) -> str | None:
    """The name of the layer whose output is the module's; None if there is no such layer.

    Raises:
        NotApplicable: there is an output projection, and it is no layer.
    """
    if "out projection" not in subject.notes:
        subject.notes["out projection"] = _find_out_projection(subject)
    name: str | None = subject.notes["out projection"]
    if name == "":
        raise NotApplicable("its output projection is no layer that can be looked into")
    return name


def _find_out_projection(subject: Subject) -> str | None:
    """As `out_projection`; "" where it is no layer."""
    module, x = subject.exact, subject.input(2)
    seen: list[tuple[str, Tensor]] = []

    def remember(name: str) -> Any:
        return lambda _, inputs, output: seen.append((name, output))

    layers = [(name, layer) for name, layer in module.named_modules() if _like_linear(layer)]
    hooks = [layer.register_forward_hook(remember(name)) for name, layer in layers]
    try:
        with torch.enable_grad():
            output = subject.call(module, x).output
    finally:
        for hook in hooks:
            hook.remove()
    for name, given in reversed(seen):
        same_size = given.numel() == output.numel()
        if same_size and not difference(given.flatten(), output.flatten()).any():
            return name
    return "" if _ends_in_a_parameter(output) else None


def _like_linear(layer: nn.Module) -> bool:
    """nn.Linear, and transformers' Conv1D, whose weight is transposed."""
    weight = getattr(layer, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and not isinstance(layer, nn.Embedding)
        and not list(layer.children())
    )


# What moves numbers about and computes nothing, by the names of its nodes in the graph.
_MOVES = (
    "view",
    "transpose",
    "permute",
    "clone",
    "expand",
    "tbackward",
    "alias",
    "squeeze",
    "copy",
)


def _ends_in_a_parameter(output: Tensor) -> bool:
    """Whether the last arithmetic that made the output has a parameter as an operand."""

    def before_moves(node: Any) -> Any:
        while node is not None and any(move in node.name().lower() for move in _MOVES):
            node = node.next_functions[0][0]
        return node

    last = before_moves(output.grad_fn)
    operands = [] if last is None else [before_moves(node) for node, _ in last.next_functions]
    return any(node is not None and "AccumulateGrad" in node.name() for node in operands)
