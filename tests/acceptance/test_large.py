"""Backend `cpu` beyond 2^31 elements. Memory that is not written to costs nothing but addresses."""

from __future__ import annotations

import itertools

import pytest
import torch

import polyhead as ph
from polyhead.cache_view import CacheView

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kernels")]
BEYOND = 2**31


def spread(x, axis):
    """The same numbers, the last along `axis` more than 2^31 elements after the first."""
    stride = BEYOND // (x.shape[axis] - 1) + 64
    strides = list(x.stride())
    strides[axis] = stride
    memory = torch.empty(sum((n - 1) * s for n, s in zip(x.shape, strides)) + 1, dtype=x.dtype)  # noqa: B905
    assert memory.numel() > BEYOND
    view = memory.as_strided(x.shape, strides)
    view.copy_(x)
    return view


def inputs(T=40, S=70, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 4, T, 24), (2, 2, S, 24), (2, 2, S, 16)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("T", [2, 40])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_inputs_spread_over_more(which, axis, T):
    tensors = inputs(T)
    tensors_apart = [spread(x, axis) if i == which else x for i, x in enumerate(tensors)]
    results = []
    for given in (tensors, tensors_apart):
        leaves = [x.detach().requires_grad_() for x in given]
        inferred = ph.attention(*given, mask=ph.mask.causal(), backend="cpu")
        output = ph.attention(*leaves, mask=ph.mask.causal(), backend="cpu")
        results.append([inferred, output, *torch.autograd.grad(output.sum(), leaves)])
    assert all(itertools.starmap(torch.equal, zip(*results, strict=True)))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_bias_and_mask_spread_over_more(axis):
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(2, 4, 40, 70, generator=generator).bfloat16()
    allowed = torch.rand(2, 4, 40, 70, generator=generator) < 0.5
    want, got = (
        ph.attention(*inputs(), bias=numbers, mask=ph.mask.dense(bools), backend="cpu")
        for numbers, bools in ((bias, allowed), (spread(bias, axis), spread(allowed, axis)))
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("T", [2, 40])
def test_a_pool_of_more(T):
    query, key, value = inputs(T, dtype=torch.float32)
    cache = ph.PagedKVCache(2, 70, 2, 24, value_head_dim=16, storage_dtype=torch.int8)
    cache.append(key, value)
    parts = cache.read_as_views()
    apart = [
        CacheView(spread(x.data, 0), x.dtype, x.tokens, x.gather, spread(x.scales, 0), x.table)
        for x in parts
    ]
    want, got = (ph.attention(query, *given, backend="cpu") for given in (parts, apart))
    assert torch.equal(got, want)


def test_an_output_of_more():
    """4 GiB that are written to. Every query is the same, and so is every output."""
    T, E = BEYOND // 512 + 100, 512
    query, key = torch.ones(1, 1, 1, 8).bfloat16().expand(1, 1, T, 8), torch.randn(1, 1, 3, 8)
    value = torch.randn(1, 1, 3, E).bfloat16()
    output = ph.attention(query, key.bfloat16(), value, backend="cpu")
    assert output.numel() > BEYOND
    assert torch.equal(output[0, 0, -1], output[0, 0, 0])
    some = output[0, 0, :: T // 1000]
    assert torch.equal(some, output[0, 0, :1].expand_as(some))
