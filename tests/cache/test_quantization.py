"""Int8 quantization error, and exactness of the unquantized format."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.cache.quantization import Int8, Unquantized

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# float16 ends at 65504; the smallest are below the normal numbers of float32.
EXPONENTS = {torch.float16: (-24, 15), **dict.fromkeys(DTYPES[:2] + DTYPES[3:], (-149, 120))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_int8_error_is_half_a_step_per_token_and_head(dtype, data):
    shape = tuple(data.draw(st.integers(1, n)) for n in (2, 3, 4, 7))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    exponent = data.draw(st.integers(*EXPONENTS[dtype]))
    # Tokens and heads of very different magnitude, to detect a scale shared by two of them.
    spread = torch.randint(-6, 1, shape[:3], generator=generator).double()
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    x = (x * 2.0 ** (exponent + spread[..., None])).to(dtype)
    int8 = Int8(dtype)
    codes, scales = int8.quantize(x)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert (codes.shape, scales.shape) == (x.shape, x.shape[:3])
    back = int8.dequantize((codes, scales))
    assert back.dtype == dtype
    absmax = x.abs().amax(dim=-1, keepdim=True).double()
    # The scale and the product are rounded to float32: 2^-24 each, and below the normal numbers
    # half of the smallest, 2^-150, times the int8 value. Then the product is rounded to dtype.
    info = torch.finfo(dtype)
    bound = absmax / 254 + absmax * (2.0**-23 + info.eps / 2) + 127 * 2.0**-150
    bound = bound + info.smallest_normal * info.eps / 2
    assert bool(((back.double() - x.double()).abs() <= bound).all())


def test_int8_of_zeros_and_empty_heads_is_exact():
    int8 = Int8(torch.float32)
    for x in (torch.zeros(2, 3, 5, 7), torch.zeros(2, 3, 5, 0), torch.zeros(2, 3, 0, 7)):
        assert torch.equal(int8.dequantize(int8.quantize(x)), x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_int8_of_a_nonfinite_token_is_nonfinite(bad):
    x = torch.ones(1, 1, 2, 3)
    x[0, 0, 1, 1] = bad
    int8 = Int8(torch.float32)
    back = int8.dequantize(int8.quantize(x))
    assert bool(back[0, 0, 0].isfinite().all())
    assert not bool(back[0, 0, 1].isfinite().any())


def test_unquantized_is_the_same_memory_without_the_graph():
    x = torch.randn(2, 3, 5, 7, requires_grad=True)
    (held,) = Unquantized().quantize(x)
    assert held.data_ptr() == x.data_ptr()
    assert not held.requires_grad
    assert Unquantized().dequantize((held,)) is held
