"""What the last step compares beside outputs: gradients, products, time."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from polyhead.convert import stacked_to_split
from polyhead.modules import MultiHeadAttention, MultiHeadAttentionWrapper

__all__ = ["gradient_difference", "products_and_times"]

_HEADS, _HEAD_DIM, _TOKENS = 8, 16, 64
_ROUNDS, _SECONDS = 5, 0.2  # at most: on a busy machine, too, the page is made at once
_PRODUCTS = {"linear", "matmul", "__matmul__"}


def gradient_difference(
    stacked: MultiHeadAttentionWrapper, split: MultiHeadAttention, x: Tensor
) -> float:
    """The largest difference of any gradient of a weight or of x, the loss being the sum of y²."""

    def gradients(module: Any, projections: list[list[Tensor]]) -> list[Tensor]:
        source = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = module(source).square().sum()
            flat = [weight for weights in projections for weight in weights]
            found = list(torch.autograd.grad(loss, [source, *flat]))
        joined, at = [found[0]], 1
        for weights in projections:
            joined.append(torch.cat(found[at : at + len(weights)]))
            at += len(weights)
        return joined

    names = ("W_query", "W_key", "W_value")
    of_heads = [[getattr(head, name).weight for head in stacked.heads] for name in names]
    of_all = [[getattr(split, name).weight] for name in names]
    pairs = zip(gradients(stacked, of_heads), gradients(split, of_all), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def products_and_times() -> dict[str, Any]:
    """Matrix products and milliseconds of both at one real size, on this machine."""
    d_in = _HEADS * _HEAD_DIM
    with torch.random.fork_rng(devices=[]):
        stacked = MultiHeadAttentionWrapper(
            d_in, _HEAD_DIM, _TOKENS, 0.0, _HEADS, backend="reference"
        )
        x = torch.randn(1, _TOKENS, d_in)
    modules: dict[str, Any] = {"stacked": stacked, "split": stacked_to_split(stacked)}
    modules["split"].backend = "reference"
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    products = {}
    with torch.no_grad():
        for name, module in modules.items():  # also the warm-up
            with _Counted() as counted:
                module(x)
            products[name] = counted.products
        begun = time.perf_counter()
        for _ in range(_ROUNDS):
            for name, module in modules.items():
                start = time.perf_counter()
                module(x)
                seconds[name].append(time.perf_counter() - start)
            if time.perf_counter() - begun > _SECONDS:
                break
    return {
        "heads": _HEADS,
        "head_dim": _HEAD_DIM,
        "tokens": _TOKENS,
        "products": products,
        "milliseconds": {n: round(1e3 * statistics.median(took), 3) for n, took in seconds.items()},
    }


class _Counted(TorchFunctionMode):
    """Counts matrix products. (A dispatch mode would import torch's compiler, for seconds.)"""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.products += func.__name__ in _PRODUCTS
        return func(*args, **(kwargs or {}))
