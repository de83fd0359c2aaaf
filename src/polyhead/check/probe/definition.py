"""Reference computation: of a whole module with a known layout, or of its core alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.call import AttentionCall, AuxRequest
from polyhead.check.diagnose.known_mistakes import explanation
from polyhead.check.law import NotApplicable, Verdict, broken, holds
from polyhead.check.probe.around import behind_the_attention, in_front_of_it
from polyhead.check.probe.core import Core, core_of
from polyhead.check.probe.heads import need_no_positions, need_plain
from polyhead.check.probe.layouts import Weights, role_of
from polyhead.check.probe.rows import Rows, learned_rows
from polyhead.check.subject import Subject, by, difference
from polyhead.check.tolerance import allowed_difference, response

__all__ = ["CoreJudged", "defined_output", "is_defined_as_seen", "judged_by_its_core"]

_NAMES = {"query": "queries", "key": "keys", "value": "values"}


@dataclass(frozen=True)
class CoreJudged:
    """Core of a module, next to the reference with the learned rows.

    Attributes:
        core, rows: as learned.
        x: (1, T, d_in) the input.
        projected: (T, R) outputs of its projections.
        contexts: (T, H * E) merged contexts, head by head.
        weights: selection of queries, keys and values among the R.
        allowed: tolerance between equal contexts.
        scale: scale of the reference.
    """

    core: Core
    rows: Rows
    x: Tensor
    projected: Tensor
    contexts: Tensor
    weights: Weights
    allowed: float
    scale: float

    @classmethod
    def of(cls, subject: Subject) -> CoreJudged:
        """Learn the rows of a module.

        Raises:
            NotApplicable: they cannot be learned, or it has operations that the reference lacks.
        """
        need_no_positions(subject)
        rows, core = learned_rows(subject), core_of(subject)
        if not rows.in_order:
            raise NotApplicable("its heads are merged, or share KV heads, in another order")
        x, order = subject.input(), rows.merged.flatten()
        with torch.no_grad():
            seen = core.seen(x)
            moved = response(lambda: core.seen(x).contexts, subject.seed, subject.dtype)
        scale = subject.claims.scale
        return cls(
            core,
            rows,
            x,
            seen.projected,
            seen.contexts[:, order],
            rows.weights(seen.projected.shape[1], seen.projected),
            4 * allowed_difference(moved, subject.precision),
            rows.query.shape[1] ** -0.5 if scale is None else scale,
        )

    def actual(self, projected: Tensor) -> Tensor:
        return self.core(projected)[:, self.rows.merged.flatten()]

    def defined(self, projected: Tensor, shown: Tensor | None = None) -> Tensor:
        if shown is None:
            shown = self.core.subject.claims.shown(len(projected))
        return defined_output(projected[None], self.weights, shown, self.scale)[0]

    @property
    def apart(self) -> float:
        return float(difference(self.contexts, self.defined(self.projected)).max())


def judged_by_its_core(subject: Subject) -> Verdict:
    """Compare the heads' contexts with the reference, computed from the outputs of the projections;
    report the order of their rows and the operations around the core.

    Raises:
        NotApplicable: its core, or the order of its rows, cannot be learned.
    """
    judged = CoreJudged.of(subject)
    if wrong := _wrong_roles(judged):
        return broken(f"{wrong}", cause=wrong)
    if judged.apart <= judged.allowed:
        return holds("; ".join(_facts(judged)))
    off = f"the heads' contexts differ from the reference by {by(torch.tensor(judged.apart))}"
    claims = subject.claims
    found = explanation(
        judged.contexts[None],
        judged.projected[None],
        judged.weights,
        judged.allowed,
        shown=claims.shown(len(judged.projected)),
    )
    if found is not None and found.harmless:
        return holds("; ".join([found.cause, *_facts(judged)]))
    if found is not None:
        return broken(f"{off}, and exactly match a known mistake: {found.cause}", cause=found.cause)
    if is_defined_as_seen(subject):
        return holds("; ".join(["with its observed mask", *_facts(judged)]))
    need_plain(subject)
    return broken(f"{off}; they match no known mistake")


def is_defined_as_seen(subject: Subject) -> bool:
    """True if the heads' contexts match the reference with the observed mask, whatever the intended
    one."""
    try:
        judged = CoreJudged.of(subject)
    except NotApplicable:
        return False
    as_seen = judged.defined(judged.projected, subject.sees.to(judged.projected.device))
    return bool(difference(judged.contexts, as_seen).max() <= judged.allowed)


def _facts(judged: CoreJudged) -> Sequence[str]:
    subject = judged.core.subject
    rounding = float(2**6 * torch.finfo(subject.precision).eps)
    with torch.no_grad():
        seen = judged.core.seen(judged.x)
    facts = [f"rows: {judged.rows.words}"]
    facts += [
        words
        for words in (
            in_front_of_it(seen, judged.x, rounding),
            behind_the_attention(seen, judged.x, rounding),
        )
        if words
    ]
    return facts


def _wrong_roles(judged: CoreJudged) -> str | None:
    """Actual output of a layer whose name shows another role; None if names match."""
    places = {
        role: set(getattr(judged.rows, role).flatten().tolist())
        for role in ("query", "key", "value")
    }
    start = 0
    for name, width in zip(judged.core.names, judged.core.widths, strict=True):
        own, start = set(range(start, start + width)), start + width
        named = role_of(name.removesuffix(".weight"))
        gives = [role for role, rows in places.items() if rows & own]
        if named in places and named not in gives:
            others = " and ".join(f"the {_NAMES[g]}" for g in gives) or "no used value"
            return f"{name} gives {others}, not the {_NAMES[named]}"
    return None


def defined_output(
    x: Tensor, weights: Weights, shown: Tensor, scale: float | None = None
) -> Tensor:
    """Return the reference output of attention with these weights.

    Args:
        x: (B, T, d_in).
        weights: weights of the attention.
        shown: (T, T) mask; True = may attend.
        scale: factor on the scores; None: 1 / sqrt(head_dim).
    """
    from polyhead.backends.reference import run
    from polyhead.mask import dense

    H = weights.num_heads
    D = weights.query.shape[0] // H
    G = weights.key.shape[0] // D
    parts = (
        (weights.query, weights.query_bias, H),
        (weights.key, weights.key_bias, G),
        (weights.value, weights.value_bias, G),
    )
    query, key, value = (
        F.linear(x, w, b).unflatten(2, (count, -1)).transpose(1, 2) for w, b, count in parts
    )
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=dense(shown.to(x.device)),
        bias=None,
        scale=D**-0.5 if scale is None else scale,
        softcap=None,
        sinks=None,
        alibi_slopes=None,
        dropout=0.0,
        aux=AuxRequest(),
    )
    merged = run(call)[0].transpose(1, 2).flatten(2)
    return merged if weights.out is None else F.linear(merged, weights.out, weights.out_bias)
