"""Length-dependent RoPE scalings: at the border of the trained context, and their errors."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.errors import ArgumentError, ShapeError
from polyhead.positions import DynamicNTKScaling, LongRopeScaling, NTKScaling

D = 8


@given(st.integers(2, 5000), st.floats(0.1, 100.0), st.integers(1, 31))
@settings(max_examples=100, deadline=None)
def test_dynamic_is_plain_rope_up_to_its_context(context, factor, T):
    x, positions = torch.ones(1, 1, T, D), torch.arange(context - T, context).clamp(min=0)
    dynamic = ph.Rope(scaling=DynamicNTKScaling(factor, context))
    assert torch.equal(dynamic(x, positions), ph.Rope()(x, positions))


@pytest.mark.parametrize("reach", [33, 64, 1000])
def test_dynamic_is_ntk_scaling_by_its_stretch(reach):
    x, positions = torch.randn(1, 2, 5, D, dtype=torch.float64), torch.arange(reach - 5, reach)
    got = ph.Rope(scaling=DynamicNTKScaling(2.5, 32))(x, positions)
    want = ph.Rope(scaling=NTKScaling(2.5 * reach / 32 - 1.5))(x, positions)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


LONGROPE = LongRopeScaling(3.0, 32, (1.0, 1.1, 1.2, 1.3), (1.0, 2.0, 4.0, 8.0))


@pytest.mark.parametrize(("reach", "divisors"), [(32, (1.0, 1.1, 1.2, 1.3)), (33, (1, 2, 4, 8))])
def test_longrope_divides_each_pair_by_its_own_divisor(reach, divisors):
    exponents = torch.arange(0, D, 2, dtype=torch.float64) / D
    got, factor = LONGROPE.frequencies(10_000.0, exponents, torch.arange(reach))
    want = 10_000.0**-exponents / torch.tensor(divisors, dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    assert factor == pytest.approx(math.sqrt(1 + math.log(3.0) / math.log(32)))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_longrope_without_a_longer_context_keeps_scores(factor):
    scaling = LongRopeScaling(factor, 32, LONGROPE.short_factor, LONGROPE.long_factor)
    assert scaling.frequencies(10.0, torch.arange(4) / 4, torch.arange(3))[1] == 1.0


@pytest.mark.parametrize("scaling", [DynamicNTKScaling(2.0, 32), LONGROPE])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_dynamic_scaling_uses_the_largest_position_of_all_rows(scaling, dtype):
    x, rope = torch.ones(2, 1, 3, D), ph.Rope(scaling=scaling)
    near = torch.tensor([[0, 1, 2], [3, 4, 31]], dtype=dtype)
    far = torch.tensor([[0, 1, 2], [3, 4, 255]], dtype=dtype)
    assert not torch.equal(rope(x, near)[0], rope(x, far)[0])
    assert torch.equal(rope(x, near)[0], rope(x[:1], near[0])[0])


def test_longrope_lists_of_a_config_become_tuples():
    scaling = LongRopeScaling(3.0, 32, [1.0, 1.1, 1.2, 1.3], [1.0, 2.0, 4.0, 8.0])
    assert scaling == LONGROPE
    assert hash(scaling) == hash(LONGROPE)


@pytest.mark.parametrize(
    "broken",
    [{"factor": 0.0}, {"original_context": -1}],
)
def test_dynamic_nonpositive_argument_raises(broken):
    [(name, number)] = broken.items()
    with pytest.raises(ArgumentError, match=f"^{name} must be positive and finite; got {number};"):
        DynamicNTKScaling(**{"factor": 2.0, "original_context": 32, **broken})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"factor": math.inf}, "factor must be positive and finite; got inf"),
        ({"attention_factor": 0.0}, "attention_factor must be positive and finite; got 0.0"),
        ({"factor": None}, "factor must be a number; got None"),
        ({"short_factor": 1.0}, "short_factor must be a sequence of numbers; got 1.0"),
        ({"original_context": 1}, "original_context must be at least 2; got 1"),
        ({"long_factor": (1.0, -2.0)}, "long_factor[1] must be positive and finite; got -2.0"),
    ],
)
def test_longrope_bad_argument_raises(broken, message):
    good = {"factor": 2.0, "original_context": 32, "short_factor": (1.0,), "long_factor": (1.0,)}
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}; "):
        LongRopeScaling(**{**good, **broken})


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
def test_longrope_without_a_divisor_per_pair_raises(name):
    factors = {"short_factor": (1.0,) * 4, "long_factor": (1.0,) * 4, name: (1.0,) * 3}
    message = f"{name} must have one divisor for each of 4 pairs; got 3; change it or rotary_dim"
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        ph.Rope(scaling=LongRopeScaling(2.0, 32, **factors))(
            torch.ones(1, 1, 2, D), torch.arange(2)
        )


def test_dynamic_with_one_pair_raises():
    message = r"^rotary_dim must be at least 4 .*; got 2; rotate more features$"
    with pytest.raises(ShapeError, match=message):
        ph.Rope(scaling=DynamicNTKScaling(2.0, 32))(torch.ones(1, 1, 2, 2), torch.arange(2))
