"""Laws of the cache: a text read in pieces gives what the whole text gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law
from polyhead.check.probe.caches import placed, start_of
from polyhead.check.probe.claims import band
from polyhead.check.subject import Subject, by, difference

__all__ = ["LAWS"]

Step = Callable[[Tensor], Tensor]


@law
def cache_token_by_token_agrees(subject: Subject) -> Verdict:
    """Read token by token with a cache, a text gives what it gives at once.

    Why: training reads texts at once, and generating token by token.

    Would have caught: rotary positions that start at 0 again with every token, caches that forget
    or repeat a token.
    """
    return _in_pieces(subject, [1] * subject.T)


@law
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
        why = subject.claims.how.get("cache", "it takes no cache that is known")
        raise NotApplicable(why)
    if not subject.claims.causal:
        raise NotApplicable("it is not causal: what came first would see what comes later")
    x = subject.input(2)
    module = subject.copy()
    whole = subject.run(x)
    step = _PROTOCOLS.get(subject.calling.cache, _passed)(subject, module)
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
        step = _PROTOCOLS.get(str(subject.calling.cache), _passed)(subject, subject.copy())
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
    cache = start_of(subject)
    # A layer taken out of its model keeps its index: the cache then lacks the layers before it.
    module.layer_idx = 0  # type: ignore[assignment]
    name = subject.calling.cache_name
    calling = replace(subject.calling, supplies=None)
    done = [0]

    def step(x: Tensor) -> Tensor:
        n, first = x.shape[1], done[0]
        done[0] += n
        more: dict[str, Any] = {name: cache, "_first": first}
        allowed = None if calling.mask is None else _rows(subject, first, n)
        return calling(module, x.contiguous(), allowed=allowed, **more).output

    return step


def _passed(subject: Subject, module: nn.Module) -> Step:
    """forward(x, cache=...) returns the output and the new cache, or fills the one that it got."""
    name = subject.calling.cache_name
    calling = replace(subject.calling, supplies=None)
    state, done = [start_of(subject)], [0]

    def step(x: Tensor) -> Tensor:
        n, first = x.shape[1], done[0]
        done[0] += n
        more = {name: state[0], **calling.cache_options, **placed(calling, first, n)}
        if subject.calling.supplies is not None:
            more["allowed"] = _rows(subject, first, n)
        result = calling(module, x.contiguous(), **more)
        if state[0] is None or result.cache is not None:
            if result.cache is None:
                raise NotApplicable(f"it returned no cache for {name}=None")
            state[0] = result.cache
        return result.output

    return step


def _rows(subject: Subject, first: int, n: int) -> Tensor:
    """(1, 1, n, first + n) whom n tokens behind `first` others may see."""
    seen = band(first + n, subject.claims.causal, subject.claims.window)
    return seen[None, None, first:].to(subject.device)


def _stateful(subject: Subject, module: nn.Module) -> Step:
    """forward(x, use_cache=True) keeps the cache in the module; reset_cache() empties it."""
    if hasattr(module, "reset_cache"):
        module.reset_cache()  # type: ignore[operator]
    flag = {subject.calling.cache_name: True}
    return lambda x: subject.call(module, x, **flag).output


_PROTOCOLS: dict[str, Callable[[Subject, nn.Module], Step]] = {
    "polyhead": _of_polyhead,
    "transformers": _of_transformers,
    "stateful": _stateful,
}


LAWS = (
    cache_token_by_token_agrees,
    cache_in_chunks_agrees,
)
