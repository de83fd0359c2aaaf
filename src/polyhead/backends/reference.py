"""The definition: multi-head attention written out in plain PyTorch. Every backend is held to it.

    scores  = scale * query @ key^T               per head; query head h uses key head h // group
    scores  = softcap * tanh(scores / softcap)    if softcap
    scores  = scores + bias                       if bias
    scores  = scores - slope * |query - key|      if ALiBi slopes; positions, one slope per head
    scores  = -inf where the mask forbids
    weights = exp(scores - lse), lse = log sum exp(scores); a sink adds exp(sink) to the sum
    output  = dropout(weights) @ value

Sources: Vaswani et al. 2017, "Attention Is All You Need", section 3.2; softcap: Gemma 2 report,
2024; ALiBi: Press et al. 2022; sinks: gpt-oss model card, 2025. It imports no kernel, and shares
no helper with one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.call import AttentionCall, Aux, HeadStats

__all__ = ["compute_aux", "notes", "run", "why_not"]


def why_not(call: AttentionCall) -> list[str]:
    """The definition runs everything."""
    return []


def notes(call: AttentionCall) -> list[str]:
    cells = call.B * call.H * call.T * call.S
    mebibytes = cells * call.compute_dtype.itemsize / 2**20
    return [f"plain PyTorch, holds the T x S scores of every head: {mebibytes:.1f} MiB each copy"]


def run(call: AttentionCall) -> tuple[Tensor, Aux]:
    """Output (B, H, T, E) in the call's dtype, and the aux that was asked for."""
    scores_bhts = _scores(call)
    weights_bhts = _normalize(scores_bhts, call.sinks)
    kept_bhts = F.dropout(weights_bhts, call.dropout) if call.dropout > 0.0 else weights_bhts
    output = _weighted_values(kept_bhts, call).to(call.dtype)
    return output, _aux(call, scores_bhts, weights_bhts)


def compute_aux(call: AttentionCall) -> Aux:
    """The aux alone, for a call whose output another backend computes. Draws no random numbers."""
    scores_bhts = _scores(call)
    return _aux(call, scores_bhts, _normalize(scores_bhts, call.sinks))


def _scores(call: AttentionCall) -> Tensor:
    """(B, H, T, S) in the compute dtype, -inf where the mask forbids."""
    # The queries of a group are rows against their one key head. (Broadcasting the key over the
    # group would repeat it in memory: matmul copies what it broadcasts.)
    query_bgrd = _split(call.query.to(call.compute_dtype), call.G, call.group * call.T)
    scores_bgrs = query_bgrd @ call.key.to(call.compute_dtype).transpose(-2, -1)
    scores_bhts = _split(scores_bgrs, call.H, call.T) * call.scale
    if call.softcap is not None:
        scores_bhts = call.softcap * torch.tanh(scores_bhts / call.softcap)
    if call.bias is not None:
        scores_bhts = scores_bhts + call.bias.to(call.compute_dtype)
    if call.alibi_slopes is not None:
        slopes_h11 = call.alibi_slopes.to(call.compute_dtype)[:, None, None]
        scores_bhts = scores_bhts - slopes_h11 * _distances(call).abs()
    if call.mask is not None:
        allowed = call.mask.materialize(
            call.T, call.S, query_offset=call.query_offset, device=call.device
        )
        scores_bhts = scores_bhts.masked_fill(~allowed, float("-inf"))
    return scores_bhts


def _distances(call: AttentionCall) -> Tensor:
    """Query position - key position, (T, S) or (B, 1, T, S)."""
    key_s = torch.arange(call.S, device=call.device)
    query_t1 = torch.arange(call.T, device=call.device)[:, None]
    first = call.first_position
    if isinstance(first, Tensor) and first.ndim:  # a traced size has none
        return query_t1 + first[:, None, None, None] - key_s
    return query_t1 + first - key_s


def _normalize(scores_bhts: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights (B, H, T, S). A row of -inf gives zeros, never NaN."""
    if scores_bhts.shape[-1] == 0:
        return scores_bhts
    largest = scores_bhts.detach().amax(dim=-1, keepdim=True)
    if sinks is not None:
        sink_h11 = sinks.to(scores_bhts.dtype)[:, None, None]
        largest = torch.maximum(largest, sink_h11.detach())
    # Where every score is -inf any finite shift keeps exp(scores - shift) at zero.
    shift = largest.masked_fill(largest == float("-inf"), 0.0)
    exp_bhts = torch.exp(scores_bhts - shift)
    total = exp_bhts.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink_h11 - shift)
    return exp_bhts / total.masked_fill(total == 0.0, 1.0)


def _lse(scores_bhts: Tensor) -> Tensor:
    """log sum exp, (B, H, T). A row of -inf gives -inf and zero gradient, never NaN.

    Apart from `_normalize`: shifted by a large sink, the sum of the keys could vanish.
    """
    if scores_bhts.shape[-1] == 0:
        return scores_bhts.new_full(scores_bhts.shape[:-1], float("-inf"))
    largest = scores_bhts.detach().amax(dim=-1, keepdim=True)
    shift = largest.masked_fill(largest == float("-inf"), 0.0)
    total_bht = torch.exp(scores_bhts - shift).sum(dim=-1)
    empty = total_bht == 0.0
    lse_bht = torch.log(total_bht.masked_fill(empty, 1.0)) + shift.squeeze(-1)
    return lse_bht.masked_fill(empty, float("-inf"))


def _weighted_values(weights_bhts: Tensor, call: AttentionCall) -> Tensor:
    weights_bgrs = _split(weights_bhts, call.G, call.group * call.T)
    output_bgre = weights_bgrs @ call.value.to(call.compute_dtype)
    return _split(output_bgre, call.H, call.T)


def _split(x: Tensor, heads: int, rows: int) -> Tensor:
    """The rows of all heads, in their order, as `rows` for each of `heads`."""
    # By way of one dimension: a merge of two that grow with T makes torch.export fix T.
    split: Tensor = x.flatten(1).unflatten(1, (heads, rows, x.shape[-1]))
    return split


def _aux(call: AttentionCall, scores_bhts: Tensor, weights_bhts: Tensor) -> Aux:
    return Aux(
        weights=weights_bhts.to(call.dtype) if call.aux.weights else None,
        mean_weights=weights_bhts.mean(dim=1).to(call.dtype) if call.aux.mean_weights else None,
        lse=_lse(scores_bhts) if call.aux.lse else None,
        stats=_stats(scores_bhts, weights_bhts, _distances(call)) if call.aux.stats else None,
    )


def _stats(scores_bhts: Tensor, weights_bhts: Tensor, distance: Tensor) -> HeadStats:
    S = weights_bhts.shape[-1]
    # Zero weights get the log of 1: 0 * log(0) has no gradient.
    log_weights_bhts = torch.log(weights_bhts.masked_fill(weights_bhts == 0.0, 1.0))

    def mass(where: Tensor) -> Tensor:
        return (weights_bhts * where).sum(dim=-1)

    return HeadStats(
        entropy=-(weights_bhts * log_weights_bhts).sum(dim=-1),
        mean_distance=mass(distance.abs()),
        mass_first=weights_bhts[..., 0] if S else weights_bhts.sum(dim=-1),
        mass_previous=mass(distance == 1),
        mass_self=mass(distance == 0),
        max_logit=scores_bhts.amax(dim=-1) if S else scores_bhts.sum(dim=-1) - float("inf"),
    )
