"""`HeadStats` against those of the reference's weights, and against values by hand."""

from __future__ import annotations

import importlib
import math
import re

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, DtypeError, ShapeError

NAMES = [
    "entropy",
    "mean_distance",
    "mass_first",
    "mass_previous",
    "mass_self",
    "mass_recent",
    "mass_same_token",
    "mass_induction",
    "max_logit",
    "lse",
]


def by_hand(weights, ids):
    """Statistics by loops over queries and keys, from weights (B, H, T, S) and ids (B, S)."""
    B, H, T, S = weights.shape
    found = {name: torch.zeros(B, H, T, dtype=torch.float64) for name in NAMES[1:-2]}
    for t in range(T):
        p = S - T + t
        for s in range(S):
            w = weights[:, :, t, s]
            found["mean_distance"][:, :, t] += w * abs(p - s)
            found["mass_first"][:, :, t] += w * (s == 0)
            found["mass_previous"][:, :, t] += w * (s == p - 1)
            found["mass_self"][:, :, t] += w * (s == p)
            found["mass_recent"][:, :, t] += w * (p - 16 < s <= p)
            for b in range(B):
                same = p >= 0 and s < p and ids[b, s] == ids[b, p]
                after = p >= 0 and 0 < s <= p and ids[b, s - 1] == ids[b, p]
                found["mass_same_token"][b, :, t] += w[b] * same
                found["mass_induction"][b, :, t] += w[b] * after
    found["entropy"] = torch.special.entr(weights).sum(dim=-1)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("T", "S"), [(17, 17), (3, 19), (1, 7)])
