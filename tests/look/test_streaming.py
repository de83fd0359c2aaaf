"""Streamed sums over keys, in chunks or by a kernel, against the reference's weights."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from polyhead.call import AuxRequest
from polyhead.look import streaming as sums
from polyhead.validate import build_call

SIZES = [(7, 7), (3, 7), (11, 7), (1, 7), (257, 257)]


def call_of(example):
    return build_call(example.query, example.key, example.key, **example.options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("T", "S"), SIZES)
def test_weight_mass_of_a_key_range_matches_reference(example, tolerance, mask, T, S, dtype):
    one = example(T, S, mask, dtype=dtype)
    call = call_of(one)
    totals = sums.total_logsumexp(call, sums.key_logsumexp(call))
    for first, last in ((0, S), (0, 3), (2, 5), (S - 1, S)):
        got = sums.weight_mass(sums.key_logsumexp(call, (first, last)), totals)
        want = one.weights[..., first:last].sum(dim=-1)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance(one.lse, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_key_logsumexp_matches_reference_for_every_option(example, tolerance, options, dtype):
    one = example(5, 9, options=options, dtype=dtype)
    call = call_of(one)
    lse = sums.key_logsumexp(call)
    torch.testing.assert_close(lse.double(), one.lse, rtol=0, atol=tolerance(one.lse, dtype))
    got = sums.weight_mass(sums.key_logsumexp(call, (2, 6)), sums.total_logsumexp(call, lse))
    want = one.weights[..., 2:6].sum(dim=-1)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance(one.lse, dtype))


@pytest.mark.parametrize("cells", [1, 2 * 6 * 7 * 2, 10**9])
@pytest.mark.parametrize(("T", "S"), SIZES[:4])
def test_stream_aux_in_chunks_matches_reference(monkeypatch, example, mask, T, S, cells):
    monkeypatch.setattr(sums, "_CELLS", cells)
    one = example(T, S, mask)
    request = AuxRequest(lse=True, stats=True)
    got = sums.stream_aux(call_of(one), request)
    _, want = ph.attention(one.query, one.key, one.key, **one.options, return_aux=request)
    torch.testing.assert_close(got.lse, want.lse, rtol=0, atol=1e-12)
    for name, values in want.stats.tensors.items():
        torch.testing.assert_close(getattr(got.stats, name), values, rtol=0, atol=1e-12, msg=name)


def test_stream_aux_uses_the_kernel_if_eligible(monkeypatch, example):
    def refuse(*args, **options):
        raise AssertionError("the reference ran")

    call = call_of(example(5, 9, dtype=torch.float32))
    if ph.explain(call.query, call.key, call.key).chosen != "cpu":
        pytest.skip("the kernels are not built")
    monkeypatch.setattr(sums, "compute_aux", refuse)
    sums.key_logsumexp(call, (2, 5))
    with ph.use_backend("sdpa"), pytest.raises(AssertionError, match="the reference ran"):
        sums.key_logsumexp(call, (2, 5))


def test_stream_aux_reference_ignores_autocast(example):
    one = example(17, 17, mask="custom", dtype=torch.float32)
    alone = sums.key_logsumexp(call_of(one))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sums.key_logsumexp(call_of(one)), alone)


def test_stream_aux_scores_only_the_masks_key_range(tensor_sizes):
    T = 512
    query = torch.randn(1, 2, T, 8, dtype=torch.float64)
    call = build_call(query, query, query, ph.mask.causal() & ph.mask.window(before=3))
    with tensor_sizes:
        sums.key_logsumexp(call, (0, 40))
    assert tensor_sizes.largest <= 2 * T * 40
