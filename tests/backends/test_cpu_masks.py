"""The C++ kernels under every mask, against the float64 oracle and what the mask writes out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.backends import cpu
from polyhead.validate import build_call

pytestmark = pytest.mark.usefixtures("kernels")


def masks(T, S):
    causal, window = ph.mask.causal(), ph.mask.window
    documents = torch.arange(S) // 7
    scattered = torch.arange(2 * S).view(2, S) * 5 % 3
    by_head = torch.rand(2, 6, T, S, generator=torch.Generator().manual_seed(3)) < 0.5
    return {
        "causal": causal,
        "causal from the start": ph.mask.causal(align="start"),
        "window": window(before=3, after=5),
        "window from the start": window(before=3, after=5, align="start"),
        "causal window": causal & window(before=4),
        "lengths": ph.mask.lengths([S - 2, 0]),
        "two lengths": ph.mask.lengths([S - 2, 5]) & ph.mask.lengths(torch.tensor([3, S]).int()),
        "padding": causal & ph.mask.left_padding([0, 4]),
        "documents": causal & ph.mask.documents(documents),
        "scattered documents": causal & ph.mask.documents(scattered),
        "prefix": ph.mask.prefix(5),
        "causal or prefix": (causal | ph.mask.prefix(9)) & window(before=20, after=2),
        "rows": (causal & window(before=6)).for_queries(2, 2 + T, T + 3),
        "rows from the start": ph.mask.causal(align="start").for_queries(2, 2 + T, T + 3),
        "rows of rows": causal.for_queries(3, T + 4, T + 5).for_queries(1, T + 1, T + 1),
        "rows of documents": ph.mask.documents(documents).for_queries(0, T, S),
        "dense": ph.mask.dense(by_head[0, 0]),
        "dense by head": ph.mask.dense(by_head) & causal,
        "dense by key": ph.mask.dense(by_head[:, :1, :1]),
        "dense by query": ph.mask.dense(by_head[..., :1]),
        "not, or": ~window(before=3) | ph.mask.prefix(2),
    }


@pytest.mark.parametrize("T", [3, 37])
@pytest.mark.parametrize("kind", masks(1, 70))
def test_masks(tensors, assert_agrees, isa, kind, T):
    S = 300 if T > 16 else 70
    inputs = tensors(T=T, S=S, D=8)
    mask = masks(T, S)[kind]
    assert_agrees(inputs, mask=mask)


def test_masks_with_structure_are_not_materialized(tensors):
    materialized = {
        kind
        for kind, mask in masks(5, 70).items()
        if any(
            "materialized" in note for note in cpu.notes(build_call(*tensors(T=5, S=70), mask=mask))
        )
    }
    expected = {"dense", "dense by head", "dense by key", "dense by query"}
    assert materialized == {*expected, "not, or", "rows of documents"}


def test_a_dense_mask_is_read_in_place(tensors, tensor_sizes):
    T, S = 64, 96
    inputs = tensors(B=2, H=8, G=2, T=T, S=S)
    mask, bias = ph.mask.dense(torch.ones(T, S, dtype=torch.bool)), torch.zeros(S)
    with tensor_sizes:
        cpu.run(build_call(*inputs, mask=mask, bias=bias))
    assert set(tensor_sizes.operations) <= {"alias", "attention_output"}
    assert tensor_sizes.largest <= 2 * 8 * T * 24


@st.composite
def any_mask(draw):
    """An `&` of rules in any number, on sizes that divide nothing."""
    T, S = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    number = st.integers(0, 45)
    ends = st.sampled_from(["end", "start"])
    rules = st.one_of(
        st.builds(lambda align: ph.mask.causal(align=align), ends),
        st.builds(lambda b, a, e: ph.mask.window(before=b, after=a, align=e), number, number, ends),
        st.builds(ph.mask.prefix, number),
        st.builds(lambda a, b: ph.mask.lengths([a, b]), number, number),
        st.builds(lambda a, b: ph.mask.left_padding([a, b]), number, number),
        st.builds(lambda n, e: ph.mask.causal(align=e) | ph.mask.prefix(n), number, ends),
    )
    mask = draw(rules)
    for rule in draw(st.lists(rules, max_size=3)):
        mask = mask & rule
    return T, S, mask


@settings(deadline=None, max_examples=150)
@given(any_mask())
def test_any_conjunction_of_rules_is_its_written_out_self(tensors, case):
    T, S, mask = case
    inputs = tensors(H=2, G=1, T=T, S=S, D=8)
    allowed = mask.materialize(T, S).expand(2, 1, T, S)
    request = ph.AuxRequest(lse=True)
    output, aux = ph.attention(*inputs, mask=mask, backend="cpu", return_aux=request)
    want, want_aux = ph.attention(
        *inputs, mask=ph.mask.dense(allowed), backend="reference", return_aux=request
    )
    torch.testing.assert_close(output, want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(aux.lse, want_aux.lse, rtol=1e-5, atol=2e-6)
