"""Step-by-step trace of the lecture's classes: every intermediate tensor, in plain PyTorch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ArgumentError, DtypeError
from polyhead.mask import Mask
from polyhead.modules import CausalAttention, MultiHeadAttention, MultiHeadAttentionWrapper
from polyhead.modules.validate import combine_masks
from polyhead.positions import alibi_slopes

__all__ = ["Trace", "trace"]

_TRACED = (CausalAttention, MultiHeadAttentionWrapper, MultiHeadAttention)
# Larger tensors are printed as shapes only.
_MOST_ROWS, _MOST_COLUMNS = 12, 12

_PER_HEAD = ("query", "key", "value", "scores", "masked", "weights", "contexts")
_FORMULAS = {
    "query": "x W_query, split into heads",
    "key": "x W_key, split into heads",
    "value": "x W_value, split into heads",
    "scores": "query key^T",
    "masked": "scores / sqrt(d), -inf if masked",
    "weights": "softmax(masked) over the keys",
    "contexts": "weights value",
    "merged": "the heads' contexts, one head after the other",
    "output": "out_proj(merged), or merged without an out_proj",
}


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Intermediate tensors of multi-head attention on one input (`polyhead.trace`).

    With H query heads and G KV heads, T query and S key tokens, d and e features per head:

    Attributes:
        query: (B, H, T, d), after the split, qk_norm and RoPE (if any).
        key, value: (B, G, S, d), (B, G, S, e).
        scores: (B, H, T, S), each query times each key.
        masked: (B, H, T, S), scaled, with softcap and biases (if any), -inf if masked.
        weights: (B, H, T, S), the softmax; rows sum to 1 (with a sink to less; a row without keys
            to attend to is zero).
        contexts: (B, H, T, e), per head, gated if there is a gate.
        merged: (B, T, H * e), the concatenated heads.
        output: (B, T, d_out), the output of the module.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    masked: Tensor
    weights: Tensor
    contexts: Tensor
    merged: Tensor
    output: Tensor

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={tuple(step.shape)}" for name, step in self._steps())
        return f"Trace({shapes})"

    def __str__(self) -> str:
        """Name, shape and formula of each step, and the elements of batch row 0 if it is small."""
        parts = []
        for name, step in self._steps():
            parts.append(f"{name:9}{tuple(step.shape)!s:16}{_FORMULAS[name]}")
            if step.ndim >= 3 and step.shape[-2] <= _MOST_ROWS and step.shape[-1] <= _MOST_COLUMNS:
                parts.append(_numbers(step))
        return "\n".join(parts)

    def _steps(self) -> list[tuple[str, Tensor]]:
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


def trace(
    module: CausalAttention | MultiHeadAttentionWrapper | MultiHeadAttention,
    x: Tensor,
    memory: Tensor | None = None,
    mask: Mask | None = None,
    *,
    positions: Tensor | None = None,
) -> Trace:
    """Compute a module's output step by step, in the input's dtype, and return every step.

    It runs in plain PyTorch, independent of the module's backend, and is meant for small inputs:
    it materializes T x S scores per head.

    Args:
        module: a `CausalAttention`, `MultiHeadAttentionWrapper` or `MultiHeadAttention`.
        x, memory, mask, positions: as the module's `forward` takes them.

    Raises:
        DtypeError: the module is of another class, or overrides `forward`.
        ArgumentError: the module is in training mode with dropout.
        ShapeError, DeviceError: as raised by the module.

    >>> import polyhead as ph
    >>> mha = ph.MultiHeadAttention(3, 4, context_length=6, dropout=0.0, num_heads=2)
    >>> steps = ph.trace(mha, torch.ones(1, 3, 3))
    >>> steps.weights.shape, torch.allclose(steps.output, mha(torch.ones(1, 3, 3)), atol=1e-6)
    (torch.Size([1, 2, 3, 3]), True)
    >>> print(steps)
    query    (1, 2, 3, 2)    x W_query, split into heads
    ...
    weights  (1, 2, 3, 3)    softmax(masked) over the keys
      head 0                      head 1
        1.0000  0.0000  0.0000      1.0000  0.0000  0.0000
        0.5000  0.5000  0.0000      0.5000  0.5000  0.0000
        0.3333  0.3333  0.3333      0.3333  0.3333  0.3333
    ...
    """
    _check_traced(module)
    joined: list[Tensor]
    if isinstance(module, MultiHeadAttentionWrapper):
        heads: Any = module.heads
        traces = [trace(head, x, memory, mask, positions=positions) for head in heads]
        joined = [
            torch.cat([getattr(of_head, name) for of_head in traces], dim=1) for name in _PER_HEAD
        ]
    else:
        joined = _attend(module, x, memory, mask, positions)
    merged = joined[-1].transpose(1, 2).flatten(2)
    out_proj = getattr(module, "out_proj", None)
    output = merged if out_proj is None else out_proj(merged)
    return Trace(**dict(zip(_PER_HEAD, joined, strict=True)), merged=merged, output=output)


def _attend(
    module: CausalAttention | MultiHeadAttention,
    x: Tensor,
    memory: Tensor | None,
    mask: Mask | None,
    positions: Tensor | None,
) -> list[Tensor]:
    """Compute the per-head steps, in the order of `_PER_HEAD`."""
    query, key, value = module.project_qkv(x, memory, positions=positions)
    group = query.shape[1] // key.shape[1]
    key_of_head = key.repeat_interleave(group, dim=1)
    value_of_head = value.repeat_interleave(group, dim=1)
    T, S = query.shape[2], key.shape[2]
    scores = query @ key_of_head.mT
    scale = query.shape[-1] ** -0.5 if module.scale is None else module.scale
    masked = scores * scale
    sinks = None
    if isinstance(module, MultiHeadAttention):
        masked, sinks = _add_biases(module, masked), module.sinks
    rule = combine_masks(module.mask, mask)
    if rule is not None:
        rule.check(x.shape[0], query.shape[1], T, S, x.device)
        allowed = rule.materialize(T, S, device=x.device)
        masked = masked.masked_fill(~allowed, float("-inf"))
    weights = _softmax(masked, sinks)
    contexts = weights @ value_of_head
    gate = getattr(module, "W_gate", None)
    if gate is not None:
        gates = torch.sigmoid(gate(x)).unflatten(2, (query.shape[1], -1))
        contexts = contexts * gates.transpose(1, 2)
    return [query, key, value, scores, masked, weights, contexts]


def _add_biases(module: MultiHeadAttention, scaled: Tensor) -> Tensor:
    T, S = scaled.shape[2:]
    if module.softcap is not None:
        scaled = module.softcap * torch.tanh(scaled / module.softcap)
    if module.position_bias is not None:
        scaled = scaled + module.position_bias(T, S).to(scaled.dtype)
    if module.alibi:
        slopes = alibi_slopes(module.num_heads, device=scaled.device).to(scaled.dtype)
        at = torch.arange(S, device=scaled.device)
        scaled = scaled - slopes[:, None, None] * (at[S - T :, None] - at).abs()
    return scaled


def _softmax(masked: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is not None:
        column = sinks.to(masked.dtype)[:, None, None].expand(*masked.shape[:3], 1)
        return torch.cat([masked, column], dim=-1).softmax(dim=-1)[..., :-1]
    empty = (masked == float("-inf")).all(dim=-1, keepdim=True)
    return masked.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)


def _check_traced(module: object) -> None:
    own = next((kind for kind in _TRACED if isinstance(module, kind)), None)
    if own is None or type(module).forward is not own.forward:  # type: ignore[attr-defined]
        raise DtypeError(
            "module",
            "must be polyhead's CausalAttention, MultiHeadAttentionWrapper or MultiHeadAttention",
            type(module).__name__
            if own is None
            else f"{type(module).__name__} with its own forward",
            "convert it (ph.convert.from_torch, from_transformers), or load its state_dict into "
            "one of these",
        )
    dropout = getattr(module, "dropout", None)
    if dropout is not None and module.training and dropout.p > 0.0:  # type: ignore[attr-defined]
        raise ArgumentError(
            "module",
            "must not apply dropout, which makes its output differ from its steps",
            f"dropout={dropout.p} in training",
            "call module.eval() first",
        )


def _numbers(step: Tensor) -> str:
    """Batch row 0 as text: heads next to each other, one line per token."""
    first = step[0].detach().double().cpu()
    if first.ndim == 2:
        lines = ["".join(f"{number:8.4f}" for number in row) for row in first.tolist()]
        return "\n".join(f"  {line}" for line in lines)
    width = 8 * first.shape[-1]
    blocks = [
        [f"head {head}".ljust(width), *("".join(f"{n:8.4f}" for n in row) for row in rows)]
        for head, rows in enumerate(first.tolist())
    ]
    lines = ["    ".join(cells).rstrip() for cells in zip(*blocks, strict=True)]
    return "\n".join(f"  {line}" for line in lines)
