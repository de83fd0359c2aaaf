"""Primitive masks against their documentation: drawings, repr, equality."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from polyhead.mask import (
    causal,
    cu_seqlens,
    custom,
    dense,
    documents,
    left_padding,
    lengths,
    prefix,
    window,
)


def striped(batch, head, query, key):
    return (query + key) % 2 == 0


def test_causal_and_window_before_511_allows_512_keys():
    keys = (causal() & window(before=511)).materialize(1000, 1000).sum(dim=-1)
    assert keys.tolist() == [min(t + 1, 512) for t in range(1000)]


def test_window_allows_before_itself_and_after():
    keys = window(before=3, after=2).materialize(20, 20).sum(dim=-1).tolist()
    assert keys == [3, 4, 5, *[6] * 15, 5, 4]


@pytest.mark.parametrize(
    ("T", "S", "end", "start"),
    [
        (3, 5, "x x x . .\nx x x x .\nx x x x x", "x . . . .\nx x . . .\nx x x . ."),
        (4, 2, ". .\n. .\nx .\nx x", "x .\nx x\nx x\nx x"),
    ],
)
def test_draw_of_causal_matches_its_docstring(T, S, end, start):
    assert causal().draw(T, S) == end
    assert causal(align="start").draw(T, S) == start


@pytest.mark.parametrize(
    ("mask", "rows"),
    [
        (window(before=1), ["xxxxx", "xxxxx", ".xxxx", "..xxx", "...xx"]),
        (window(before=1, after=1), ["xx...", "xxx..", ".xxx.", "..xxx", "...xx"]),
        (causal() & window(before=1), ["x....", "xx...", ".xx..", "..xx.", "...xx"]),
        (left_padding([2]), ["..xxx"] * 5),
        (causal() & left_padding([2]), [".....", ".....", "..x..", "..xx.", "..xxx"]),
        (prefix(2), ["xx..."] * 5),
        (causal() | prefix(2), ["xx...", "xx...", "xxx..", "xxxx.", "xxxxx"]),
        (documents([0, 0, 1, 1, 1]), ["xx...", "xx...", "..xxx", "..xxx", "..xxx"]),
        (causal() & documents([0, 0, 1, 1, 1]), ["x....", "xx...", "..x..", "..xx.", "..xxx"]),
    ],
)
def test_draw_of_primitives_matches_their_docstrings(mask, rows):
    assert mask.draw(5, 5) == "\n".join(" ".join(row) for row in rows)


def test_cu_seqlens_equal_documents():
    assert cu_seqlens([0, 2, 5]) == documents([0, 0, 1, 1, 1])
    assert cu_seqlens([0, 0, 3, 3]) == documents([1, 1, 1])
    assert cu_seqlens(torch.tensor([0, 2, 5], dtype=torch.int32)) == cu_seqlens([0, 2, 5])
    assert cu_seqlens([0]).materialize(0, 0).shape == (0, 0)


def test_draw_selects_one_batch_row_and_head():
    assert lengths([3, 5]).draw(2, 5) == "x x x . .\nx x x . ."
    assert lengths([3, 5]).draw(1, 5, batch=1) == "x x x x x"
    by_head = dense(torch.tensor([[[[True]], [[False]]]]))
    assert by_head.draw(1, 2) == "x x"
    assert by_head.draw(1, 2, head=1, batch=7) == ". ."


def test_str_is_the_expression_and_a_drawing():
    mask = dense(torch.tensor([[True, False], [True, True]]))
    assert str(mask) == "dense(2x2)\nx .\nx x"
    assert str(causal()) == "causal()\n" + causal().draw(8, 8)


@pytest.mark.parametrize(
    ("mask", "T", "S"),
    [
        (dense(torch.ones(3, 5, dtype=torch.bool)) & lengths([2]), 3, 5),
        (causal() | dense(torch.ones(1, 1, 3, 5, dtype=torch.bool)), 3, 5),
        (dense(torch.ones(3, 5, dtype=torch.bool)) & dense(torch.ones(1, 5).bool()), 3, 5),
        (~dense(torch.ones(3, 1, dtype=torch.bool)), 3, 8),
        (dense(torch.ones(3, 5, dtype=torch.bool)).for_queries(1, 3, 3), 2, 5),
        (causal().for_queries(12, 16, 16), 4, 16),
        (lengths([3, 5]), 8, 8),
        (documents([0, 0, 1]), 3, 3),
        (causal() & documents([0, 0, 1]), 3, 3),
        (documents([0, 0, 1]) & dense(torch.ones(2, 3, dtype=torch.bool)), 2, 3),
    ],
)
def test_str_of_fixed_size_parts_draws_a_size_that_fits(mask, T, S):
    assert str(mask) == f"{mask!r}\n{mask.draw(T, S)}"


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (causal(), "causal()"),
        (causal(align="start"), 'causal(align="start")'),
        (window(before=2), "window(before=2)"),
        (window(after=0), "window(after=0)"),
        (window(2, 1, align="start"), 'window(before=2, after=1, align="start")'),
        (lengths([3, 0]), "lengths([3, 0])"),
        (lengths(range(9)), "lengths(<9 entries>)"),
        (lengths(torch.ones(2, dtype=torch.long, device="meta")), "lengths(<2 entries>)"),
        (left_padding([3, 0]), "left_padding([3, 0])"),
        (causal() | prefix(2), "causal() | prefix(2)"),
        (documents([0, 0, 1]), "documents([0, 0, 1])"),
        (documents(torch.zeros(2, 5, dtype=torch.long)), "documents(2x5)"),
        (cu_seqlens([0, 1, 3]), "documents([0, 1, 1])"),
        (dense(torch.ones(2, 1, 3, 4, dtype=torch.bool)), "dense(2x1x3x4)"),
        (causal() & ~window(after=1), "causal() & ~window(after=1)"),
        (
            causal() & (lengths([1]) | window(after=1)),
            "causal() & (lengths([1]) | window(after=1))",
        ),
        (~(causal() & lengths([1])), "~(causal() & lengths([1]))"),
        ((causal() & lengths([1])) | causal(), "(causal() & lengths([1])) | causal()"),
        (causal().for_queries(1, 2, 4), "causal().for_queries(1, 2, 4)"),
        (
            (causal() | lengths([1])).for_queries(0, 2, 4),
            "(causal() | lengths([1])).for_queries(0, 2, 4)",
        ),
        (custom(striped), "custom(striped)"),
        (causal("start").for_keys(2, 7), 'causal(align="start").for_keys(2, 7)'),
        (
            (causal() & lengths([3]) & left_padding([3]) & prefix(4)).for_keys(2, 7),
            "causal() & lengths([1]) & left_padding([1]) & prefix(2)",
        ),
        (prefix(1).for_keys(2, 7), "prefix(0)"),
        (documents([0, 0, 1]).for_keys(1, 3), "documents([0, 1])"),
        (custom(striped).for_keys(0, 7), "custom(striped)"),
    ],
)
def test_repr_is_the_expression(mask, text):
    assert repr(mask) == text


def test_masks_compare_and_hash_by_value():
    assert causal() == causal(align="end") != causal(align="start")
    assert window(before=1) != window(after=1)
    assert window(before=1, after=0) != causal() & window(before=1)
    assert causal() & window(before=1) != causal() | window(before=1)
    assert lengths([1, 2]) == lengths(torch.tensor([1, 2])) != lengths([1, 3])
    assert lengths([1]) != lengths(torch.tensor([1], dtype=torch.int32))
    assert dense(torch.tensor([[True]])) != dense(torch.tensor([[False]]))
    assert causal() != "causal()"
    assert len({causal(), causal(), window(1), lengths([1, 2]), lengths([1, 2])}) == 3
    with pytest.raises(AttributeError):
        causal().align = "start"


def test_materialize_device_is_the_requested_one():
    assert (causal() & window(before=2)).materialize(2, 3, device="meta").is_meta


def test_all_names_exist_in_the_module():
    for name in ph.mask.__all__:
        assert hasattr(ph.mask, name)


@pytest.mark.parametrize("build", [ph.mask.lengths, ph.mask.left_padding, ph.mask.documents])
def test_empty_list_builds_an_empty_integer_mask(build):
    assert build([]).materialize(0, 0).numel() == 0
