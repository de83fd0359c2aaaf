"""How far apart two equal computations may be. Every law takes its tolerance from here.

Nothing is known of the target's operations, so what rounding does to it is measured: a run in
float64 in which every arithmetic operation's result is disturbed by random noise, relative to its
size, shows how much of it reaches the output. That response is linear, so one measurement serves
every dtype:

    allowed(dtype) = MARGIN * response * eps(dtype),     response = |disturbed - exact| / noise

The idea is that of Monte Carlo arithmetic (Parker 1997; Vignes' CESTAC, 1974).
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

# A few draws find the size of the response, not its worst case.
MARGIN = 16.0
DRAWS = 3

# Sums of many terms: where they cancel, rounding is relative to the terms and not to the sum.
_SUMS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "sum", "mean", "einsum"}
_FUSED = ("scaled_dot_product", "flex_attention")
_ELEMENTWISE = {"mul", "div", "add", "sub", "exp", "tanh", "sigmoid", "rsqrt", "pow", "sqrt"}
_ROWS = {"softmax", "safe_softmax", "log_softmax", "native_layer_norm", "cos", "sin"}


def operation(func: Any) -> str:
    """The name of what a dispatch mode is given, without its overload."""
    name: str = getattr(func, "overloadpacket", func).__name__
    return name.removeprefix("_")


class Spy(TorchDispatchMode):
    """A mode under which flex_attention, uncompiled, runs too: it compiles in its own way."""

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
        # Masked scores are infinite, or nearly: they are filled in, not computed.
        return torch.where(size < 1e30, x + noise, x)


def response(run: Callable[[], Tensor], seed: int, dtype: torch.dtype = torch.float64) -> float:
    """By how much the output moves for each unit of relative rounding in its operations.

    Args:
        run: computes the output, the same each time.
        seed: of the noise.
        dtype: that it runs in: float64, or float32 where it can do no better.
    """
    # Far above the dtype's own rounding, and far below what would bend the response.
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
    # At the least the output itself is rounded.
    return max(moved / noise, largest)


class Narrowest(Spy):
    """Notes the narrowest floating dtype in which anything is computed."""

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
    """How far a computation in `dtype` may be from the same one in exact arithmetic.

    >>> allowed_difference(1.0, torch.float32) == 16 * torch.finfo(torch.float32).eps
    True
    """
    return MARGIN * response * torch.finfo(dtype).eps


def as_good_as_eager(
    eager: Tensor, exact: Tensor, largest_score: float, largest_value: float
) -> float:
    """How far a function may be from float64: twice as far as the formula written out is, in the
    same dtype, and the rounding that one weight and one value have.

    Args:
        eager: the formula in the dtype.
        exact: the formula in float64.
        largest_score, largest_value: a score's rounding is a weight's relative error.
    """
    error = (eager.double() - exact).abs().nan_to_num(0.0).max().item() if exact.numel() else 0.0
    rounding = torch.finfo(eager.dtype).eps * (1.0 + largest_score) * largest_value
    return 2 * error + 8 * rounding
