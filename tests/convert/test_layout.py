"""Rows of fused weights: their heads, in both directions, and shapes that do not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.convert.layout import (
    Layout,
    Sizes,
    blocks,
    by_group,
    by_head,
    linear,
    parameter,
    thirds,
)
from polyhead.errors import ArgumentError, ConversionError

OURS = ("W_query", "W_key", "W_value")


def owners(rows, H, G):
    """The projection and head of each block of rows, in order: literal, not computed."""
    group = H // G
    if rows is by_head:
        return [(name, h) for h in range(H) for name in OURS]
    if rows is by_group:
        heads = [[("W_query", g * group + i) for i in range(group)] for g in range(G)]
        return [owner for g in range(G) for owner in (*heads[g], ("W_key", g), ("W_value", g))]
    return [
        *[("W_query", h) for h in range(H)],
        *[("W_key", g) for g in range(G)],
        *[("W_value", g) for g in range(G)],
    ]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([thirds, blocks, by_head, by_group]),
    st.sampled_from([1, 2, 3, 7]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([1, 3, 11]),
    st.booleans(),
    st.booleans(),
)
def test_rule_rows_go_to_their_head_and_back(rows, G, group, D, d_in, bias, transposed):
    if rows in (thirds, by_head):
        group = 1
    H = G * group
    layout = Layout("test", linear("qkv", *OURS, rows=rows, transposed=transposed))
    whose = owners(rows, H, G)
    weight = torch.arange(len(whose) * D * d_in).view(-1, d_in)
    theirs = {"qkv.weight": weight.T.contiguous() if transposed else weight}
    if bias:
        theirs["qkv.bias"] = torch.arange(len(whose) * D)
    ours = layout.to_ours(theirs, Sizes(H, G))
    assert set(ours) == {f"{name}.{kind[4:]}" for name in OURS for kind in theirs}
    for block, (name, head) in enumerate(whose):
        mine, place = slice(head * D, (head + 1) * D), slice(block * D, (block + 1) * D)
        assert torch.equal(ours[f"{name}.weight"][mine], weight[place])
        if bias:
            assert torch.equal(ours[f"{name}.bias"][mine], theirs["qkv.bias"][place])
    assert all(tensor.is_contiguous() for tensor in ours.values())
    memory = {tensor.untyped_storage().data_ptr() for tensor in (*ours.values(), *theirs.values())}
    assert len(memory) == len(ours) + len(theirs)
    back = layout.to_theirs(ours, Sizes(H, G))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


LAYOUT = Layout(
    "test",
    linear("qkv", *OURS, rows=by_group),
    linear("out", "out_proj"),
    parameter("sinks", required=False),
    unmovable=("bias_k",),
)
OUT = {"out.weight": torch.zeros(3, 4)}


@pytest.mark.parametrize(
    ("rows", "sizes", "message"),
    [
        (12, Sizes(), r"num_heads must be known .*got None; pass num_heads="),
        (12, Sizes(4), r"num_kv_heads must be known .*got None; pass num_kv_heads="),
        (12, Sizes(None, 2), r"num_heads must be known"),
        (12, Sizes(4, 3), r"num_kv_heads must divide num_heads = 4; got 3"),
        (13, Sizes(4, 2), r"2 x \(2 \+ 1 \+ 1\) heads .*got qkv.weight \(13, 5\); check num_heads"),
        (0, Sizes(4, 2), r"got qkv.weight \(0, 5\)"),
    ],
)
def test_rule_rows_that_heads_do_not_divide_raise(rows, sizes, message):
    with pytest.raises(ConversionError, match=message):
        LAYOUT.to_ours({"qkv.weight": torch.zeros(rows, 5), **OUT}, sizes)


@pytest.mark.parametrize("number", [0, -2, 2.0, True])
def test_sizes_below_1_raise(number):
    with pytest.raises(ArgumentError, match=rf"num_heads must be .*at least 1; got {number}"):
        Sizes(number)


def test_rule_tensor_without_rows_raises():
    with pytest.raises(ConversionError, match=r"got qkv.weight \(\)"):
        LAYOUT.to_ours({"qkv.weight": torch.zeros(()), **OUT}, Sizes(4, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_key.weight": torch.zeros(6, 5)}, r"got W_query.weight \(16, 5\), W_key.weight \(6, 5"),
        ({"W_query.weight": torch.zeros(8, 5)}, r"got W_query.weight \(8, 5\)"),
        ({"W_key.weight": torch.zeros(8, 4)}, r"W_key.weight \(8, 4\)"),
        ({"W_key.weight": torch.zeros(8, 5, dtype=torch.half)}, r"alike of W_query.weight, W_key"),
        ({"W_key.weight": torch.zeros(())}, r"W_key.weight \(\)"),
        (
            {"W_query.bias": torch.zeros(16)},
            r"W_query.bias, W_key.bias, .* must all exist to become",
        ),
        (
            {"W_key.weight": torch.zeros(8, 5, requires_grad=True)},
            r"must all require grad, or none,",
        ),
        ({"q_norm.weight": torch.zeros(4)}, r"no place for q_norm.weight; it holds W_key.bias, "),
    ],
)
def test_layout_tensors_that_cannot_fuse_raise(change, message):
    ours = {
        "W_query.weight": torch.zeros(16, 5),
        "W_key.weight": torch.zeros(8, 5),
        "W_value.weight": torch.zeros(8, 5),
        "out_proj.weight": torch.zeros(3, 4),
    }
    assert LAYOUT.to_theirs(ours, Sizes(4, 2))["qkv.weight"].shape == (32, 5)
    with pytest.raises(ConversionError, match=message):
        LAYOUT.to_theirs({**ours, **change}, Sizes(4, 2))


def test_layout_missing_and_unknown_tensors_are_named():
    fused = {"qkv.weight": torch.zeros(32, 5)}
    message = r"needs out.weight, qkv.weight; out.weight cannot be found"
    with pytest.raises(ConversionError, match=message):
        LAYOUT.to_ours(fused, Sizes(4, 2))
    for name in ("bias_k", "lora_A"):
        with pytest.raises(ConversionError, match=f"layout test has no place for {name}; it holds"):
            LAYOUT.to_ours({**fused, **OUT, name: torch.zeros(3)}, Sizes(4, 2))
    assert LAYOUT.owns("bias_k")
    assert not LAYOUT.owns("lora_A")


def test_layout_requires_grad_is_kept():
    theirs = {"qkv.weight": torch.zeros(32, 5, requires_grad=True), **OUT}
    ours = LAYOUT.to_ours(theirs, Sizes(4, 2))
    assert {name for name, tensor in ours.items() if tensor.requires_grad} == {
        f"{name}.weight" for name in OURS
    }
    assert all(tensor.is_leaf for tensor in ours.values())
    back = LAYOUT.to_theirs(ours, Sizes(4, 2))
    assert back["qkv.weight"].requires_grad
    assert not back["out.weight"].requires_grad


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, Sizes(6, 2)),
        ({"n_head": 6}, Sizes(6, 6)),
        ({"num_heads": 6, "num_key_value_heads": None}, Sizes(6, 6)),
        ({"num_attention_heads": 6, "qk_nope_head_dim": 5, "v_head_dim": 7}, Sizes(6, 6, 5, 7)),
        ({}, Sizes()),
    ],
)
def test_layout_sizes_are_read_from_config(config, sizes):
    assert LAYOUT.sizes(config) == sizes
