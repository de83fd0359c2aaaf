"""Diagnosis: the probable cause of a pattern of broken laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from polyhead.check.law import NotApplicable, Outcome, Verdict
from polyhead.check.probe.heads import contexts_of
from polyhead.check.subject import Subject
from polyhead.check.tolerance import Spy, operation

__all__ = ["diagnose"]

Broken = Mapping[str, Verdict]


def diagnose(subject: Subject, verdicts: Mapping[str, Verdict]) -> tuple[str, ...]:
    """Return probable causes, the likeliest first; empty if no law is broken or no pattern fits.

    Args:
        subject: the checked module.
        verdicts: verdict of every law that ran, by name.
    """
    broken = {n: v for n, v in verdicts.items() if v.outcome is Outcome.BROKEN}
    # An exception is its own explanation, except an overflow.
    broken = {
        name: verdict
        for name, verdict in broken.items()
        if "overflow" in verdict.evidence.get("raised", "overflow")
    }
    causes = (pattern(subject, broken) for pattern in _PATTERNS) if broken else ()
    # An exact explanation covers all other causes.
    return tuple(cause for cause in causes if cause)[: 1 if _exact(subject, broken) else 2]


def _exact(subject: Subject, broken: Broken) -> str | None:
    """Known mistake that reproduces the module's output to the last digit."""
    if "output_matches_reference" not in broken:
        return None
    cause: str | None = broken["output_matches_reference"].evidence.get("cause")
    return cause


def _unfilled(subject: Subject, broken: Broken) -> str | None:
    if "parameters_are_filled" not in broken:
        return None
    return f"uninitialized parameters: {', '.join(subject.unfilled)}"


def _tokens_first(subject: Subject, broken: Broken) -> str | None:
    alone = torch.eye(subject.T, dtype=torch.bool)
    if "batch_rows_are_independent" in broken and torch.equal(subject.sees.cpu(), alone):
        return (
            "batch rows attend to each other and tokens do not: does it take (tokens, batch, "
            "features)? Then pass call= with x.transpose(0, 1)"
        )
    return None


def _modes(subject: Subject, broken: Broken) -> str | None:
    modes = broken.get("causal_in_every_mode")
    if modes is not None and modes.evidence.get("modes", 4) < 4:
        return "the causal mask is missing in one mode, which may run another kernel"
    return None


def _who_sees_whom(subject: Subject, broken: Broken) -> str | None:
    if not broken.keys() & {"no_future_leak", "past_is_used"} or not subject.claims.causal:
        return None
    sees = subject.sees.cpu()
    T = sees.shape[0]
    ones = torch.ones(T, T, dtype=torch.bool)
    if not (sees & ones.tril(-1)).any() and (sees & ones.triu(1)).any():
        return "inverted mask: tokens attend to later tokens and not to earlier ones"
    if torch.equal(sees, ones.tril(1)):
        return "off-by-one mask: every token also attends to the next one"
    # A token also acts through its own query, except where there is one key only; and the first
    # row, which is empty, may depend on any token.
    if not sees[1, 1] and torch.equal(sees[2:], ones.tril()[2:]):
        return "off-by-one mask: no token attends to itself"
    if sees.all() and not broken.keys() & {"identical_tokens_agree", "heads_are_independent"}:
        influence = subject.influence.cpu()
        past, future = influence[ones.tril(-1)].mean(), influence[ones.triu(1)].mean()
        if future > 0.1 * past:
            return "no mask reaches the scores: every token attends to every other"
        return "every token has a small influence on every other: a mean or a norm over the tokens?"
    return None


def _softmax(subject: Subject, broken: Broken) -> str | None:
    if not broken.keys() & {"identical_tokens_agree", "contexts_are_weighted_means"}:
        return None
    spy = _SoftmaxAxes()
    with torch.no_grad(), spy:
        subject.call(subject.exact, subject.input(2))
    if wrong := [axis for axis in spy.axes if axis != -1]:
        return f"softmax over the wrong axis: {wrong[0]} of the scores, not the last"
    if _shrinks_with_what_is_hidden(subject):
        return "the mask is applied after the softmax: weights do not sum to 1"
    return None


def _shrinks_with_what_is_hidden(subject: Subject) -> bool:
    """True if token t of T equal ones gets n / T of its value when it attends to n of them."""
    token = subject.input(1, 1)
    try:
        with torch.no_grad():
            alone, repeated = (
                contexts_of(subject, subject.exact, x)[0]
                for x in (token, token.expand(-1, subject.T, -1))
            )
    except NotApplicable:
        return False
    seen = subject.claims.shown(subject.T).sum(dim=1)
    expected = alone * (seen / subject.T).to(alone)[:, None, None]
    return bool((repeated - expected).abs().max() <= 16 * subject.allowed(subject.input()))


