"""Token provenance: the tokens to which the queries and keys of each layer belong.

Equal lengths establish nothing: decoder and encoder inputs may have equal lengths, latents may have
the length of the text, and image features may replace tokens. So the model runs without mixing
between tokens, once unchanged and once with some tokens changed. Queries that change at exactly
these positions belong to these tokens, one for one.

Without mixing, heads add nothing; in layers of ours, which may lack a residual stream, each token
attends to itself only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.call import AttentionCall
from polyhead.functional import observe
from polyhead.look.layers import AttentionLayer, bound_arguments, input_embeddings, is_ours

__all__ = ["Sources", "find_sources", "is_probing"]

_probing = ContextVar("_probing", default=False)

_FEATURES = 8  # of the random projection by which queries and keys are compared
_MOST_TEXTS = 6
_NO_TEXTS = ("mask", "position", "type", "label")
Marks = dict[int, list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True, eq=False)
class Sources:
    """Established provenance of a layer's queries and keys.

    Attributes:
        is_self: True if queries and keys are of the same tokens: the last T keys are of the T
            queries, in order.
        query_ids: (T,) token of each query; None: not established, or none.
        key_ids: (S,) token of each key; None: not established, or none.
        is_input: True if query t and key t are of token t of the model's first input.
    """

    is_self: bool
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    is_input: bool = False


def find_sources(
    model: nn.Module,
    layers: Sequence[AttentionLayer],
    first: Tensor,
    inputs: Mapping[str, Any],
    run: Callable[[Tensor], Any],
) -> dict[int, Sources]:
    """Return the sources of each layer that calls `polyhead.attention`, by its index.

    Args:
        model: the model that `run` calls.
        layers: its attention layers.
        first: the first input, (1, T) token ids or (1, T, features) or another.
        inputs: the other inputs, by name.
        run: a forward of the model on a first input.
    """
    probe = _Probe(model, layers, first, inputs, run)
    base = probe.run()
    local = probe.run(local=True)
    texts = probe.texts()
    moved: list[tuple[Tensor | None, Marks]] = [(i, probe.run(event=n)) for n, i in texts]
    is_features = first.is_floating_point() and first.ndim == 3
    if is_features or (not texts and _can_change(first)):
        moved.append((None if is_features else first[0], probe.run(first=_changed(first))))
    found = {}
    for layer in layers:
        if calls := base.get(layer.index):
            own = _aligned(calls, local.get(layer.index))
            is_self = probe.takes_no_memory.get(layer.index, own[0] and own[1])
            about = [(ids, _aligned(calls, marks.get(layer.index))) for ids, marks in moved]
            T, S = len(calls[0][0]), len(calls[0][1])
            found[layer.index] = _judge(is_self, about, first, T, S)
    return found


def is_probing() -> bool:
    """True during a forward of `find_sources`, as opposed to the captured one."""
    return _probing.get()


def _judge(
    is_self: bool,
    texts: Sequence[tuple[Tensor | None, tuple[bool, bool, bool]]],
    first: Tensor,
    T: int,
    S: int,
) -> Sources:
    queries = [ids for ids, on in texts if on[0] and (ids is None or len(ids) == T)]
    keys = [ids for ids, on in texts if on[2] and (ids is None or len(ids) == S)]
    query_ids, key_ids = _same(queries), _same(keys)
    both = [ids for ids, on in texts if on[0] and on[2]]
    if not first.is_floating_point():
        is_input = query_ids is not None and torch.equal(query_ids, first[0]) and bool(both)
    elif first.ndim == 3:
        is_input = any(ids is None for ids in both)
    else:
        is_input = query_ids is None
    return Sources(is_self, query_ids, key_ids, is_self and is_input)


def _same(found: Sequence[Tensor | None]) -> Tensor | None:
    """The ids common to all entries that have any; None if they differ."""
    known = [ids for ids in found if ids is not None]
    return known[0] if known and all(torch.equal(ids, known[0]) for ids in known) else None


def _aligned(
    base: Sequence[tuple[Tensor, Tensor]], moved: Sequence[tuple[Tensor, Tensor]] | None
) -> tuple[bool, bool, bool]:
    """True for queries, last keys and all keys that changed at exactly the changed tokens."""
    if moved is None or len(moved) != len(base):
        return False, False, False
    found = []
    for (query, key), (query_now, key_now) in zip(base, moved, strict=True):
        if query.shape != query_now.shape or key.shape != key_now.shape:
            return False, False, False
        T, S = len(query), len(key)
        queries, keys = _moves(query, query_now), _moves(key, key_now)
        last = S >= T and torch.equal(keys[S - T :], _places(T)) and not keys[: S - T].any()
        found.append((torch.equal(queries, _places(T)), last, torch.equal(keys, _places(S))))
    return tuple(map(all, zip(*found, strict=True)))  # type: ignore[return-value]


def _moves(before: Tensor, after: Tensor) -> Tensor:
    """True for rows that changed by more than rounding, (T,)."""
    wide, wide_after = before.float(), after.float()
    apart = (wide_after - wide).norm(dim=-1)
    total = wide.norm(dim=-1) + wide_after.norm(dim=-1)
    moved: Tensor = apart > max(1e-3, 8 * torch.finfo(before.dtype).eps) * total
    return moved


def _places(tokens: int) -> Tensor:
    """Mask of tokens to change: a random half, including the first token but not the last."""
    on = torch.rand(tokens, generator=torch.Generator().manual_seed(5)) < 0.5
    on[:1] = True
    if tokens > 1:
        on[-1] = False
    return on


def _changed(x: Tensor) -> Tensor:
    """Replace the values of the tokens at `_places`: (..., T, features), or (..., T) ids."""
    if not x.is_floating_point():
        on = _places(x.shape[-1]).to(x.device)
        return torch.where(on, torch.where(x == x.max(), x.min(), x.max()), x)
    generator = torch.Generator().manual_seed(6)
    signs = torch.randn(x.shape[-1], generator=generator).sign().to(x)
    size = x.abs().mean()
    other = torch.where(size > 0, size, torch.ones_like(size)) * signs - x
    return torch.where(_places(x.shape[-2]).to(x.device)[:, None], other, x)


def _can_change(first: Tensor) -> bool:
    return not first.is_floating_point() and first.ndim == 2 and bool((first != first[0, 0]).any())


class _Probe:
    """Forwards of a model without mixing between tokens, recording marks of queries and keys."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[AttentionLayer],
        first: Tensor,
        inputs: Mapping[str, Any],
        run: Callable[[Tensor], Any],
    ) -> None:
        self.model, self.layers, self.first, self.call = model, layers, first, run
        named = {n: x for n, x in inputs.items() if not any(word in n for word in _NO_TEXTS)}
        self.given = [first, *(x for x in named.values() if isinstance(x, Tensor))]
        self.events: list[tuple[nn.Module, Tensor]] = []
        self.takes_no_memory: dict[int, bool] = {}  # of layers of ours

    def run(
        self, *, local: bool = False, event: int | None = None, first: Tensor | None = None
    ) -> Marks:
        """Run the model with one input changed and return the marks of its calls by layer.

        Args:
            local: True to change the input of each layer, invisibly to the other layers.
            event: index of the embedding call whose output is changed.
            first: a changed first input of the model.
        """
        marks: Marks = defaultdict(list)
        self.events = []
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(self._watching(layer, marks[layer.index], local))
            for hook, module, without in self._hooks(event):
                stack.callback(module.register_forward_hook(hook, with_kwargs=without).remove)
            devices = [x.device for x in self.model.parameters() if x.device.type == "cuda"]
            stack.enter_context(torch.random.fork_rng(list(set(devices))))
            torch.manual_seed(0)  # dropout, in training, is the same each time
            token = _probing.set(True)
            stack.callback(_probing.reset, token)
            self.call(self.first if first is None else first)
        return marks

    def texts(self) -> list[tuple[int, Tensor]]:
        """Token embedding calls, by index, with their ids; not those of positions or types."""
        own = {
            id(embedding)
            for module in self.model.modules()
            if isinstance(embedding := input_embeddings(module), nn.Module)
        }
        numbered = list(enumerate(self.events))
        found = [(n, ids) for n, (module, ids) in numbered if id(module) in own]
        if not found:
            found = [
                (n, ids)
                for n, (_, ids) in numbered
                if any(
                    x.numel() == ids.numel() and torch.equal(x.flatten(), ids) for x in self.given
                )
            ]
        return found if len(found) <= _MOST_TEXTS else []

    @contextmanager
    def _watching(
        self, layer: AttentionLayer, marks: list[tuple[Tensor, Tensor]], local: bool
    ) -> Iterator[None]:
        seen = ExitStack()
        values: list[Tensor] = []

        def see(call: AttentionCall) -> None:
            call = call.materialized()
            values.append(call.value.repeat_interleave(call.group, dim=1))
            marks.append((_mark(call.query), _mark(call.key)))

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            seen.enter_context(observe(see))
            arguments = bound_arguments(module, args, kwargs) if is_ours(module) else {}
            if arguments and arguments.get("cache") is None:
                self.takes_no_memory[layer.index] = arguments.get("memory") is None
            return _with_first_changed(args, kwargs) if local else None

        def leave(*_: Any) -> None:
            seen.close()

        def own_values(merged: Tensor) -> Tensor:
            if self.takes_no_memory.get(layer.index):
                own = torch.cat(values, dim=1).transpose(1, 2).flatten(2)
                if own.shape == merged.shape:
                    return own
            return torch.zeros_like(merged)

        def silence(module: nn.Module, args: Any, output: Any) -> Any:
            head, *rest = output if isinstance(output, tuple) else (output,)
            return (torch.zeros_like(head), *rest) if isinstance(output, tuple) else head * 0

        module = layer.module
        handles = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]
        if layer.shows_heads:
            handles.append(layer.on_heads(own_values))
        else:
            handles.append(module.register_forward_hook(silence))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, event: int | None) -> Iterator[tuple[Callable[..., Any], nn.Module, bool]]:
        def embedded(module: nn.Module, args: Any, output: Any) -> Any:
            ids = args[0] if args else None
            if not isinstance(ids, Tensor) or not isinstance(output, Tensor) or ids.ndim < 1:
                return None
            self.events.append((module, ids.detach().flatten()))
            return _changed(output) if len(self.events) - 1 == event else None

        def passed(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            given = args[0] if args else kwargs.get("hidden_states")
            head, *rest = output if isinstance(output, tuple) else (output,)
            if not isinstance(given, Tensor) or given.shape != getattr(head, "shape", None):
                return None
            return (given, *rest) if isinstance(output, tuple) else given

        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                yield embedded, module, False
        for block in self._blocks_of_another_kind():
            yield passed, block, True

    def _blocks_of_another_kind(self) -> Iterator[nn.Module]:
        """Yield blocks that mix tokens without attention, next to blocks with it: skipped."""
        attends = {id(layer.module) for layer in self.layers}
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList):
                has = [any(id(part) in attends for part in block.modules()) for block in module]
                if any(has):
                    yield from (b for b, on in zip(module, has, strict=True) if not on)


def _mark(heads_bhtd: Tensor) -> Tensor:
    """Random projection of each token's heads, to compare runs: (T, features), on the CPU."""
    rows = heads_bhtd[0].transpose(0, 1).flatten(1)
    generator = torch.Generator().manual_seed(7)
    project = torch.randn(rows.shape[1], _FEATURES, generator=generator) / rows.shape[1] ** 0.5
    mark: Tensor = (rows.float() @ project.to(rows.device)).to(rows.dtype)
    return mark.cpu()


def _with_first_changed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a layer's arguments with the first token features among them changed."""

    def fits(x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3

    for place, x in enumerate(args):
        if fits(x):
            return (*args[:place], _changed(x), *args[place + 1 :]), kwargs
    for name in sorted(kwargs, key=lambda name: name != "hidden_states"):
        if fits(kwargs[name]):
            return args, kwargs | {name: _changed(kwargs[name])}
    return args, kwargs
