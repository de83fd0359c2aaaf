"""Capture of per-head statistics and attention maps during one forward pass of a model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.cache import Cache
from polyhead.call import AttentionCall
from polyhead.errors import ArgumentError, ShapeError
from polyhead.functional import observe
from polyhead.look.layers import (
    AttentionLayer,
    Head,
    attention_layers,
    check_heads,
    check_not_compiled,
    inference_kwargs,
)
from polyhead.look.maps import map_of
from polyhead.look.report import HeadReport, LayerReport
from polyhead.look.sources import Sources, find_sources
from polyhead.look.stats import BY_POSITION, stats_of
from polyhead.look.streaming import weights_by_chunk
from polyhead.look.top_keys import most_attended, top_keys_of
from polyhead.modules.weights import read_parameter, why_not_linear

__all__ = ["capture"]

_CELLS = 2**22
_SINK_KEYS = 8  # keys of each query among which sinks are counted, whatever `n_keys` is


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
    """Run one forward and report statistics, map, top keys and contribution per head.

    Layers are analyzed one by one as they run, so at most one layer's queries and keys are in
    memory. Before that, three or four forwards establish which tokens each layer reads: with its
    heads off, and some tokens changed. Other hooks on the model run in these forwards too.

    Args:
        model: built of polyhead's modules, or of transformers: then
            `polyhead.integrations.transformers.register()` must have been called once, and the
            model attends by polyhead for this forward.
        input_ids: (T,) or (1, T) token ids, or another first input of the model's forward, with
            one batch row.
        heads: (layer, head) pairs to report; None: all. Layers count from 0.
        weights: True to keep the weights too, T x S per head. For short texts.
        bins: rows and columns of each map.
        n_keys: the number of most attended keys to keep per query.
        tokens: the text of each token, for display.
        inputs: further inputs of the model's forward, such as attention_mask=.

    Returns:
        `HeadReport`, on the CPU.

    Raises:
        ArgumentError, ShapeError: the model has no such heads, or none that attends by polyhead;
            or the input has more than one batch row.

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
    options = inference_kwargs(model) | inputs
    watches = []
    with ExitStack() as stack:
        stack.enter_context(_attending_by_polyhead(model))
        sources = find_sources(
            model, layers, input_ids, inputs, lambda first: model(first, **_copied(options))
        )
        for layer in layers:
            chosen = sorted(head for index, head in heads if index == layer.index)
            if chosen:
                source = sources.get(layer.index, Sources(is_self=False))
                watch = _LayerRecorder(layer, chosen, source, weights, bins, n_keys)
                stack.enter_context(watch.watching())
                watches.append(watch)
        model(input_ids, **options)
    reports = tuple(watch.report() for watch in watches if watch.calls)
    if not reports:
        names = ", ".join(watch.layer.name or "itself" for watch in watches[:3])
        raise ArgumentError(
            "model",
            "must attend by polyhead to be captured",
            f"{type(model).__name__}, whose layers ({names}, ...) called no polyhead.attention",
            "some transformers models have their own attention; convert the model, or choose "
            "another",
        )
    return HeadReport(type(model).__name__, tuple(tokens), _on_cpu(ids), reports)


