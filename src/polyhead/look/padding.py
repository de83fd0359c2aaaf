"""Padding of a forward pass: the real tokens of each sequence, from the masks of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import ArgumentError
from polyhead.look.layers import AttentionLayer, bound_arguments, is_ours
from polyhead.mask import Causal, LeftPadding, Lengths, Mask, Window

__all__ = ["Padding"]

_UNKNOWN: Any = object()
_REMEDY = 'use how="zero", or pass a padding mask'


class Padding:
    """Recorder of the masks with which a model and its layers are called, while they run.

    Args:
        model: of transformers, whose parts get an attention_mask (B, S), or of our modules.
        layers: the layers whose tokens are needed.
    """

    def __init__(self, model: nn.Module, layers: list[AttentionLayer]) -> None:
        self.model = model
        named = dict(model.named_modules())
        self.layers = layers
        self.parts = {layer.index: list(_parts_around(named, layer)) for layer in layers}
        self.given: dict[int, Any] = {}  # by the id of a module that runs: its mask

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record a module's mask when it is entered, and drop it when it returns."""
        modules = {id(part): part for parts in self.parts.values() for part in parts}
        modules |= {id(layer.module): layer.module for layer in self.layers}
        with ExitStack() as stack:
            for module in modules.values():
                stack.callback(
                    module.register_forward_pre_hook(self._enter, with_kwargs=True).remove
                )
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = bound_arguments(module, args, kwargs)
        if is_ours(module):
            has_memory = arguments.get("memory") is not None
            self.given[id(module)] = None if has_memory else arguments.get("mask")
            if arguments.get("cache") is not None and not has_memory:
                has_mask = arguments.get("mask") is not None
                self.given[id(module)] = "a mask of cached tokens too" if has_mask else None
        elif any(arguments.get(name) is not None for name in ("cu_seq_lens_q", "cu_seqlens")):
            self.given[id(module)] = "packed sequences"
        else:
            others = [n for n, x in arguments.items() if "mask" in n and x is not None]
            known = _is_of_transformers(module) or set(others) <= {"attention_mask"}
            self.given[id(module)] = arguments.get("attention_mask") if known else ", ".join(others)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self.given.pop(id(module), None)

    def real_tokens(self, layer: AttentionLayer, merged: Tensor) -> Tensor | None:
        """Return (B, T), True for tokens that are not padding; None: all are real.

        Raises:
            ArgumentError: it is not certain.
        """
        if merged.ndim != 3:
            raise _uncertain(layer, f"heads of shape {tuple(merged.shape)}, not (B, T, H * E)")
        B, T, _ = merged.shape
        if is_ours(layer.module):
            return _real_of_ours(layer, self.given.get(id(layer.module)), B, T, merged.device)
        masks = [self.given[id(part)] for part in self.parts[layer.index] if id(part) in self.given]
        for mask in masks:
            if mask is None:
                return None
            of_rows = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == B
            if of_rows and mask.shape[1] >= T:
                real: Tensor = mask[:, mask.shape[1] - T :].to(merged.device) != 0
                return real
        if masks:
            last = masks[-1]
            got = tuple(last.shape) if isinstance(last, Tensor) else last
            kind = got if isinstance(got, (str, tuple)) else type(got).__name__
            raise _uncertain(layer, f"attention_mask {kind}, not (B = {B}, at least T = {T})")
        return None


def _parts_around(named: dict[str, nn.Module], layer: AttentionLayer) -> Iterator[nn.Module]:
    """Yield the transformers models around a layer, the innermost first, then the whole model."""
    name = layer.name
    if not name:
        yield named[name]
    while name:
        name = name.rpartition(".")[0]
        if name == "" or _is_of_transformers(named[name]):
            yield named[name]


def _is_of_transformers(module: nn.Module) -> bool:
    return hasattr(module, "main_input_name")


def _real_of_ours(
    layer: AttentionLayer, mask: Mask | str | None, B: int, T: int, device: torch.device
) -> Tensor | None:
    if isinstance(mask, str):
        raise _uncertain(layer, mask)
    rules = [] if mask is None else list(getattr(mask, "conjuncts", (mask,)))
    rules = [rule for rule in rules if not isinstance(rule, (Causal, Window))]
    for rule in rules:
        if not isinstance(rule, (Lengths, LeftPadding)):
            raise _uncertain(layer, f"mask {rule!r}, which may forbid padding or something else")
    real = torch.ones(B, T, dtype=torch.bool, device=device)
    for rule in rules:
        real &= rule.materialize(T, T).to(device).expand(-1, 1, T, T)[:, 0, -1]
    return real if rules else None


def _uncertain(layer: AttentionLayer, got: str) -> ArgumentError:
    return ArgumentError(
        "how",
        'must not be "mean" where it is not certain which tokens are padding',
        f"{type(layer.module).__name__} ({layer.name}) with {got}",
        _REMEDY,
    )
