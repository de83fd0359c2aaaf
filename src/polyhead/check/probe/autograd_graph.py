"""Origin of a tensor, read from its autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["made_by"]

# Operations that move or select values, by the names of their graph nodes.
_MOVES = (
    "view",
    "transpose",
    "permute",
    "clone",
    "expand",
    "alias",
    "squeeze",
    "copy",
    "cat",
    "stack",
    "slice",
    "select",
    "pad",
    "nantonum",
    "maskedfill",
)
_PRODUCTS = ("bmm", "mmbackward", "scaleddotproduct", "flexattention")


def made_by(merged: Tensor) -> str | None:
    """Classify the operation that produced the contexts of heads.

    "product"; "gated": a product times another tensor that requires grad; None: other operations
    follow the product, or there is none.
    """
    return _made_by(merged.grad_fn, 0)


def _made_by(node: Any, depth: int) -> str | None:
    while node is not None and any(move in _name(node) for move in _MOVES):
        node = next((n for n, _ in node.next_functions if n is not None), None)
        depth += 1
    if node is None or depth > 40:
        return None
    name = _name(node)
    parents = [parent for parent, _ in node.next_functions]
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # a custom kernel
        return "product"
    if any(product in name for product in _PRODUCTS) and "addmm" not in name:
        return None if any(_is_parameter(p) for p in parents) else "product"
    if name.startswith("sum"):
        # Elementwise weights times values, then summed.
        return "product" if parents and _name(parents[0]).startswith("mul") else None
    if name.startswith("mul"):
        kinds = [None if parent is None else _made_by(parent, depth + 1) for parent in parents]
        norm = any(parent is not None and "rsqrt" in _name(parent) for parent in parents)
        if norm or not any(kinds):
            return None
        alone = len([p for p in parents if p is not None]) == 1
        return "product" if alone and "gated" not in kinds else "gated"
    return None


def _name(node: Any) -> str:
    name: str = node.name().lower().replace("unsafe", "")
    return name


def _is_parameter(node: Any) -> bool:
    while node is not None and any(move in _name(node) for move in (*_MOVES, "tbackward")):
        node = next((n for n, _ in node.next_functions if n is not None), None)
    return node is not None and "AccumulateGrad" in node.name()