@dataclass(eq=False)
class _LayerRecorder:
    """Recorder of one layer's attention calls, from its entry to its return."""

    layer: AttentionLayer
    heads: list[int]
    source: Sources
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
        ids = self.source.query_ids if self.source.is_self and call.T == call.S else None
        found = stats_of(call, ids).per_head()
        if not self.source.is_self:
            found = {name: values for name, values in found.items() if name not in BY_POSITION}
        found = {f"stats.{name}": values for name, values in found.items()}
        top = top_keys_of(call, self.n_keys)
        wide = top if self.n_keys >= _SINK_KEYS else top_keys_of(call, _SINK_KEYS)
        few = most_attended(wide.keys[0, ..., :_SINK_KEYS], wide.weights[0, ..., :_SINK_KEYS])
        found |= {"stats.mass_sinks": few.weights.sum(dim=-1).float()}
        found |= {"map": map_of(call, self.bins)[0]}
        found |= {"keys": top.keys[0].int(), "key_weights": top.weights[0]}
        if self.weights:
            found["weights"] = _weights_of(call)[0]
        # Stacked heads call once each.
        first = sum(len(earlier["map"]) for earlier in self.calls)
        if first >= self.layer.num_heads:
            raise ArgumentError(
                "model", "must call each attention layer once", self.layer.name, "capture one pass"
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
        return LayerReport(
            self.layer.index,
            self.layer.name,
            tuple(self.heads),
            stats,
            **found,
            is_self=self.source.is_self,
            is_input=self.source.is_input,
            query_ids=_on_cpu(self.source.query_ids),
            key_ids=_on_cpu(self.source.key_ids),
        )


def _on_cpu(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.to("cpu", copy=True)


def _copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the caches among the inputs, so that a forward leaves the originals unchanged."""
    return {
        name: copy.deepcopy(x, dict(_clones(x, set())))
        if isinstance(x, Cache) or hasattr(x, "get_seq_length")
        else x
        for name, x in inputs.items()
    }


def _clones(x: Any, seen: set[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield a copy, by id, of each tensor in a cache; `deepcopy` rejects those with a gradient."""
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield id(x), x.detach().clone()
        return
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    for part in (*parts, *vars(x).values()) if hasattr(x, "__dict__") else parts:
        yield from _clones(part, seen)


def _norms(layer: AttentionLayer, merged: Tensor) -> Tensor | None:
    """Mean norm of each head's contribution to the layer's output, (H,)."""
    by_head = merged.detach().flatten(0, -2).unflatten(-1, (layer.num_heads, -1))
    projection = layer.projection
    if projection is None:
        norms: Tensor = by_head.float().norm(dim=-1)
        return norms.mean(dim=0)
    if (weight := _weight_of(projection, merged.device)) is None:
        return None
    weight_ohe: Tensor = weight.unflatten(1, (layer.num_heads, -1))
    total = torch.zeros(layer.num_heads, device=merged.device)
    rows = max(1, _CELLS // (layer.num_heads * weight.shape[0]))
    for chunk in by_head.split(rows):
        added = torch.einsum("nhe,ohe->nho", chunk, weight_ohe)
        total += added.float().norm(dim=-1).sum(dim=0)
    return total / max(1, len(by_head))


def _weight_of(projection: nn.Module, device: torch.device) -> Tensor | None:
    """Weight of a plain linear layer, (out, in); None for adapters and quantized layers."""
    if why_not_linear(projection) is not None:
        return None
    weight = read_parameter(projection, "weight")
    if weight is None:
        return None
    # GPT-2's linear layer is transposed.
    by_output: Tensor = weight.mT if type(projection).__name__ == "Conv1D" else weight
    return by_output.to(device)


def _weights_of(call: AttentionCall) -> Tensor:
    parts = [
        F.pad(weights_bhts, (0, call.S - weights_bhts.shape[-1]))
        for _, _, weights_bhts in weights_by_chunk(call)
    ]
    return torch.cat(parts, dim=2)


@contextmanager
def _attending_by_polyhead(model: nn.Module) -> Iterator[None]:
    """Set the attention of all transformers models within to polyhead, temporarily."""
    theirs: list[Any] = [m for m in model.modules() if hasattr(m, "set_attn_implementation")]
    if theirs:
        from transformers import AttentionInterface

        if "polyhead" not in AttentionInterface():  # type: ignore[no-untyped-call]
            raise ArgumentError(
                "model",
                'must support attn_implementation="polyhead"',
                f"{type(model).__name__} before it was registered",
                "call polyhead.integrations.transformers.register() once",
            )
    before = [(module, module.config._attn_implementation) for module in theirs]
    try:
        for module in theirs:
            module.set_attn_implementation("polyhead")
        yield
    finally:
        # Outermost first: setting one also sets those within it, which are restored after it.
        for module, name in before:
            module.set_attn_implementation(name)
