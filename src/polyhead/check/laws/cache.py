"""Laws of the KV cache: decoding in pieces gives the output of one full pass."""

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
    """Decoding token by token with a KV cache gives the output of one full forward pass.

    Why: training runs whole sequences, generation runs one token at a time.

    Would have caught: rotary positions that restart at 0 with every token, caches that drop or
    repeat a token.
    """
    return _in_pieces(subject, [1] * subject.T)


@law
def cache_in_chunks_agrees(subject: Subject) -> Verdict:
    """Decoding in chunks with a KV cache gives the output of one full forward pass.

    Why: long prompts are prefilled in chunks, and speculative decoding verifies several tokens per
    step.

    Would have caught: `is_causal=True` with fewer queries than keys. torch aligns that mask at the
    upper left, so the chunk attends to the start of the sequence and not to itself.
    """
    first = subject.T // 2
    return _in_pieces(subject, [first, 2, subject.T - first - 2])


def _in_pieces(subject: Subject, pieces: Sequence[int]) -> Verdict:
    if subject.calling.cache is None:
        why = subject.claims.how.get("cache", "no known cache argument")
        raise NotApplicable(why)
    if not subject.claims.causal:
        raise NotApplicable("it is not causal: earlier tokens would attend to later ones")
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
                    f"with a cache, {where} gave a different output than in the full pass, by "
                    f"{by(apart)}",
                    first_wrong=start,
                    sees_ahead=ahead,
                    upper_left=left,
                )
            start = stop
    return holds()


def _chunk(subject: Subject, pieces: Sequence[int], start: int, stop: int) -> tuple[bool, bool]:
    """Two facts about the first token of a chunk after a cache: it attends to the last token of the
    chunk; it attends to token 0 of the sequence and not to itself.
    """
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
    # A layer outside its model keeps its layer_idx, but the cache has no entries for earlier
    # layers.
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
    """forward(x, cache=...) returns the output and the new cache, or updates it in place."""
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
    """(1, 1, n, first + n) mask of n tokens after `first` cached ones; True = may attend."""
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
