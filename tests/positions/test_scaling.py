"""RoPE scalings against transformers (bit-exact), compiled, exported, and against formulas."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import polyhead as ph
from polyhead.errors import ArgumentError, DtypeError, ShapeError
from polyhead.positions import LinearScaling, Llama3Scaling, NTKScaling, rotate

D = 24
# Within the original context of 512 tokens, at its border, after it, and far after it.
ENDS = [7, 512, 513, 1500, 100_003]

one_of_each = pytest.mark.parametrize(
    "scaling", ["linear", "dynamic", "yarn", "llama3", "longrope"], indirect=True
)


def positions_up_to(end):
    return torch.stack([torch.arange(7), torch.arange(end - 7, end)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_scaling_matches_transformers_bit_exactly(scaling_and_config, theta, dtype):
    scaling, config = scaling_and_config
    rope = ph.Rope(theta=theta, scaling=scaling)
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 7, D, dtype=dtype), torch.randn(2, 1, 7, D, dtype=dtype)
    for end in ENDS:
        positions = positions_up_to(end)
        cos, sin = LlamaRotaryEmbedding(config(D, theta))(query, positions)
        want_query, want_key = apply_rotary_pos_emb(query, key, cos, sin)
        assert torch.equal(rope(query, positions), want_query)
        assert torch.equal(rope(key, positions), want_key)


def test_scaling_of_half_a_head_matches_transformers(scaling_and_config):
    scaling, config = scaling_and_config
    x = torch.randn(2, 3, 7, 2 * D)
    for end in ENDS:
        positions = positions_up_to(end)
        config_of_half = config(2 * D, 10_000.0, partial_rotary_factor=0.5)
        cos, sin = LlamaRotaryEmbedding(config_of_half)(x, positions)
        want, _ = apply_rotary_pos_emb(x[..., :D], x[..., :D], cos, sin)
        got = ph.Rope(rotary_dim=D, scaling=scaling)(x, positions)
        assert torch.equal(got[..., :D], want)
        assert torch.equal(got[..., D:], x[..., D:])


def test_scaling_interleaved_rotates_by_the_same_angles(scaling):
    x, positions = torch.randn(2, 3, 7, D), positions_up_to(1500)
    rotated = ph.Rope(scaling=scaling, interleaved=True)(
        x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), positions
    )
    rotated = rotated.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    assert torch.equal(rotated, ph.Rope(scaling=scaling)(x, positions))


def test_scaling_of_float64_is_computed_in_float64(scaling):
    x, positions = torch.randn(2, 3, 7, D, dtype=torch.float64), positions_up_to(1500)
    got = ph.Rope(scaling=scaling)(x, positions)
    exponents = torch.arange(0, D, 2, dtype=torch.float64) / D
    angles, factor = scaling.frequencies(10_000.0, exponents, positions)
    assert (got.dtype, angles.dtype) == (torch.float64, torch.float64)
    angles = positions[:, None, :, None] * angles
    want = rotate(x, factor * angles.cos(), factor * angles.sin())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    # float32 frequencies would be off by 1500 * 2^-24 radians
    in_float32 = ph.Rope(scaling=scaling)(x.float(), positions).double()
    torch.testing.assert_close(got, in_float32, rtol=0, atol=5e-3)
    assert not torch.equal(got, in_float32)


def test_scaling_broadcasts_positions_over_batch_rows(scaling):
    x, positions, rope = torch.randn(2, 3, 7, D), torch.arange(700, 707), ph.Rope(scaling=scaling)
    assert torch.equal(rope(x, positions), rope(x, positions.expand(2, -1)))


def test_scaled_rope_compares_hashes_and_pickles_by_value(scaling):
    rope = ph.Rope(scaling=scaling)
    twins = [ph.Rope(scaling=copy.deepcopy(scaling)), pickle.loads(pickle.dumps(rope))]
    assert all(twin == rope and hash(twin) == hash(rope) for twin in twins)
    assert rope != ph.Rope()
    assert f"scaling={type(scaling).__name__}(" in repr(rope)


def test_scaling_reads_no_tensor_value_on_the_host(scaling):
    x = torch.ones(2, 3, 7, D, device="meta", dtype=torch.bfloat16)
    rotated = ph.Rope(scaling=scaling)(x, torch.arange(7, device="meta"))
    assert (rotated.shape, rotated.dtype, rotated.device.type) == (x.shape, x.dtype, "meta")


def test_scaling_of_zero_tokens_is_empty(scaling):
    x = torch.ones(2, 3, 0, D)
    assert ph.Rope(scaling=scaling)(x, torch.arange(0)).shape == x.shape


@one_of_each
def test_scaling_compiles_once_for_all_numbers_of_tokens(scaling):
    rope, counter = ph.Rope(scaling=scaling), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(rope.__call__, fullgraph=True, dynamic=True, backend=counter)
    for T in (17, 5, 600):
        x, positions = torch.randn(2, 3, T, D), torch.arange(T) + 300
        assert torch.equal(compiled(x, positions), rope(x, positions))
    assert counter.frame_count == 1


class _Rotate(torch.nn.Module):
    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def forward(self, x, positions):
        return self.rope(x, positions)


@one_of_each
def test_scaling_exports_with_a_dynamic_number_of_tokens(scaling):
    rotate_module, T = _Rotate(ph.Rope(scaling=scaling)), torch.export.Dim("T")
    program = torch.export.export(
        rotate_module, (torch.randn(2, 3, 17, D), torch.arange(17)), dynamic_shapes=({2: T}, {0: T})
    ).module()
    for tokens in (5, 600):
        x, positions = torch.randn(2, 3, tokens, D), torch.arange(tokens)
        assert torch.equal(program(x, positions), rotate_module(x, positions))


def frequencies(scaling, theta=10_000.0):
    exponents = torch.arange(0, D, 2, dtype=torch.float64) / D
    return scaling.frequencies(theta, exponents, torch.arange(3))


def test_linear_scaling_interpolates_positions():
    x = torch.randn(1, 2, 5, D, dtype=torch.float64)
    scaled = ph.Rope(scaling=LinearScaling(4.0))(x, torch.arange(5) * 4 + 80)
    torch.testing.assert_close(scaled, ph.Rope()(x, torch.arange(5) + 20), rtol=0, atol=1e-13)


def test_ntk_scaling_slows_the_slowest_pair_by_the_factor():
    """The fastest pair is unchanged."""
    plain, _ = frequencies(LinearScaling(1.0))
    scaled, factor = frequencies(NTKScaling(3.7))
    assert factor == 1.0
    ratio = plain / scaled
    assert ratio[0] == 1.0
    assert ratio[-1].item() == pytest.approx(3.7, rel=1e-13)
    assert (ratio.diff() > 0).all()


def test_ntk_scaling_equals_rope_with_a_larger_base():
    x, positions = torch.randn(2, 3, 7, D), positions_up_to(100_003)
    larger = ph.Rope(theta=10_000.0 * 3.7 ** (D / (D - 2)))
    assert torch.equal(ph.Rope(scaling=NTKScaling(3.7))(x, positions), larger(x, positions))


def test_llama3_scaling_matches_its_formula():
    scaled, factor = frequencies(Llama3Scaling(8.0, 1.5, 4.0, 8192))
    want = []
    for i in range(D // 2):
        angle = 10_000.0 ** (-2 * i / D)
        kept = min(max((8192 * angle / (2 * math.pi) - 1.5) / (4.0 - 1.5), 0.0), 1.0)
        want.append((kept + (1 - kept) / 8.0) * angle)
    torch.testing.assert_close(scaled, torch.tensor(want, dtype=torch.float64), rtol=1e-14, atol=0)
    assert factor == 1.0


@pytest.mark.parametrize("factor", [0.0, -2.5, math.inf, math.nan])
@pytest.mark.parametrize("scaling", [LinearScaling, NTKScaling])
def test_scaling_nonpositive_or_infinite_factor_raises(scaling, factor):
    message = f"factor must be positive and finite; got {factor}; change the scaling"
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        scaling(factor)


@pytest.mark.parametrize(
    "broken", [{"factor": 0.0}, {"low_freq_factor": -1.0}, {"original_context": 0}]
)
def test_llama3_nonpositive_argument_raises(broken):
    [(name, number)] = broken.items()
    good = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_context": 8192,
    }
    with pytest.raises(ArgumentError, match=f"^{name} must be positive and finite; got {number};"):
        Llama3Scaling(**{**good, **broken})


@pytest.mark.parametrize("high", [1.5, 1.0, math.inf, math.nan])
def test_llama3_frequency_factors_out_of_order_raise(high):
    message = f"high_freq_factor must be finite and above low_freq_factor = 1.5; got {high}; 4.0"
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}"):
        Llama3Scaling(8.0, 1.5, high, 8192)


@pytest.mark.parametrize("factor", [None, "2.0", True])
@pytest.mark.parametrize("scaling", [LinearScaling, NTKScaling])
def test_scaling_factor_of_another_type_raises(scaling, factor):
    message = f"^factor must be a number; got {factor!r}; change the scaling$"
    with pytest.raises(DtypeError, match=message):
        scaling(factor)
    with pytest.raises(DtypeError, match=f"^high_freq_factor must be a number; got {factor!r}; "):
        Llama3Scaling(8.0, 1.5, factor, 8192)


def test_ntk_with_one_pair_raises():
    message = "rotary_dim must be at least 4 for NTK scaling; got 2; rotate more features"
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        ph.Rope(scaling=NTKScaling(2.0))(torch.ones(1, 1, 2, 2), torch.arange(2))