def _values(subject: Subject, broken: Broken) -> str | None:
    laws = {"identical_tokens_agree", "contexts_are_weighted_means"}
    if subject.claims.positions is None or not laws <= broken.keys():
        return None
    if broken.keys() & {"heads_are_independent", "batch_rows_are_independent"}:
        return None
    return "values depend on their positions: are positions also applied to the values?"


def _heads(subject: Subject, broken: Broken) -> str | None:
    if "heads_are_independent" in broken and "no_head_is_dead" not in broken:
        return "heads merged or split by a view without a transpose"
    if "kv_heads_are_shared_in_order" in broken:
        return "KV heads shared in another order: tiled, not interleaved"
    return None


_DROPPED = {
    "scores": "dropout on scores before the softmax",
    "features": "dropout on features of values or contexts",
    "renormalized": "weights are renormalized after dropout",
    "unscaled": "kept weights are not scaled by 1 / (1 - p)",
}


def _dropout(subject: Subject, broken: Broken) -> str | None:
    if "evaluation_repeats" in broken:
        evidence = broken["evaluation_repeats"].evidence
        if evidence.get("made"):
            return "weights are redrawn in every call: are layers created in forward?"
        if evidence.get("drawn"):
            return "dropout in evaluation: self.training is ignored"
        return "the output changes from call to call, and torch's generator is not the cause"
    if "dropout_drops_weights" in broken:
        return _DROPPED[broken["dropout_drops_weights"].evidence["dropped"]]
    if "dropout_is_unbiased" in broken:
        return "kept weights are not scaled by 1 / (1 - p), or dropout is not on weights"
    return None


def _window(subject: Subject, broken: Broken) -> str | None:
    evidence = (
        broken["window_counts_its_tokens"].evidence if "window_counts_its_tokens" in broken else {}
    )
    counted, window = evidence.get("counted"), evidence.get("window")
    if counted is None or window is None or abs(counted - window) != 1:
        return None
    return f"window off by one: {counted} tokens instead of {window}"


def _polarity(subject: Subject, broken: Broken) -> str | None:
    names = {"hidden_tokens_have_no_influence", "shown_tokens_keep_their_influence"}
    mask = subject.calling.mask
    if mask is None:
        return None
    if broken.keys() & names == {"hidden_tokens_have_no_influence"}:
        x, hidden = subject.input(2), torch.zeros(2, subject.T, dtype=torch.bool)
        hidden[:, subject.T // 2] = True
        if torch.equal(subject.run(x), subject.run(x, allowed=subject.showing(hidden))):
            return f"{mask.name} is accepted and ignored"
        return None
    if not names <= broken.keys():
        return None
    return f"mask of the wrong polarity: True in {mask.name} should mean {mask.true_means}"


def _input(subject: Subject, broken: Broken) -> str | None:
    if "inputs_are_not_modified" in broken:
        return "it modifies its input in place"
    return None


def _positions(subject: Subject, broken: Broken) -> str | None:
    if "relative_positions_are_relative" in broken:
        return "queries and keys are rotated by different rules: are positions applied to both?"
    if "positions_tell_order" in broken:
        return "positions have no effect: are they applied along the token axis?"
    return None


def _cache(subject: Subject, broken: Broken) -> str | None:
    singly = broken.get("cache_token_by_token_agrees")
    chunks = broken.get("cache_in_chunks_agrees")
    if singly is None and chunks is not None:
        if chunks.evidence.get("sees_ahead"):
            return "a chunk after a cache has no mask: its tokens attend to later ones"
        if not chunks.evidence.get("upper_left"):
            return "a chunk after a cache is masked differently from a full pass"
        return "a chunk after a cache is masked as if it were at the start (upper left)"
    if singly is not None and singly.evidence.get("first_wrong") == 1:
        if subject.claims.positions is not None:
            return "wrong cache position: a new token's position ignores the cached tokens"
        return "the cache loses, repeats or masks tokens"
    return None


def _fill(subject: Subject, broken: Broken) -> str | None:
    raised = broken.get("half_precision_is_close_to_float64")
    if raised is not None and "overflow" in raised.evidence.get("raised", ""):
        return "masked scores are filled with a value that overflows in float16; use -inf"
    if "mask_survives_large_scores" in broken and "no_future_leak" not in broken:
        return "masked scores are filled with a value that other scores can reach; use -inf"
    return None


_PATTERNS: tuple[Callable[[Subject, Broken], str | None], ...] = (
    _unfilled,
    _exact,
    _tokens_first,
    _modes,
    _who_sees_whom,
    _dropout,
    _window,
    _polarity,
    _cache,
    _positions,
    _input,
    _softmax,
    _values,
    _heads,
    _fill,
)


class _SoftmaxAxes(Spy):
    """Records the axis, counted from the last, of every softmax in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.axes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation(func).endswith("softmax") and isinstance(args[0], Tensor):
            self.axes.append(args[1] % args[0].ndim - args[0].ndim)
        return func(*args, **(kwargs or {}))
