"""The definition, computed: of a whole module whose layout is known, or of its core alone."""

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
    """The core of a module beside the definition with the rows that were learned.

    Attributes:
        core, rows: as they were learned.
        x: (1, T, d_in) the input.
        projected: (T, R) what its projections give.
        contexts: (T, H * E) what is merged, head by head.
        weights: those that pick queries, keys and values out of the R.
        allowed: how far apart equal contexts may be.
        scale: of the definition.
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
            NotApplicable: they cannot be learned, or it has what the definition has not.
        """
        need_no_positions(subject)
        rows, core = learned_rows(subject), core_of(subject)
        if not rows.in_order:
            raise NotApplicable("its heads are merged, or share keys, in another order")
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
    """Hold the contexts of the heads to the definition, from what the projections give, and
    report the order of their rows and what stands around.

    Raises:
        NotApplicable: its core, or the order of its rows, cannot be learned.
    """
    judged = CoreJudged.of(subject)
    if wrong := _wrong_roles(judged):
        return broken(f"{wrong}", cause=wrong)
    if judged.apart <= judged.allowed:
        return holds("; ".join(_facts(judged)))
    off = f"the heads' contexts are {by(torch.tensor(judged.apart))} off the definition"
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
        return broken(f"{off}, and exactly those of this mistake: {found.cause}", cause=found.cause)
    if is_defined_as_seen(subject):
        return holds("; ".join(["with the mask that it is seen to have", *_facts(judged)]))
    need_plain(subject)
    return broken(f"{off}; no usual mistake explains them")


def is_defined_as_seen(subject: Subject) -> bool:
    """Whether the heads' contexts are those of the definition with the mask that the module is
    seen to have, whatever it should have."""
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
    """What a layer named for one role gives instead, where names tell."""
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
            others = " and ".join(f"the {_NAMES[g]}" for g in gives) or "nothing that is used"
            return f"{name} gives {others}, not the {_NAMES[named]}"
    return None


def defined_output(
    x: Tensor, weights: Weights, shown: Tensor, scale: float | None = None
) -> Tensor:
    """What attention with these weights gives, by the definition that every backend is held to.

    Args:
        x: (B, T, d_in).
        weights: of the attention.
        shown: (T, T) True where a query may attend.
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
