"""Most attended keys against the sorted weights of the reference."""

from __future__ import annotations

import importlib
import re

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError

sums = importlib.import_module("polyhead.look.streaming")


def assert_most_attended(found, weights, n, atol):
    ordered = weights.sort(dim=-1, descending=True).values[..., :n]
    torch.testing.assert_close(found.weights.double(), ordered, rtol=0, atol=atol)
    some = found.keys >= 0
    assert torch.equal(some, found.weights > 0)
    there = weights.gather(-1, found.keys.clamp(min=0)).masked_fill(~some, 0.0)
    torch.testing.assert_close(found.weights.double(), there, rtol=0, atol=atol)
    each = found.keys.masked_fill(~some, -1).sort(dim=-1).values
    assert ((each.diff(dim=-1) != 0) | (each[..., 1:] == -1)).all()  # no key twice


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("T", "S"), [(17, 17), (5, 19), (23, 7)])
def test_top_keys_match_reference_for_every_mask(
    monkeypatch, example, tolerance, mask, T, S, dtype
):
    monkeypatch.setattr(sums, "_CELLS", 2 * 6 * S * 4)
    one = example(T, S, mask, dtype=dtype)
    found = ph.look.top_keys(one.query, one.key, 4, **one.options)
    assert_most_attended(found, one.weights, 4, tolerance(one.lse, dtype))


def test_top_keys_match_reference_for_every_score_option(example, options):
    one = example(9, 14, options=options)
    found = ph.look.top_keys(one.query, one.key, 3, **one.options)
    assert_most_attended(found, one.weights, 3, 1e-12)


def test_top_keys_bfloat16_weights_do_not_tie():
    key = (1.0 + torch.arange(300) / 64).to(torch.bfloat16)[None, None, :, None]
    query = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    found = ph.look.top_keys(query, key, 1, scale=1 / 64)
    assert found.keys.item() in key.flatten().float().topk(8).indices
    assert found.weights.dtype == torch.float32


def test_top_keys_returns_at_most_s_keys():
    found = ph.look.top_keys(torch.ones(1, 2, 3, 8), torch.ones(1, 1, 2, 8), 5)
    assert found.keys.shape == found.weights.shape == (1, 2, 3, 2)


@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_top_keys_of_empty_inputs(B, T, S):
    found = ph.look.top_keys(torch.ones(B, 4, T, 8), torch.ones(B, 2, S, 8), 3)
    assert found.keys.shape == (B, 4, T, min(S, 3))


def test_top_keys_refuses_invalid_n():
    with pytest.raises(
        ArgumentError, match=re.escape("n must be an integer of at least 1; got 0; use 8")
    ):
        ph.look.top_keys(torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8), 0)
