"""Laws of heads: none dead, none identical, independent, and KV heads shared in order."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law
from polyhead.check.probe.heads import contexts_of, need_heads, out_projection
from polyhead.check.subject import Subject, difference

__all__ = ["LAWS"]


@law
def no_head_is_dead(subject: Subject) -> Verdict:
    """Every head has a nonzero context, and the output changes without it.

    Why: a dead head costs time and contributes nothing. A loss curve does not show it.

    Would have caught: loops over one head too few, an output projection that reads a slice.
    """
    H = need_heads(subject)
    x = subject.input(2)
    with torch.no_grad():
        contexts = contexts_of(subject, subject.exact, x)
    if dead := [h for h in range(H) if contexts[:, :, h].abs().max() == 0]:
        return broken(f"the context of head {dead[0]} of {H} is zero")
    name = out_projection(subject)
    if name is None:
        return holds()
    before, layer = subject.run(x), subject.exact.get_submodule(name)
    for h in range(H):

        def silence(_: torch.nn.Module, inputs: tuple[Tensor, ...], h: int = h) -> Tensor:
            merged = inputs[0].clone()
            if subject.notes["features first"]:
                merged[..., h::H] = 0
            else:
                merged.unflatten(-1, (H, -1))[..., h, :] = 0
            return merged

        hook = layer.register_forward_pre_hook(silence)
        try:
            after = subject.run(x)
        finally:
            hook.remove()
        if difference(before, after).max() <= subject.allowed(x):
            return broken(f"the output is the same without head {h} of {H}")
    return holds()


@law
def no_two_heads_are_identical(subject: Subject) -> Verdict:
    """No two heads have the same contexts.

    Why: identical heads get identical gradients and stay identical. H heads then cost H times as
    much as one, and compute the same.

    Would have caught: `[head] * n` in place of `[Head() for _ in range(n)]`, and weights that are
    initialized once and copied.
    """
    H = need_heads(subject)
    x = subject.input(2)
    with torch.no_grad():
        contexts = contexts_of(subject, subject.exact, x)
    for h in range(H):
        for other in range(h):
            apart = difference(contexts[:, :, h], contexts[:, :, other]).max()
            if apart <= subject.allowed(x):
                return broken(f"heads {other} and {h} have the same contexts")
    return holds()


@law
def heads_are_independent(subject: Subject) -> Verdict:
    """Every head has weights that do not affect the contexts of all heads.

    Why: heads are independent; only the output projection mixes them.

    Would have caught: heads merged by a view without transposing back. It spreads the features of
    one head over all tokens and heads, and still trains.
    """
    H = need_heads(subject)
    units = [heads for heads_by_unit in _touched(subject) for heads in heads_by_unit]
    apart = {h for heads in units if 0 < len(heads) < H for h in heads}
    if not apart and not _is_as_wide_as_its_heads(subject):
        raise NotApplicable("its heads share one projection")
    if missing := sorted(set(range(H)) - apart):
        return broken(
            f"head {missing[0]} of {H} has no weights of its own: heads are mixed before the "
            "output projection",
            mixed=len(missing),
        )
    return holds()


@law
def kv_heads_are_shared_in_order(subject: Subject) -> Verdict:
    """With H query heads and G KV heads, query head h uses KV head h // (H / G).

    Why: torch, transformers and flash-attention use this order. A checkpoint loaded in another
    order generates nonsense.

    Would have caught: `repeat(1, n, 1, 1)` in place of `repeat_interleave(n, dim=1)`; the order of
    x-transformers.
    """
    H = need_heads(subject)
    shared = [
        sorted(heads)
        for heads_by_unit in _touched(subject)
        for heads in heads_by_unit
        if 1 < len(heads) < H
    ]
    if not shared:
        raise NotApplicable("no weight is shared by some heads only")
    for heads in shared:
        first, count = heads[0], len(heads)
        if first % count or heads != list(range(first, first + count)):
            return broken(
                f"one KV head is used by query heads {heads}; in the common order they are adjacent"
            )
    return holds()


def _is_as_wide_as_its_heads(subject: Subject) -> bool:
    """True if some weight before the output projection has one row per feature of every head."""
    contexts = contexts_of(subject, subject.exact, subject.input(1, 2))
    features = contexts.shape[-2] * contexts.shape[-1]
    return any(max(weight.shape) >= features for weight in _weights(subject))


def _weights(subject: Subject) -> list[Tensor]:
    """Parameters of two or more dimensions, except those of the output projection."""
    out = out_projection(subject)
    return [
        parameter
        for name, parameter in subject.exact.named_parameters()
        if parameter.ndim > 1 and (out is None or not name.startswith(f"{out}."))
    ]


def _touched(subject: Subject) -> list[list[set[int]]]:
    """Per weight and per dimension of it: the heads whose contexts depend on each slice."""
    H = subject.claims.num_heads or 1
    module, weights = subject.exact, [w for w in _weights(subject) if w.requires_grad]
    if not weights:
        raise NotApplicable("it has no weights that require grad")
    with torch.enable_grad():
        contexts = contexts_of(subject, module, subject.input(2))
        direction = subject.input(2, salt=3)[..., :1, None].expand_as(contexts)
        gradients = [
            torch.autograd.grad(
                (contexts[:, :, h] * direction[:, :, h]).sum(),
                weights,
                retain_graph=True,
                allow_unused=True,
            )
            for h in range(H)
        ]
    found = []
    for i, weight in enumerate(weights):
        by_head = [g[i] if g[i] is not None else torch.zeros_like(weight) for g in gradients]
        sizes = torch.stack([g.abs() for g in by_head])
        for dim in range(weight.ndim):
            others = tuple(d + 1 for d in range(weight.ndim) if d != dim)
            slices = sizes.amax(dim=others)
            touched = slices > 1e-12 * slices.max()
            found.append([set(unit.nonzero().flatten().tolist()) for unit in touched.T])
    return found


LAWS = (
    no_head_is_dead,
    no_two_heads_are_identical,
    heads_are_independent,
    kv_heads_are_shared_in_order,
)
