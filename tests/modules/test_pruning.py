"""Pruned heads: the function of heads that give zeros, with smaller weights."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import polyhead as ph
from polyhead.errors import ArgumentError
from polyhead.modules.pruning import kept_heads

SIZES = {"head_dim": 4, "value_head_dim": 3}
VARIANTS = {
    "plain": {},
    "bias": {"qkv_bias": True},
    "sinks, gate, norms": {
        "sinks": True,
        "output_gate": True,
        "qk_norm": functools.partial(torch.nn.RMSNorm, eps=1e-6),
        "rope": ph.Rope(),
    },
}


def module(num_heads, num_kv_heads, **options):
    torch.manual_seed(0)
    groups = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    mha = ph.MultiHeadAttention(12, 10, 64, 0.0, **groups, **SIZES, **options)
    if mha.sinks is not None:
        torch.nn.init.normal_(mha.sinks)
    return mha


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    ("G", "heads", "left"),
    [(6, {0, 3, 4}, (3, 3)), (2, {0, 1, 2}, (3, 1)), (2, {1, 5}, (4, 2)), (1, {2}, (5, 1))],
)
@pytest.mark.parametrize("fused", [False, True])
def test_the_function_of_heads_that_give_zeros(G, heads, left, options, fused):
    mha, x = module(6, G, **options), torch.randn(2, 7, 12)
    with ph.look.ablate(mha, {(0, head) for head in heads}):
        want = mha(x)
    before = sum(p.numel() for p in mha.parameters())
    mha = mha.fuse() if fused else mha
    assert mha.prune_heads(heads) is mha
    assert mha.fused == fused
    assert (mha.num_heads, mha.num_kv_heads) == left
    assert sum(p.numel() for p in mha.parameters()) < before
    torch.testing.assert_close(mha(x), want)


def test_saved_and_loaded():
    mha, x = module(6, 2).prune_heads([0, 1, 2]), torch.randn(2, 7, 12)
    built = module(mha.num_heads, mha.num_kv_heads)
    built.load_state_dict(mha.state_dict())
    pruned = module(6, 2).prune_heads([0, 1, 2])
    torch.nn.init.zeros_(pruned.W_value.weight)
    pruned.load_state_dict(mha.state_dict())
    assert torch.equal(built(x), mha(x))
    assert torch.equal(pruned(x), mha(x))


def test_with_a_cache_and_in_training():
    mha, x = module(6, 2, rope=ph.Rope()).prune_heads([0, 3]), torch.randn(1, 7, 12)
    with torch.no_grad():
        cache = mha.make_cache(batch=1)
        steps = torch.cat([mha(x[:, :4], cache=cache), mha(x[:, 4:], cache=cache)], dim=1)
        torch.testing.assert_close(steps, mha(x))
    mha(x).sum().backward()
    assert all(parameter.grad is not None for parameter in mha.parameters())


def test_frozen_weights_stay_frozen():
    mha = module(6, 2)
    mha.W_key.requires_grad_(False)
    mha.prune_heads([0, 3])
    assert not mha.W_key.weight.requires_grad
    assert mha.W_query.weight.requires_grad


def test_uneven_groups_are_refused_or_repeated():
    mha, x = module(6, 2), torch.randn(2, 7, 12)
    message = (
        "heads must leave as many query heads to each key head that stays; got [2, 3] for key heads"
        " 0 to 1; remove as many of each group or whole groups, or pass repeat_keys=True"
    )
    with pytest.raises(ArgumentError, match=re.escape(message)):
        mha.prune_heads([1])
    with ph.look.ablate(mha, {(0, 1)}):
        want = mha(x)
    mha.prune_heads([1], repeat_keys=True)
    assert (mha.num_heads, mha.num_kv_heads) == (5, 5)
    torch.testing.assert_close(mha(x), want)


@given(data=st.data(), G=st.integers(1, 4), group=st.integers(1, 4))
def test_every_head_that_stays_reads_the_key_head_it_read(data, G, group):
    H = G * group
    gone = data.draw(st.sets(st.integers(0, H - 1), max_size=H - 1))
    kept = kept_heads(H, G, gone, repeat_keys=True)
    assert kept.queries == [head for head in range(H) if head not in gone]
    assert len(kept.queries) % len(kept.keys) == 0
    new_group = len(kept.queries) // len(kept.keys)
    for number, head in enumerate(kept.queries):
        assert kept.keys[number // new_group] == head // group
    if gone == set():
        assert kept.keys == list(range(G))  # nothing is repeated without need


@pytest.mark.parametrize(
    ("options", "heads", "message"),
    [
        ({}, {0, 6}, "heads must be from 0 to 5; got 6; count query heads"),
        ({}, [0, "1"], "heads must be from 0 to 5; got '1'; count query heads"),
        ({}, [0.5], "heads must be from 0 to 5; got 0.5; count query heads"),
        ({}, set(range(6)), "heads must leave one; got all 6; keep a head"),
        ({"alibi": True}, {0}, "cannot keep the slopes of the heads that stay; got alibi=True"),
    ],
)
def test_what_cannot_be_pruned(options, heads, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        module(6, 6, **options).prune_heads(heads)


def test_heads_are_looked_at_once():
    mha, x = module(6, 6), torch.randn(2, 5, 12)
    pruned = copy.deepcopy(mha).prune_heads(head for head in (4, 1))
    assert pruned.num_heads == 4
    assert torch.equal(pruned(x), mha.prune_heads(torch.tensor([1, 4, 4]))(x))


def test_without_a_projection_or_with_an_adapter():
    lecture = ph.MultiHeadAttention(12, 12, 64, 0.0, num_heads=6, out_proj=False)
    with pytest.raises(ArgumentError, match=r"prune_heads\(\) needs an output projection"):
        lecture.prune_heads([0])
    adapted = module(6, 6)
    adapted.W_key = torch.nn.Sequential(adapted.W_key)
    with pytest.raises(ArgumentError, match=r"W_key to be a plain nn\.Linear.*got .*Sequential"):
        adapted.prune_heads([0])
