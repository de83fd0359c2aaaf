"""check_module: it finds bugs in modules that know nothing of polyhead, and clears right ones."""

import pytest
import torch
from torch import nn

import polyhead as ph


class Book(nn.Module):
    """A multi-head attention as in courses, with a switch for the bug of its mask."""

    def __init__(self, d_model=24, n_heads=4, context_length=16, inverted=False):
        super().__init__()
        self.n_heads = n_heads
        self.W_query, self.W_key, self.W_value = (nn.Linear(d_model, d_model) for _ in range(3))
        self.out_proj = nn.Linear(d_model, d_model)
        hidden = torch.ones(context_length, context_length, dtype=torch.bool).triu(1)
        self.register_buffer("mask", ~hidden if inverted else hidden)

    def forward(self, x):
        B, T, d_model = x.shape
        split = (B, T, self.n_heads, d_model // self.n_heads)
        projections = (self.W_query, self.W_key, self.W_value)
        q, k, v = (W(x).view(split).transpose(1, 2) for W in projections)
        scores = q @ k.mT / k.shape[-1] ** 0.5
        weights = scores.masked_fill(self.mask[:T, :T], -torch.inf).softmax(dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


def test_a_right_module_passes_and_its_facts_are_found():
    report = ph.check.check_module(Book())
    assert report.ok, report
    assert report.exit_code == 0
    assert report.facts["d_in"] == "24 (input of W_query)"
    assert report.facts["causal"] == "yes (no token sees a later one)"
    assert report.facts["max_tokens"] == "16 (buffer mask)"


def test_an_inverted_mask_is_caught_and_named():
    report = ph.check.check_module(Book(inverted=True))
    assert not report.ok
    assert "no_future_leak" in [failure.law for failure in report.failures]
    assert report.diagnosis[0].startswith("inverted mask")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_our_own_module_passes(dtype):
    mha = ph.MultiHeadAttention(24, 24, context_length=16, dropout=0.1, num_heads=4)
    report = ph.check.check_module(mha, dtype=dtype)
    assert report.ok, report
