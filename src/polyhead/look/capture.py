"""Look at every head of a model while it reads a text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.call import AttentionCall
from polyhead.errors import ArgumentError, ShapeError
from polyhead.functional import observe
from polyhead.look.layers import (
    AttentionLayer,
    Head,
    attention_layers,
    check_heads,
    check_not_compiled,
    unneeded,
)
from polyhead.look.maps import map_of
from polyhead.look.report import HeadReport, LayerReport
from polyhead.look.stats import stats_of
from polyhead.look.sums import weights_by_chunk
from polyhead.look.top import top_keys_of

__all__ = ["capture"]

_CELLS = 2**22


@torch.no_grad()
def capture(
    model: nn.Module,
    input_ids: Tensor,
    heads: Collection[Head] | None = None,
    weights: bool = False,
    *,
    bins: int = 128,
    n_keys: int = 8,
    tokens: Sequence[str] = (),
    **inputs: Any,
) -> HeadReport:
    """One forward, and what each head did in it: statistics, map, most attended keys, contribution.

    A layer is looked at when it is reached, so no more than one layer's queries and keys are held.

    Args:
        model: built of polyhead's modules, or of transformers: then
            `polyhead.integrations.transformers.register()` must have been called once, and the
            model attends by polyhead for this forward.
        input_ids: (T,) or (1, T) token ids, or what else the model's forward takes first, with
            one batch row.
        heads: (layer, head) pairs to look at; None: all. Layers count from 0.
        weights: whether to keep the weights too, T x S of each head. For short texts.
        bins: rows and columns of each map.
        n_keys: how many most attended keys of each query to keep.
        tokens: the text of each token, for people to read.
        inputs: more of the model's forward, such as attention_mask=.

    Returns:
        `HeadReport`, on the CPU.

    Raises:
        ArgumentError, ShapeError: the model has no such heads, or none that attends by polyhead;
            or there is more than one batch row.

    >>> import polyhead as ph
    >>> mha = ph.MultiHeadAttention(8, 8, context_length=16, dropout=0.0, num_heads=2)
    >>> report = ph.look.capture(mha, torch.randn(1, 16, 8))
    >>> report.layers[0].map.shape
    torch.Size([2, 16, 16])
    """
    check_not_compiled(model)
    input_ids = input_ids[None] if input_ids.ndim == 1 else input_ids
    if input_ids.shape[0] != 1:
        raise ShapeError(
            "input_ids", "must be one text, (T,) or (1, T)", tuple(input_ids.shape), "give one row"
        )
    layers = attention_layers(model)
    if heads is None:
        heads = {(layer.index, head) for layer in layers for head in range(layer.num_heads)}
    check_heads(heads, layers)
    ids = None if input_ids.is_floating_point() else input_ids[0]
    watches = []
    with ExitStack() as stack:
        stack.enter_context(_attending_by_polyhead(model))
        for layer in layers:
            chosen = sorted(head for index, head in heads if index == layer.index)
            if chosen:
                watch = _Watch(layer, chosen, ids, weights, bins, n_keys)
                stack.enter_context(watch.watching())
                watches.append(watch)
        model(input_ids, **(unneeded(model) | inputs))
    reports = tuple(watch.report() for watch in watches if watch.calls)
    if not reports:
        names = ", ".join(watch.layer.name or "itself" for watch in watches[:3])
        raise ArgumentError(
            "model",
            "must attend by polyhead to be looked at",
            f"{type(model).__name__}, whose layers ({names}, ...) called no polyhead.attention",
            "some families of transformers keep their own attention; convert the model, or choose "
            "another",
        )
    return HeadReport(
        type(model).__name__, tuple(tokens), None if ids is None else ids.cpu(), reports
    )


@dataclass(eq=False)
class _Watch:
    """One layer, from when it is entered until it returns."""

    layer: AttentionLayer
    heads: list[int]
    ids: Tensor | None
    weights: bool
    bins: int
    n_keys: int
    calls: list[dict[str, Tensor]] = field(default_factory=list)
    contribution: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        seen = ExitStack()

        def enter(*_: Any) -> None:
            seen.enter_context(observe(self._see))

        def leave(*_: Any) -> None:
            seen.close()

        module = self.layer.module
        handles = [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]
        if self.layer.shows_heads:
            handles.append(self.layer.on_heads(self._see_merged))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, call: AttentionCall) -> None:
        of_keys = self.ids if self.ids is not None and len(self.ids) == call.S else None
        found = stats_of(call, of_keys if call.T == call.S else None).per_head()
        found = {f"stats.{name}": values for name, values in found.items()}
        top = top_keys_of(call, self.n_keys)
        found |= {"map": map_of(call, self.bins)[0]}
        found |= {"keys": top.keys[0].int(), "key_weights": top.weights[0]}
        if self.weights:
            found["weights"] = _weights_of(call)[0]
        # Stacked heads call once each.
        first = sum(len(earlier["map"]) for earlier in self.calls)
        if first >= self.layer.num_heads:
            raise ArgumentError(
                "model", "must call each attention layer once", self.layer.name, "look at one pass"
            )
        self.calls.append({name: values.cpu() for name, values in found.items()})

    def _see_merged(self, merged: Tensor) -> None:
        self.contribution = _norms(self.layer, merged)

    def report(self) -> LayerReport:
        found = {
            name: torch.cat([call[name] for call in self.calls])[self.heads]
            for name in self.calls[0]
        }
        stats = {
            name.removeprefix("stats."): found.pop(name)
            for name in list(found)
            if name.startswith("stats.")
        }
        if self.contribution is not None:
            stats["contribution"] = self.contribution[self.heads].cpu()
        return LayerReport(self.layer.index, self.layer.name, tuple(self.heads), stats, **found)


def _norms(layer: AttentionLayer, merged: Tensor) -> Tensor | None:
    """The mean norm of what each head adds to the layer's output, (H,)."""
    by_head = merged.detach().flatten(0, -2).unflatten(-1, (layer.num_heads, -1))
    projection = layer.projection
    if projection is None:
        norms: Tensor = by_head.float().norm(dim=-1)
        return norms.mean(dim=0)
    if (weight := _weight_of(projection)) is None:
        return None
    weight_ohe: Tensor = weight.unflatten(1, (layer.num_heads, -1))
    total = torch.zeros(layer.num_heads, device=merged.device)
    rows = max(1, _CELLS // (layer.num_heads * weight.shape[0]))
    for chunk in by_head.split(rows):
        added = torch.einsum("nhe,ohe->nho", chunk, weight_ohe)
        total += added.float().norm(dim=-1).sum(dim=0)
    return total / max(1, len(by_head))


def _weight_of(projection: nn.Module) -> Tensor | None:
    """(features out, features in), of a plain linear layer: adapters and integers hold more."""
    transposed = type(projection).__name__ == "Conv1D"  # GPT-2's linear layer
    if not (transposed or isinstance(projection, nn.Linear)):
        return None
    weight: Any = projection.weight
    if not weight.is_floating_point():
        return None
    by_output: Tensor = weight.mT if transposed else weight
    return by_output


def _weights_of(call: AttentionCall) -> Tensor:
    parts = [
        F.pad(weights_bhts, (0, call.S - weights_bhts.shape[-1]))
        for _, _, weights_bhts in weights_by_chunk(call)
    ]
    return torch.cat(parts, dim=2)


@contextmanager
def _attending_by_polyhead(model: nn.Module) -> Iterator[None]:
    """The models of transformers in here with our attention, for a while."""
    theirs: list[Any] = [m for m in model.modules() if hasattr(m, "set_attn_implementation")]
    if theirs:
        from transformers import AttentionInterface

        if "polyhead" not in AttentionInterface():  # type: ignore[no-untyped-call]
            raise ArgumentError(
                "model",
                'must know attn_implementation="polyhead"',
                f"{type(model).__name__} before it was registered",
                "call polyhead.integrations.transformers.register() once",
            )
    before = [(module, module.config._attn_implementation) for module in theirs]
    try:
        for module in theirs:
            module.set_attn_implementation("polyhead")
        yield
    finally:
        # Outermost first: each sets those within it, which then get their own back.
        for module, name in before:
            module.set_attn_implementation(name)
