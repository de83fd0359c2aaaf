"""ALiBi slopes against the paper's code, bit-exact, and against transformers."""

from __future__ import annotations

import math
import re

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from polyhead.errors import DtypeError, ShapeError
from polyhead.positions import alibi_slopes


def slopes_of_the_paper(n):
    """Published code of Press et al., in Python's float64."""

    def power_of_two(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n).is_integer():
        return power_of_two(n)
    closest = 2 ** math.floor(math.log2(n))
    return power_of_two(closest) + slopes_of_the_paper(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alibi_slopes_match_the_paper_bit_exactly(dtype):
    for num_heads in range(1, 130):
        want = torch.tensor(slopes_of_the_paper(num_heads), dtype=torch.float64).to(dtype)
        assert torch.equal(alibi_slopes(num_heads, dtype=dtype), want)


def test_alibi_slopes_float64_match_the_paper():
    for num_heads in (1, 7, 12, 71, 128):
        want = torch.tensor(slopes_of_the_paper(num_heads), dtype=torch.float64)
        got = alibi_slopes(num_heads, dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def slopes_of_transformers(num_heads):
    """The slopes of transformers: its bias of key 1."""
    return build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]


@pytest.mark.parametrize("num_heads", range(1, 11))
def test_alibi_slopes_match_transformers_bit_exactly(num_heads):
    """For the numbers of heads whose powers transformers computes exactly."""
    assert torch.equal(alibi_slopes(num_heads), slopes_of_transformers(num_heads))


@pytest.mark.parametrize("num_heads", [12, 16, 25, 71, 112, 128])
def test_alibi_slopes_match_transformers_within_its_error(num_heads):
    """It raises a base rounded to float32 to a power of at most 2n: 2n half units."""
    bound = (2 * num_heads + 2) * torch.finfo(torch.float32).eps / 2
    want = slopes_of_transformers(num_heads)
    torch.testing.assert_close(alibi_slopes(num_heads), want, rtol=bound, atol=0)


def test_alibi_slopes_device_and_dtype_are_the_requested_ones():
    slopes = alibi_slopes(12, device="meta", dtype=torch.bfloat16)
    assert (slopes.shape, slopes.dtype, slopes.device.type) == ((12,), torch.bfloat16, "meta")


@pytest.mark.parametrize("num_heads", [0, -3, 2.0, True])
def test_alibi_slopes_bad_num_heads_raises(num_heads):
    message = f"num_heads must be an integer of at least 1; got {num_heads}; count from 1"
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        alibi_slopes(num_heads)


def test_alibi_slopes_integer_dtype_raises():
    message = "dtype must be floating point; got torch.int64; slopes are fractions"
    with pytest.raises(DtypeError, match=f"^{re.escape(message)}$"):
        alibi_slopes(4, dtype=torch.int64)
