"""Core of an attention: the function from the outputs of its projections to its heads' contexts,
callable with other values than the projections produce.

Products with a parameter are detected in layers, in `F.linear` and in `@`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from polyhead.check.law import NotApplicable
from polyhead.check.probe.autograd_graph import made_by
from polyhead.check.subject import Subject

__all__ = ["Core", "Seen", "core_of", "flat"]

_PRODUCTS = {
    F.linear,
    torch.matmul,
    torch.mm,
    torch.addmm,
    torch.bmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
}


@dataclass(frozen=True)
class _Product:
    """Product with a parameter: its name, input and result."""

    name: str
    given: Tensor
    result: Tensor


@dataclass(frozen=True)
class Seen:
    """Tensors observed in one call.

    Attributes:
        inputs: inputs of the projections.
        projected: (T, R) outputs of all projections, concatenated.
        contexts: (T, M) input of the output projection, or the output.
        behind: output of the output projection; the contexts, without one.
        output: output of the module.
    """

    inputs: Sequence[Tensor]
    projected: Tensor
    contexts: Tensor
    behind: Tensor
    output: Tensor


@dataclass(frozen=True)
class Core:
    """Core of one module.

    Attributes:
        subject: the module.
        names: names of the projections' weights, in call order.
        out: index of the output projection among the products; None: there is none.
        axes: token axis of each projection's output.
        axis: token axis of the contexts.
        widths: number of features of each projection, R in all.
    """

    subject: Subject
    names: Sequence[str]
    out: int | None
    axes: Sequence[int]
    axis: int
    widths: Sequence[int]

    def seen(self, x: Tensor, given: Tensor | None = None) -> Seen:
        """Call the module with x (1, T, d_in). `given` (T, R) replaces the outputs of the
        projections.
        """
        count = len(self.axes)
        parts = None if given is None else given.split(list(self.widths), dim=1)
        spy = _Products(self.subject, self.axes, parts)
        with spy:
            output = self.subject.call(self.subject.exact, x).output
        products = spy.seen
        results = [flat(p.result, axis) for p, axis in zip(products, self.axes, strict=False)]
        last = None if self.out is None else products[self.out]
        contexts = output if last is None else last.given
        return Seen(
            [p.given for p in products[:count]],
            torch.cat(results, dim=1),
            flat(contexts, self.axis),
            output if last is None else last.result,
            output,
        )

    def __call__(self, given: Tensor) -> Tensor:
        """Return the contexts (T, M) for outputs (T, R) of the projections."""
        return self.seen(self.subject.input(1, given.shape[0]), given).contexts


def core_of(subject: Subject) -> Core:
    """Return the core of a module.

    Raises:
        NotApplicable: it cannot be found.
    """
    if "core" not in subject.notes:
        try:
            subject.notes["core"] = _find(subject)
        except NotApplicable as reason:
            subject.notes["core"] = str(reason)
        except Exception as error:  # of unknown code, which may not support this
            subject.notes["core"] = f"it cannot be inspected: {type(error).__name__}"
    found = subject.notes["core"]
    if isinstance(found, str):
        raise NotApplicable(found)
    core: Core = found
    return core


def flat(tensor: Tensor, axis: int) -> Tensor:
    """(T, ...) with all axes except the token axis flattened."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def _find(subject: Subject) -> Core:
    if not subject.calling.batch_first:
        raise NotApplicable("it can be inspected only with the batch first")
    calls = []
    for T in (2, 3):
        spy = _Products(subject)
        with torch.enable_grad(), spy:
            output = subject.call(subject.exact, subject.input(1, T).requires_grad_()).output
        calls.append((spy.seen, output))
    (few, output), (more, longer) = calls
    if [p.name for p in few] != [p.name for p in more]:
        raise NotApplicable("it multiplies other weights in longer sequences")
    out = next((i for i in reversed(range(len(few))) if made_by(few[i].given)), None)
    contexts, longer = (output, longer) if out is None else (few[out].given, more[out].given)
    own = {name for name, p in subject.exact.named_parameters() if p.ndim > 1}
    if unused := sorted(own - {p.name for p in few}):
        raise NotApplicable(f"{unused[0]} is in no detected product")
    kind = made_by(contexts)
    if kind is None:
        raise NotApplicable(
            "no product of weights and values is its output or the input of a layer"
        )
    if kind == "gated":
        raise NotApplicable("its heads are gated")
    count = len(few) if out is None else out
    if not count:
        raise NotApplicable("it has no projections before the attention")
    axes = [_tokens_axis(a.result, b.result) for a, b in zip(few, more, strict=True)][:count]
    widths = [few[i].result.numel() // 2 for i in range(count)]
    names = [few[i].name for i in range(count)]
    return Core(subject, names, out, axes, _tokens_axis(contexts, longer), widths)


def _tokens_axis(of_two: Tensor, of_three: Tensor) -> int:
    """Single axis that has 2 entries for two tokens and 3 for three."""
    if of_two.ndim == of_three.ndim:
        sizes = list(zip(of_two.shape, of_three.shape, strict=True))
        if [a for a in sizes if a[0] != a[1]] == [(2, 3)]:
            return sizes.index((2, 3))
    raise NotApplicable("the outputs of its projections have no token axis")


class _Products(TorchFunctionMode):
    """Records products with parameters, and can replace their results."""

    def __init__(
        self,
        subject: Subject,
        axes: Sequence[int] = (),
        given: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.own = {
            p.untyped_storage().data_ptr(): name
            for name, p in subject.exact.named_parameters()
            if p.ndim > 1
        }
        self.axes, self.given = axes, given
        self.seen: list[_Product] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _PRODUCTS:
            return result
        items = [a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else (arg,))]
        tensors = [a for a in items if isinstance(a, Tensor) and a.ndim > 1]
        names = [self.own.get(t.untyped_storage().data_ptr()) for t in tensors]
        weights = [name for name in names if name is not None]
        if len(weights) != 1 or len(tensors) != 2:
            return result
        place = len(self.seen)
        if self.given is not None and place < len(self.given):
            axis = self.axes[place]
            shape = result.movedim(axis, 0).shape
            result = self.given[place].reshape(shape).movedim(0, axis).to(result.dtype)
        self.seen.append(_Product(weights[0], tensors[names.index(None)], result))
        return result
