"""Bugs of functions like scaled_dot_product_attention."""

import math

import torch
import torch.nn.functional as F


def right(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, softcap=None
):
    """Right, with materialized scores."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, softcap)


def attend(query, key, value, attn_mask, dropout_p, is_causal, scale, softcap):
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if is_causal:
        T, S = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(1 + S - T), -math.inf)
    return F.dropout(torch.nan_to_num(scores.softmax(-1)), dropout_p) @ value


def tiled(query, key, value):
    group = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(
        query, key.repeat(1, group, 1, 1), value.repeat(1, group, 1, 1)
    )


def no_scale(query, key, value):
    return (query @ key.mT).softmax(-1) @ value


def inverted(query, key, value, attn_mask=None):
    mask = None if attn_mask is None or attn_mask.dtype != torch.bool else ~attn_mask
    return F.scaled_dot_product_attention(query, key, value, mask)


def off_by_one(query, key, value, is_causal=False):
    T, S = query.shape[2], key.shape[2]
    mask = torch.ones(T, S, dtype=torch.bool).tril(1 + S - T) if is_causal else None
    return F.scaled_dot_product_attention(query, key, value, mask)


def between(query, key, value, is_causal=False):
    """Aligned neither at the start nor at the end."""
    T, S = query.shape[2], key.shape[2]
    mask = torch.ones(T, S, dtype=torch.bool).tril((S - T) // 2) if is_causal else None
    return F.scaled_dot_product_attention(query, key, value, mask)


def numbers_as_booleans(query, key, value, attn_mask=None):
    mask = None if attn_mask is None else attn_mask.bool()
    return F.scaled_dot_product_attention(query, key, value, mask)


def nan_rows(query, key, value, attn_mask=None):
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return scores.softmax(-1) @ value


def cuts_values(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)[..., : query.shape[-1]]


def drops_scale(query, key, value, scale=None):
    return F.scaled_dot_product_attention(query, key, value)


def wrong_softcap(query, key, value, softcap=None):
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return (scores if softcap is None else scores.clamp(-softcap, softcap)).softmax(-1) @ value


def overflowing(query, key, value):
    raised = (query @ key.mT * query.shape[-1] ** -0.5).exp()
    return raised / raised.sum(-1, keepdim=True) @ value


def over_heads(query, key, value):
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(1) @ value


def drops_causal(query, key, value, is_causal=False):
    return F.scaled_dot_product_attention(query, key, value)


def unscaled_dropout(query, key, value, dropout_p=0.0):
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return weights * (torch.rand_like(weights) >= dropout_p) @ value


def always_float32(query, key, value):
    return F.scaled_dot_product_attention(query.float(), key.float(), value.float())


def in_place(query, key, value):
    query *= query.shape[-1] ** -0.5
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def detached(query, key, value):
    return F.scaled_dot_product_attention(query, key.detach() + 0 * key, value)
