"""Attention maps against means of the reference's weights."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import polyhead as ph
from polyhead.errors import ArgumentError

maps = importlib.import_module("polyhead.look.maps")


def pooled(weights, bins):
    T, S = weights.shape[2:]
    rows, columns = min(bins, T), min(bins, S)
    cells = torch.zeros(*weights.shape[:2], rows, columns, dtype=weights.dtype)
    for i in range(rows):
        for j in range(columns):
            top, bottom = i * T // rows, (i + 1) * T // rows
            left, right = j * S // columns, (j + 1) * S // columns
            cells[..., i, j] = weights[..., top:bottom, left:right].mean(dim=(2, 3))
    return cells


@pytest.fixture(params=[1, 10**9], ids=["passes", "weights"])
def either_way(request, monkeypatch):
    """Both paths: one pass per bin of keys, or weights in chunks of queries."""
    monkeypatch.setattr(maps, "_KEYS_A_PASS", request.param)
    monkeypatch.setattr(
        importlib.import_module("polyhead.look.streaming"), "_CELLS", 2 * 6 * 19 * 2
    )


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("T", "S"), [(17, 17), (5, 19), (23, 7)])
def test_map_matches_reference_for_every_mask(example, tolerance, mask, T, S, dtype):
    one = example(T, S, mask, dtype=dtype)
    got = ph.look.attention_map(one.query, one.key, bins=6, **one.options)
    atol = tolerance(one.lse, dtype)
    torch.testing.assert_close(got.double(), pooled(one.weights, 6), rtol=0, atol=atol)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_map_matches_reference_for_every_score_option(example, tolerance, options, dtype):
    one = example(9, 14, options=options, dtype=dtype)
    got = ph.look.attention_map(one.query, one.key, bins=4, **one.options)
    atol = tolerance(one.lse, dtype)
    torch.testing.assert_close(got.double(), pooled(one.weights, 4), rtol=0, atol=atol)


def test_map_memory_does_not_grow_with_tokens_squared(tensor_sizes):
    T, H = 4096, 2
    query = torch.randn(1, H, T, 8)
    with tensor_sizes:
        got = ph.look.attention_map(query, query, bins=8, mask=ph.mask.causal())
    assert tensor_sizes.largest <= H * T * 8  # as large as the queries
    assert torch.equal(got[0, 0].triu(1), torch.zeros(8, 8))
    torch.testing.assert_close(got.sum(dim=3) * 512, torch.ones(1, H, 8))


def test_map_with_one_bin_per_token_is_the_weights(example):
    one = example(5, 9)
    got = ph.look.attention_map(one.query, one.key, **one.options)
    torch.testing.assert_close(got, one.weights)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_map_of_empty_inputs_is_zero(B, T, S):
    got = ph.look.attention_map(torch.ones(B, 4, T, 8), torch.ones(B, 2, S, 8), bins=3)
    assert got.shape == (B, 4, min(T, 3), min(S, 3))


@given(tokens=st.integers(0, 400), bins=st.integers(1, 300))
def test_bin_edges_are_even_and_cover_every_token(tokens, bins):
    edges = ph.look.bin_edges(tokens, bins)
    sizes = edges.diff()
    assert len(sizes) == min(bins, tokens)
    assert (edges[0], edges[-1]) == (0, tokens)
    assert not tokens or sizes.max() - sizes.min() <= 1 <= sizes.min()


@pytest.mark.parametrize("bins", [0, 2.0, True])
def test_map_refuses_invalid_bins(bins):
    message = f"bins must be an integer of at least 1; got {bins!r}; use 128"
    with pytest.raises(ArgumentError, match=re.escape(message)):
        ph.look.attention_map(torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8), bins=bins)