def test_stats_match_reference_for_every_mask(example, tolerance, mask, T, S, dtype):
    one = example(T, S, mask, dtype=dtype)
    ids = torch.randint(4, (2, S))
    got = ph.look.stats(one.query, one.key, token_ids=ids, **one.options)
    for name, want in by_hand(one.weights, ids).items():
        atol = tolerance(one.lse, dtype) * (S if name == "mean_distance" else 1)
        torch.testing.assert_close(getattr(got, name).double(), want, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stats_match_reference_for_every_score_option(example, tolerance, options, dtype):
    one = example(13, 19, options=options, dtype=dtype)
    ids = torch.randint(3, (19,))
    got = ph.look.stats(one.query, one.key, token_ids=ids, **one.options)
    for name, want in by_hand(one.weights, ids.expand(2, -1)).items():
        atol = tolerance(one.lse, dtype) * (19 if name == "mean_distance" else 1)
        torch.testing.assert_close(getattr(got, name).double(), want, rtol=0, atol=atol, msg=name)


def test_stats_token_masses_in_chunks_are_equal(monkeypatch, example):
    one = example(17, 19)
    ids = torch.randint(4, (2, 19))
    whole = ph.look.stats(one.query, one.key, token_ids=ids, **one.options)
    monkeypatch.setattr(importlib.import_module("polyhead.look.token_mass"), "_CELLS", 2 * 19 * 3)
    parts = ph.look.stats(one.query, one.key, token_ids=ids, **one.options)
    torch.testing.assert_close(parts.mass_induction, whole.mass_induction)
    torch.testing.assert_close(parts.mass_same_token, whole.mass_same_token)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stats_hold_no_t_x_s_tensor(tensor_sizes, dtype):
    T, H = 2048, 4
    query, key = torch.randn(1, H, T, 8, dtype=dtype), torch.randn(1, 2, T, 8, dtype=dtype)
    with tensor_sizes:
        ph.look.stats(query, key, mask=ph.mask.causal())
    assert tensor_sizes.largest <= 2**22 < T * T * H


@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_stats_of_empty_inputs(B, T, S):
    ids = torch.zeros(S, dtype=torch.int64) if T <= S else None
    stats = ph.look.stats(torch.ones(B, 4, T, 8), torch.ones(B, 2, S, 8), token_ids=ids)
    for name in NAMES:
        if T > S and name in ("mass_same_token", "mass_induction"):
            assert getattr(stats, name) is None
            continue
        want = -math.inf if name in ("max_logit", "lse") else 0.0
        assert getattr(stats, name).shape == (B, 4, T)
        assert (getattr(stats, name) == want).all()


def test_per_head_is_the_mean_over_attending_queries(example):
    one = example(7, 7, mask="left padding")  # two queries of row 1 have no keys
    ids = torch.tensor([5, 6, 5, 7, 6, 8, 9])
    stats = ph.look.stats(one.query, one.key, token_ids=ids, **one.options)
    assert stats.repeats.tolist() == [[[False, False, True, False, True, False, False]]]
    seen = [(0, t) for t in range(7)] + [(1, t) for t in range(2, 7)]
    repeated = [(b, t) for b in (0, 1) for t in (2, 4)]
    per_head = stats.per_head()
    assert sorted(per_head) == sorted([*NAMES, "effective_keys"])
    for name, got in per_head.items():
        values = getattr(stats, name)
        queries = repeated if name in ("mass_same_token", "mass_induction") else seen
        by_query = torch.stack([values[b, :, t] for b, t in queries])
        want = by_query.amax(0) if name == "max_logit" else by_query.mean(0)
        torch.testing.assert_close(got, want, msg=name)
    assert "mass_induction" not in ph.look.stats(one.query, one.key).per_head()


def test_per_head_of_aux_is_that_of_look(example):
    """Both average over the queries with a key to attend to: two of row 1 have none."""
    one = example(7, 7, mask="left padding")
    request = ph.AuxRequest(stats=True)
    _, aux = ph.attention(one.query, one.key, one.key, return_aux=request, **one.options)
    want = ph.look.stats(one.query, one.key, **one.options).per_head()
    got = aux.stats.per_head()
    assert list(got) == [name for name in want if name not in ("mass_recent", "lse")]
    for name, per_head in got.items():
        torch.testing.assert_close(per_head, want[name], msg=name)


def test_per_head_without_queries_that_attend_is_zero():
    """A mean over no query; its largest score is -inf."""
    query = torch.randn(1, 2, 3, 8)
    _, aux = ph.attention(
        query, query, query, mask=ph.mask.lengths([0]), return_aux=ph.AuxRequest(stats=True)
    )
    got = aux.stats.per_head()
    assert got.pop("max_logit").tolist() == [-math.inf, -math.inf]
    assert all((per_head == 0).all() for per_head in got.values())


def test_head_stats_is_one_class():
    assert ph.look.HeadStats is ph.HeadStats


def test_effective_keys_of_equal_weights_is_their_number():
    query, key = torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8)
    got = ph.look.stats(query, key, mask=ph.mask.causal()).effective_keys
    torch.testing.assert_close(got[0, 0], torch.arange(1.0, 6.0))


def test_stats_have_no_gradient():
    query = torch.randn(1, 2, 5, 8, requires_grad=True)
    assert not ph.look.stats(query, query).entropy.requires_grad


def test_stats_checks_arguments_as_attention_does():
    message = "key must be (B, G, S, D) with the query's B = 2 and D = 8, and G at least 1; got"
    with pytest.raises(ShapeError, match=re.escape(message)):
        ph.look.stats(torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 7))
    with pytest.raises(ShapeError, match="query must have 4 dimensions"):
        ph.look.stats(torch.ones(2, 3, 8), torch.ones(2, 2, 3, 8))
    with pytest.raises(DtypeError, match=r"mask must be a polyhead.mask.Mask; got Tensor"):
        ph.look.stats(torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 8), mask=torch.ones(3, 3))


def test_stats_checks_token_ids():
    query, key = torch.ones(2, 2, 3, 8), torch.ones(2, 2, 5, 8)
    message = (
        "token_ids must name the token of each of the S = 5 keys, (S,) or (B, S) with B = 2, the "
        "T = 3 queries among them; got (3,); give one id per key token, of cached tokens too"
    )
    with pytest.raises(ShapeError, match=re.escape(message)):
        ph.look.stats(query, key, token_ids=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ArgumentError, match=r"token_ids must be integers; got torch\.float32"):
        ph.look.stats(query, key, token_ids=torch.zeros(5))
    with pytest.raises(ArgumentError, match="token_ids must be a tensor; got list"):
        ph.look.stats(query, key, token_ids=[0] * 5)
