"""Under autocast a module does what it does when cast by hand; its parameters stay as they are."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph

pytestmark = pytest.mark.filterwarnings(
    # torch's own: its RMSNorm is slower where autocast makes its input another dtype.
    "ignore:Mismatch dtype between input and weight:UserWarning"
)


def cast(inputs, dtype):
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def test_autocast_is_casting_by_hand(variant, eager, assert_as_good_as_eager):
    module, inputs = variant.build(), variant.inputs(17)
    rounded = variant.build(dtype=torch.bfloat16, backend=eager)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(**inputs)
    with torch.no_grad():
        by_hand = rounded(**cast(inputs, torch.bfloat16))
        exact = module.double()(**cast(inputs, torch.float64))
    assert got.dtype == torch.bfloat16
    assert_as_good_as_eager(got, by_hand, exact)


def test_autocast_trains_float32_parameters(variant):
    module, inputs = variant.build(), variant.inputs(17)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(**inputs).float().square().mean()
    loss.backward()
    want = variant.build()
    want(**inputs).square().mean().backward()
    largest = max(p.grad.abs().max() for p in want.parameters())
    for (name, p), q in zip(module.named_parameters(), want.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32, name
        # Far below what a gradient lost on the way would leave: bfloat16 keeps 8 bits.
        assert (p.grad - q.grad).abs().max() < 0.05 * largest, name


@pytest.mark.parametrize("variant", ["grouped", "softcap"], indirect=True)
def test_autocast_leaves_float64_and_a_nested_region_alone(variant):
    module, inputs = variant.build(), variant.inputs(5)
    want = module(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(module(**inputs), want)
    query = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ph.attention(query, query, query).dtype == torch.float64
