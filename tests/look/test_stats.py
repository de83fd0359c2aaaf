"""Statistics computed in chunks against the definition's, and against numbers by hand."""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import fields

import pytest
import torch

import polyhead as ph
from polyhead.errors import ShapeError

chunked = importlib.import_module("polyhead.look.stats")
NAMES = [field.name for field in fields(ph.HeadStats)]


def masks(T, S):
    by_row = torch.rand(2, 1, T, S, generator=torch.Generator().manual_seed(3)) < 0.5
    causal, window = ph.mask.causal(), ph.mask.window(before=2)
    return {
        "none": None,
        "causal": causal,
        "causal from the start": ph.mask.causal(align="start"),
        "window": ph.mask.window(before=1, after=2),
        "window from the start": ph.mask.window(before=1, after=2, align="start"),
        "lengths": ph.mask.lengths([3, 0]),
        "dense": ph.mask.dense(by_row),
        "dense, one query row": ph.mask.dense(by_row[:, :, :1]),
        "and": causal & window & ph.mask.lengths([S, 3]),
        "or, not": causal | ~window,
        "prefix": causal | ph.mask.prefix(3),
        "left padding": causal & ph.mask.left_padding([0, 2]),
        **({"documents": ph.mask.documents(torch.arange(S) // 3)} if T <= S else {}),
        "rows": causal.for_queries(2, 2 + T, T + 5),
    }


@pytest.mark.parametrize("cells", [1, 2 * 6 * 7 * 2, 2 * 6 * 7 * 5, 10**9])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (3, 7), (11, 7), (1, 7)])
@pytest.mark.parametrize("kind", masks(2, 2))
def test_chunks_give_the_definition(monkeypatch, kind, T, S, cells):
    monkeypatch.setattr(chunked, "_CELLS", cells)
    torch.manual_seed(1)
    query = torch.randn(2, 6, T, 8, dtype=torch.float64)
    key = torch.randn(2, 2, S, 8, dtype=torch.float64)
    mask = masks(T, S).get(kind)  # documents have no T > S: then nothing is masked
    _, aux = ph.attention(
        query, key, key, mask=mask, scale=0.7, return_aux=ph.AuxRequest(stats=True)
    )
    got = ph.look.stats(query, key, mask=mask, scale=0.7)
    for name in NAMES:
        assert getattr(got, name).shape == (2, 6, T)
        torch.testing.assert_close(
            getattr(got, name), getattr(aux.stats, name), rtol=0, atol=1e-12, msg=name
        )


def test_no_scores_of_every_query_are_held(tensor_sizes):
    T, H = 2048, 4
    with tensor_sizes:
        ph.look.stats(torch.randn(1, H, T, 8), torch.randn(1, 2, T, 8), mask=ph.mask.causal())
    assert chunked._CELLS < T * T * H
    assert tensor_sizes.largest <= chunked._CELLS


@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_look_at(B, T, S):
    stats = ph.look.stats(torch.ones(B, 4, T, 8), torch.ones(B, 2, S, 8))
    for name in NAMES:
        want = -math.inf if name == "max_logit" else 0.0
        assert getattr(stats, name).shape == (B, 4, T)
        assert (getattr(stats, name) == want).all()


def test_one_number_a_head():
    torch.manual_seed(0)
    stats = ph.look.stats(torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8))
    per_head = stats.per_head()
    assert list(per_head) == NAMES
    for name in NAMES:
        by_hand = getattr(stats, name).transpose(0, 1).flatten(1)
        want = by_hand.amax(1) if name == "max_logit" else by_hand.mean(1)
        torch.testing.assert_close(per_head[name], want)


def test_arguments_are_checked_as_attention_checks_them():
    message = "key must be (B, G, S, D) with the query's B = 2 and D = 8, and G at least 1; got"
    with pytest.raises(ShapeError, match=re.escape(message)):
        ph.look.stats(torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 7))
    with pytest.raises(ShapeError, match="query must have 4 dimensions"):
        ph.look.stats(torch.ones(2, 3, 8), torch.ones(2, 2, 3, 8))
    with pytest.raises(
        ph.errors.DtypeError, match=r"mask must be a polyhead.mask.Mask; got Tensor"
    ):
        ph.look.stats(torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 8), mask=torch.ones(3, 3))
