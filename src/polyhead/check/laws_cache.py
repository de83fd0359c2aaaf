"""Laws of the cache: a text read in pieces gives what the whole text gives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.check.law import NotApplicable, Verdict, broken, holds, module_law
from polyhead.check.subject import Subject, by, difference

__all__: list[str] = []

Step = Callable[[Tensor], Tensor]


@module_law
def cache_token_by_token_agrees(subject: Subject) -> Verdict:
    """Read token by token with a cache, a text gives what it gives at once.

    Why: training reads texts at once, and generating token by token.

    Would have caught: rotary positions that start at 0 again with every token, caches that forget
    or repeat a token.
    """
    return _in_pieces(subject, [1] * subject.T)


@module_law
def cache_in_chunks_agrees(subject: Subject) -> Verdict:
    """Read in chunks with a cache, a text gives what it gives at once.

    Why: prompts are read in chunks, and drafts of several tokens are checked at once.

    Would have caught: `is_causal=True` with fewer queries than keys, which torch aligns at the
    upper left: the chunk then sees the start of the text and not itself.
    """
    first = subject.T // 2
    return _in_pieces(subject, [first, 2, subject.T - first - 2])


def _in_pieces(subject: Subject, pieces: Sequence[int]) -> Verdict:
    if subject.calling.cache is None:
        raise NotApplicable("it takes no cache that is known")
    if not subject.claims.causal:
        raise NotApplicable("it is not causal: what came first would see what comes later")
    x = subject.input(2)
    module = subject.copy()
    whole = subject.run(x)
    step = _PROTOCOLS[subject.calling.cache](subject, module)
    start = 0
    with torch.no_grad():
        for n in (n for n in pieces if n > 0):
            stop = start + n
            apart = difference(step(x[:, start:stop]), whole[:, start:stop])
            if apart.max() > 4 * subject.allowed(x):
                ahead, left = (False, False) if n == 1 else _chunk(subject, pieces, start, stop)
                where = f"token {start}" if n == 1 else f"tokens {start} to {stop - 1}"
                return broken(
                    f"with a cache, {where} gave another output than in the whole text, by "
                    f"{by(apart)}",
                    first_wrong=start,
                    sees_ahead=ahead,
                    upper_left=left,
                )
            start = stop
    return holds()


def _chunk(subject: Subject, pieces: Sequence[int], start: int, stop: int) -> tuple[bool, bool]:
    """Whether the first token of a chunk behind a cache sees the last of the chunk; and whether it
    sees the first token of the text, and not itself."""
    x, other = subject.input(2), subject.input(2, salt=1)

    def first(changed: int | None) -> Tensor:
        tokens = x.clone()
        if changed is not None:
            tokens[:, changed] = other[:, changed]
        step = _PROTOCOLS[str(subject.calling.cache)](subject, subject.copy())
        begun = 0
        with torch.no_grad():
            for n in pieces:
                if begun == start:
                    break
                step(tokens[:, begun : begun + n])
                begun += n
            return step(tokens[:, start:stop])[:, 0]

    before, allowed = first(None), 4 * subject.allowed(x)
    sees = [bool(difference(first(s), before).max() > allowed) for s in (0, start - 1, stop - 1)]
    return sees[2], start > 1 and sees[0] and not sees[1]


def _of_polyhead(subject: Subject, module: nn.Module) -> Step:
    cache = module.make_cache(2)  # type: ignore[operator]
    return lambda x: subject.call(module, x, cache=cache).output


def _of_transformers(subject: Subject, module: nn.Module) -> Step:
    # The layer's own package is imported already.
    cache = sys.modules["transformers"].DynamicCache()
    # A layer taken out of its model keeps its index: the cache then lacks the layers before it.
    module.layer_idx = 0  # type: ignore[assignment]
    name = subject.calling.cache_name
    calling = replace(subject.calling, supplies=None)
    done = [0]

    def step(x: Tensor) -> Tensor:
        n, first = x.shape[1], done[0]
        done[0] += n
        more: dict[str, Any] = {name: cache, "_first": first}
        keys = torch.arange(first + n, device=x.device)
        distance = torch.arange(first, first + n, device=x.device)[:, None] - keys
        allowed = distance >= 0
        if subject.claims.window is not None:
            allowed &= distance < subject.claims.window
        filled = torch.zeros(x.shape[0], 1, n, first + n, dtype=x.dtype, device=x.device)
        more["attention_mask"] = filled.masked_fill(~allowed, float("-inf"))
        return calling(module, x.contiguous(), **more).output

    return step


def _functional(subject: Subject, module: nn.Module) -> Step:
    """forward(x, cache=None) returns the output and the new cache."""
    name = subject.calling.cache_name
    state: list[Any] = [None]

    def step(x: Tensor) -> Tensor:
        more = {name: state[0]}
        result = subject.call(module, x, **more, **subject.calling.cache_options)
        if result.cache is None:
            raise NotApplicable(f"it returned no cache for {name}=None")
        state[0] = result.cache
        return result.output

    return step


def _stateful(subject: Subject, module: nn.Module) -> Step:
    """forward(x, use_cache=True) keeps the cache in the module; reset_cache() empties it."""
    module.reset_cache()  # type: ignore[operator]
    return lambda x: subject.call(module, x, use_cache=True).output


_PROTOCOLS: dict[str, Callable[[Subject, nn.Module], Step]] = {
    "polyhead": _of_polyhead,
    "transformers": _of_transformers,
    "functional": _functional,
    "stateful": _stateful,
}
