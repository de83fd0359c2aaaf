"""Nested tensors through the drop-in: each batch row is a row alone."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, ShapeError

WIDTH = 24

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@pytest.fixture
def attend():
    torch.manual_seed(7)
    return ph.drop_in.MultiheadAttention(WIDTH, 4, batch_first=True)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_nested_rows_are_rows_alone(layout, is_causal, attend):
    rows = [torch.randn(n, WIDTH, requires_grad=True) for n in (4, 6, 1)]
    x = torch.nested.as_nested_tensor(rows, layout=layout)
    y, weights = attend(x, x, x, need_weights=False, is_causal=is_causal)
    assert weights is None
    assert y.layout == layout
    for row, got in zip(rows, y.unbind(), strict=True):
        want, _ = attend(row, row, row, is_causal=is_causal)
        torch.testing.assert_close(got, want)
    total = sum(part.square().sum() for part in y.unbind())
    assert all(gradient.any() for gradient in torch.autograd.grad(total, rows))


def test_nested_queries_have_their_own_lengths(attend):
    queries, keys = ([torch.randn(n, WIDTH) for n in lengths] for lengths in ((2, 5), (7, 3)))
    query, key = (
        torch.nested.as_nested_tensor(rows, layout=torch.jagged) for rows in (queries, keys)
    )
    y, _ = attend(query, key, key, need_weights=False)
    for row, memory, got in zip(queries, keys, y.unbind(), strict=True):
        torch.testing.assert_close(got, attend(row, memory, memory)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, ArgumentError, "need_weights must be False for nested tensors; got True; pad"),
        (
            {"need_weights": False, "key_padding_mask": torch.zeros(2, 3, dtype=torch.bool)},
            ArgumentError,
            "attn_mask, key_padding_mask must be None for nested",
        ),
        (
            {"need_weights": False, "key": torch.ones(2, 3, WIDTH)},
            ArgumentError,
            "must all be nested, or none",
        ),
        (
            {
                "need_weights": False,
                "key": torch.nested.as_nested_tensor([torch.ones(3, WIDTH)], layout=torch.jagged),
            },
            ShapeError,
            r"must have the same batch rows; got \[2, 1, 2\]",
        ),
    ],
)
def test_nested_tensors_are_refused_what_they_cannot_have(change, error, message, attend):
    x = torch.nested.as_nested_tensor([torch.ones(2, WIDTH)] * 2, layout=torch.jagged)
    with pytest.raises(error, match=message):
        attend(**({"query": x, "key": x, "value": x} | change))


def test_nested_tensors_have_their_batch_first():
    x = torch.nested.as_nested_tensor([torch.ones(2, WIDTH)] * 2, layout=torch.jagged)
    with pytest.raises(ArgumentError, match="batch_first must be True for nested tensors"):
        ph.drop_in.MultiheadAttention(WIDTH, 4)(x, x, x, need_weights=False)
