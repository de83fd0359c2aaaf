"""Tolerances between equal computations, used by every law.

The target's operations are unknown, so its rounding error is measured: a run in float64 in which
random noise, relative to its size, is added to the result of every arithmetic operation shows how
much of it reaches the output. The response is linear, so one measurement serves every dtype:

    allowed(dtype) = MARGIN * response * eps(dtype),     response = |disturbed - exact| / noise

The method is Monte Carlo arithmetic (Parker 1997; Vignes' CESTAC, 1974).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "Disturb",
    "Narrowest",
    "Spy",
    "allowed_difference",
    "as_good_as_eager",
    "operation",
    "response",
]

# A few draws estimate the size of the response, not its worst case.
MARGIN = 16.0
DRAWS = 3

# Sums of many terms: if they cancel, rounding is relative to the terms, not to the sum.
_SUMS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "sum", "mean", "einsum"}
_FUSED = ("scaled_dot_product", "flex_attention")
_ELEMENTWISE = {"mul", "div", "add", "sub", "exp", "tanh", "sigmoid", "rsqrt", "pow", "sqrt"}
_ROWS = {"softmax", "safe_softmax", "log_softmax", "native_layer_norm", "cos", "sin"}


def operation(func: Any) -> str:
    """Name of an operation in a dispatch mode, without its overload."""
    name: str = getattr(func, "overloadpacket", func).__name__
    return name.removeprefix("_")


class Spy(TorchDispatchMode):
    """Dispatch mode that also supports uncompiled flex_attention, a higher-order operator."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True


class Disturb(Spy):
    """Adds noise of relative size `noise` to the results of arithmetic operations."""

    def __init__(self, noise: float, generator: torch.Generator) -> None:
        super().__init__()
        self.noise = noise
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = operation(func)
        if name in _SUMS or name.startswith(_FUSED):
            return self._on_first(result, relative_to_row=True)
        if name in _ELEMENTWISE or name in _ROWS:
            return self._on_first(result, relative_to_row=False)
        return result

    def _on_first(self, result: Any, *, relative_to_row: bool) -> Any:
        if isinstance(result, tuple):
            return (self._disturbed(result[0], relative_to_row), *result[1:])
        return self._disturbed(result, relative_to_row)

    def _disturbed(self, x: Tensor, relative_to_row: bool) -> Tensor:
        if not x.is_floating_point() or x.numel() == 0:
            return x
        draws = torch.rand(x.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        size = x.abs()
        if relative_to_row and x.ndim:
            size = size + x.square().mean(dim=-1, keepdim=True).sqrt()
        noise = self.noise * size * draws.to(x.device, x.dtype)
        # Masked scores are (nearly) infinite: they are filled in, not computed.
        return torch.where(size < 1e30, x + noise, x)


def response(run: Callable[[], Tensor], seed: int, dtype: torch.dtype = torch.float64) -> float:
    """Return the change of the output per unit of relative rounding error in its operations.

    Args:
        run: computes the output, the same each time.
        seed: seed of the noise.
        dtype: dtype of the run: float64, or float32 if float64 is not supported.
    """
    # Far above the dtype's own rounding, and small enough for a linear response.
    noise = math.sqrt(torch.finfo(dtype).eps)
    with torch.no_grad():
        exact = run()
        largest = exact.abs().nan_to_num(0.0, 0.0).max().item() if exact.numel() else 0.0
        generator = torch.Generator().manual_seed(seed)
        moved = 0.0
        for _ in range(DRAWS):
            with Disturb(noise, generator):
                disturbed = run()
            difference = (disturbed - exact).abs().nan_to_num(0.0, 0.0)
            moved = max(moved, difference.max().item() if difference.numel() else 0.0)
    # The output itself is rounded at least.
    return max(moved / noise, largest)


class Narrowest(Spy):
    """Records the narrowest floating dtype of any computation."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = operation(func)
        if name in _SUMS | _ELEMENTWISE | _ROWS | {"to_copy"} or name.startswith(_FUSED):
            for item in result if isinstance(result, tuple) else (result,):
                if isinstance(item, Tensor) and item.is_floating_point():
                    self.dtype = max(self.dtype, item.dtype, key=lambda d: torch.finfo(d).eps)
        return result


def allowed_difference(response: float, dtype: torch.dtype) -> float:
    """Return the tolerance of a computation in `dtype` against exact arithmetic.

    >>> allowed_difference(1.0, torch.float32) == 16 * torch.finfo(torch.float32).eps
    True
    """
    return MARGIN * response * torch.finfo(dtype).eps


def as_good_as_eager(
    eager: Tensor, exact: Tensor, largest_score: float, largest_value: float
) -> float:
    """Return the tolerance of a function against float64.

    It is twice the error of the eager formula in the same dtype, plus the rounding error of one
    weight and one value.

    Args:
        eager: the formula in the dtype.
        exact: the formula in float64.
        largest_score, largest_value: the rounding error of a score is the relative error of a
            weight.
    """
    error = (eager.double() - exact).abs().nan_to_num(0.0).max().item() if exact.numel() else 0.0
    rounding = torch.finfo(eager.dtype).eps * (1.0 + largest_score) * largest_value
    return 2 * error + 8 * rounding
