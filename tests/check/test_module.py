"""check_module: bugs in arbitrary modules are found, and right modules pass."""

import pytest
import torch
from torch import nn

import polyhead as ph


class Book(nn.Module):
    """Multi-head attention as in courses, with a switch for a mask bug."""

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


def test_right_module_passes_with_its_facts():
    report = ph.check.check_module(Book())
    assert report.ok, report
    assert report.exit_code == 0
    assert report.facts["d_in"] == "24 (input of W_query)"
    assert report.facts["causal"] == "yes (no token attends to a later one)"
    assert report.facts["max_tokens"] == "16 (buffer mask)"


def test_inverted_mask_is_caught_and_named():
    report = ph.check.check_module(Book(inverted=True))
    assert not report.ok
    assert "no_future_leak" in [failure.law for failure in report.failures]
    assert report.diagnosis[0].startswith("inverted mask")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_polyhead_module_passes(dtype):
    mha = ph.MultiHeadAttention(24, 24, context_length=16, dropout=0.1, num_heads=4)
    report = ph.check.check_module(mha, dtype=dtype)
    assert report.ok, report


class Odd(nn.Module):
    """Right, with uncommon names."""

    n_heads = 4

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(24, 24, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            w(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for w in (self.a, self.b, self.c)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.d(y.transpose(1, 2).flatten(2))


def test_weights_assigns_roles_to_uncommon_names():
    names = {"query": "a", "key": "b", "value": "c", "out": "d"}

    def verdict(**roles):
        weights = (
            None if not roles else lambda m: {r: getattr(m, n).weight for r, n in roles.items()}
        )
        only = ["output_matches_reference"]
        report = ph.check.check_module(Odd(), weights=weights, only=only)
        return report.results[0].verdict.outcome

    assert verdict() is ph.check.Outcome.HOLDS  # learned
    assert verdict(**names) is ph.check.Outcome.HOLDS
    assert verdict(**(names | {"key": "c", "value": "b"})) is ph.check.Outcome.BROKEN


class WithProperty(Book):
    """Right except for the mask. "Properly" does not mean rope."""

    @property
    def composition(self):
        return self.n_heads

    def forward(self, x):
        self.dropEach = 0  # a name with "rope" in it, in capitals
        return super().forward(x)


def test_words_containing_rope_or_position_are_ignored():
    report = ph.check.check_module(WithProperty(inverted=True))
    assert "positions" not in report.facts
    assert "output_matches_reference" in [failure.law for failure in report.failures]


class TokensFirst(Book):
    """(tokens, batch, features), as in fairseq."""

    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class TokensFirstLeaks(TokensFirst):
    def __init__(self):
        super().__init__()
        self.mask = self.mask.triu(2)


def test_tokens_first_is_found_and_judged():
    report = ph.check.check_module(TokensFirst())
    assert report.ok, report
    assert report.facts["called as"] == "x tokens first"
    assert report.facts["layout"] == "(tokens, batch, features), found by trying"


class TokensFirstOfThree(nn.Module):
    """query, key and value, without a batch_first attribute."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4)

    def forward(self, query, key, value):
        return self.attention(query, key, value)[0]


def test_tokens_first_is_found_with_query_key_and_value():
    report = ph.check.check_module(TokensFirstOfThree())
    assert report.ok, report
    assert report.facts["called as"] == "query, key, value tokens first"


def test_tokens_first_with_a_bug_is_broken():
    report = ph.check.check_module(TokensFirstLeaks(), only=["no_future_leak"])
    assert report.exit_code == 1, report
    assert report.diagnosis[0].startswith(
        "off-by-one mask: every token also attends to the next one"
    )


class RowsSeeEachOther(Book):
    """Broken: every row attends to all rows, and to its own tokens. It is not transposed."""

    def forward(self, x):
        return super().forward(x - x.mean(dim=0))


def test_mixed_batch_rows_are_not_another_layout():
    report = ph.check.check_module(RowsSeeEachOther(), only=["batch_rows_are_independent"])
    assert report.exit_code == 1
    assert "layout" not in report.facts


class Counted(nn.Module):
    """Right, with its number of heads under a given name."""

    def __init__(self, name):
        super().__init__()
        if name:
            setattr(self, name, 4)
        self.split = lambda x: x.unflatten(-1, (4, 6)).transpose(1, 2)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x):
        q, k, v = (self.split(w(x)) for w in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return (q @ k.mT / 6**0.5).softmax(dim=-1) @ v


class CountedWrongly(Counted):
    """Wrong scale: 1 / sqrt(num_heads * head_dim)."""

    def attend(self, q, k, v):
        return (q @ k.mT / 24**0.5).softmax(dim=-1) @ v


NAMES = ["num_head", "n_local_heads", "nheads", "heads", "num_attn_heads", "encoder_heads"]


@pytest.mark.parametrize("name", [*NAMES, ""])
def test_num_heads_under_any_name_is_found(name):
    only = ["output_matches_reference"]
    report = ph.check.check_module(Counted(name), only=only)
    assert report.count(ph.check.Outcome.HOLDS) == 1, report
    how = f"attribute {name}" if name else "its softmax has 4 rows per token"
    assert report.facts["num_heads"] == f"4 ({how})"
    assert ph.check.check_module(CountedWrongly(name), only=only).exit_code == 1


@pytest.mark.parametrize("name", ["head_dim", "heads_per_group", "num_kv_heads", "head_dropout"])
def test_other_head_attributes_are_not_num_heads(name):
    module = Counted("")
    setattr(module, name, 3)
    report = ph.check.check_module(module, only=["output_is_finite"])
    assert report.facts["num_heads"] == "4 (its softmax has 4 rows per token)"
