"""RoPE against transformers, bit-exact, and its relative-position property."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import polyhead as ph
from polyhead.errors import ArgumentError, DtypeError, ShapeError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [24, 80])
def test_rope_matches_transformers_bit_exactly(dtype, theta, head_dim):
    torch.manual_seed(0)
    query = torch.randn(2, 3, 11, head_dim, dtype=dtype)
    key = torch.randn(2, 1, 11, head_dim, dtype=dtype)
    positions = torch.stack([torch.arange(11), torch.arange(7919, 7930)])
    config = LlamaConfig(
        hidden_size=3 * head_dim,
        num_attention_heads=3,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    cos, sin = LlamaRotaryEmbedding(config)(query, positions)
    want_query, want_key = apply_rotary_pos_emb(query, key, cos, sin)
    rope = ph.Rope(theta=theta)
    assert torch.equal(rope(query, positions), want_query)
    assert torch.equal(rope(key, positions), want_key)


@given(
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.integers(0, 100_000),
    st.sampled_from([2, 6, 64]),
    st.floats(10.0, 1e6),
)
@settings(max_examples=100, deadline=None)
def test_rope_products_depend_on_the_distance_only(at_query, at_key, shift, head_dim, theta):
    generator = torch.Generator().manual_seed(head_dim)
    query, key = torch.randn(2, 1, 1, 1, head_dim, dtype=torch.float64, generator=generator)
    rope = ph.Rope(theta=theta)

    def product(p, q):
        return (rope(query, torch.tensor([p])) * rope(key, torch.tensor([q]))).sum().item()

    assert product(at_query + shift, at_key + shift) == pytest.approx(
        product(at_query, at_key), abs=1e-8
    )


def test_rope_rotates_by_the_angle_of_the_formula():
    x = torch.tensor([3.0, 5.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    rotated = ph.Rope(theta=100.0)(x, torch.tensor([7]))[0, 0, 0]
    angles = torch.tensor([7.0, 7.0 * 100.0**-0.5], dtype=torch.float64)
    want = torch.cat([x[0, 0, 0, :2] * angles.cos(), x[0, 0, 0, :2] * angles.sin()])
    torch.testing.assert_close(rotated, want, rtol=0, atol=1e-14)


def test_rope_with_positions_per_batch_row():
    x = torch.randn(2, 3, 5, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 9, 2, 0, 100]])
    rope = ph.Rope()
    for b in range(2):
        assert torch.equal(rope(x, positions)[b], rope(x[b : b + 1], positions[b])[0])
    assert not torch.equal(rope(x, positions)[1], rope(x, positions[0])[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rope_preserves_dtype_and_norm(dtype):
    x = torch.randn(2, 3, 5, 8, dtype=dtype)
    rotated = ph.Rope()(x, torch.arange(5))
    assert rotated.dtype == dtype
    torch.testing.assert_close(
        rotated.double().norm(dim=-1),
        x.double().norm(dim=-1),
        rtol=2 * torch.finfo(dtype).eps,
        atol=0,
    )
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])


def test_rope_odd_head_size_raises():
    message = "head size must be even for rope; got 7; change head_dim"
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        ph.Rope()(torch.ones(1, 1, 2, 7), torch.arange(2))


@pytest.mark.parametrize("theta", [0.0, -2.5, float("nan"), float("inf")])
def test_rope_nonpositive_theta_raises(theta):
    message = f"theta must be positive and finite; got {theta}; 10000.0 is usual"
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        ph.Rope(theta=theta)


def test_rope_interleaved_rotates_as_complex_numbers():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 100, 3])
    angles = positions[:, None] * 50.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    rotations = torch.polar(torch.ones_like(angles), angles)
    want = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * rotations).flatten(
        -2
    )
    got = ph.Rope(theta=50.0, interleaved=True)(x, positions)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_with_rotary_dim_keeps_the_other_features(interleaved):
    x = torch.randn(2, 3, 5, 24)
    positions = torch.arange(5) + 11
    partial = ph.Rope(interleaved=interleaved, rotary_dim=6)(x, positions)
    assert torch.equal(partial[..., 6:], x[..., 6:])
    whole = ph.Rope(interleaved=interleaved)(x[..., :6], positions)
    assert torch.equal(partial[..., :6], whole)
    assert not torch.equal(partial[..., :6], x[..., :6])


@pytest.mark.parametrize("theta", [None, "10000", True])
def test_rope_theta_of_another_type_raises(theta):
    with pytest.raises(DtypeError, match=f"^theta must be a number; got {theta!r}; 10000.0 is"):
        ph.Rope(theta=theta)


@pytest.mark.parametrize(
    ("x", "positions", "message"),
    [
        (torch.ones(2, 3, 5, 4), torch.arange(4), r"positions must be .* or \(B, T\) = \(2, 5\)"),
        (torch.ones(2, 3, 5, 4), torch.arange(1), r"positions must be .*; got torch.int64 \(1,\)"),
        (torch.ones(2, 3, 5, 4), torch.zeros(3, 5).long(), r"positions must be .*\(3, 5\); pass"),
        (torch.ones(2, 3, 5, 4), torch.arange(5.0), "positions must be integers .*torch.float32"),
        (torch.ones(2, 3, 5, 4), [0, 1, 2, 3, 4], "positions must be a tensor of integers; got li"),
        (torch.ones(3, 5, 4), torch.arange(5), r"x must be \(B, heads, T, D\); got \(3, 5, 4\)"),
    ],
)
def test_rope_call_with_bad_shapes_raises(x, positions, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        ph.Rope()(x, positions)


@pytest.mark.parametrize("rotary_dim", [0, -2, 5, 4.0, "4"])
def test_rope_odd_or_nonpositive_rotary_dim_raises(rotary_dim):
    message = (
        f"rotary_dim must be even and at least 2; got {rotary_dim!r}; features rotate in pairs"
    )
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        ph.Rope(rotary_dim=rotary_dim)


def test_rope_rotary_dim_larger_than_the_head_raises():
    message = "rotary_dim must be at most the head size 8; got 10; rotate fewer features"
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        ph.Rope(rotary_dim=10)(torch.ones(1, 1, 2, 8), torch.arange(2))


def test_rope_scaling_of_another_type_raises():
    message = "scaling must be a RopeScaling or None; got 2.0; pass LinearScaling(factor=2.0)"
    with pytest.raises(DtypeError, match=f"^{re.escape(message)}, or another$"):
        ph.Rope(scaling=2.0)
