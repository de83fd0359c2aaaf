"""`apply_rotary_emb` against rotations of complex numbers."""

from __future__ import annotations

import pytest
import torch

from polyhead.drop_in.flash_attn.rotary import (
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from polyhead.errors import ArgumentError, DtypeError, ShapeError

B, T, H, D, ROWS = 2, 5, 3, 8, 11


@pytest.fixture
def tables():
    angles = torch.arange(ROWS)[:, None] * torch.tensor([1.0, 0.3, 0.01])
    return angles.cos(), angles.sin()


def turned(x, cos, sin, positions, interleaved):
    """x (tokens, H, D) with pair i as a complex number, times cos + i sin of each position."""
    R = 2 * cos.shape[1]
    result = x.clone()
    turn = torch.complex(cos, sin)[positions][:, None]
    first = slice(0, R, 2) if interleaved else slice(0, R // 2)
    second = slice(1, R, 2) if interleaved else slice(R // 2, R)
    rotated = torch.complex(x[..., first], x[..., second]) * turn
    result[..., first], result[..., second] = rotated.real, rotated.imag
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 4, torch.tensor([6, 1]), torch.tensor([0, 3]).int()])
def test_rows_are_turned_by_their_positions(interleaved, offsets, tables, random):
    x = random(B, T, H, D)
    output = apply_rotary_emb(x, *tables, interleaved, seqlen_offsets=offsets)
    first = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * B
    expected = [
        turned(x[b], *tables, torch.arange(first[b], first[b] + T), interleaved) for b in range(B)
    ]
    torch.testing.assert_close(output, torch.stack(expected))
    assert apply_rotary_emb_func is apply_rotary_emb


def test_packed_sequences_count_from_their_starts(tables, random, cumulative):
    x = random(9, H, D)
    output = apply_rotary_emb(
        x, *tables, cu_seqlens=cumulative([4, 0, 5]), seqlen_offsets=torch.tensor([2, 7, 0])
    )
    positions = torch.tensor([2, 3, 4, 5, 0, 1, 2, 3, 4])
    torch.testing.assert_close(output, turned(x, *tables, positions, False))


def test_in_place_writes_to_x(tables, random):
    x = random(B, T, H, D)
    expected = apply_rotary_emb(x, *tables)
    assert apply_rotary_emb(x, *tables, inplace=True) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_is_the_rotation_back(inplace, tables, random):
    x = random(B, T, H, D).requires_grad_()
    direction = random(B, T, H, D, seed=1)
    output = apply_rotary_emb(x * 1, *tables, inplace=inplace)
    (gradient,) = torch.autograd.grad(output, x, direction)
    cos, sin = tables
    torch.testing.assert_close(gradient, apply_rotary_emb(direction, cos, -sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_of_each_row_are_applied(interleaved, tables, random):
    x = random(B, T, H, D)
    assert torch.equal(
        apply_rotary_emb_torch(x, *tables, interleaved), apply_rotary_emb(x, *tables, interleaved)
    )
    offsets = torch.tensor([6, 1])
    rows = offsets[:, None] + torch.arange(T)
    of_rows = apply_rotary_emb_torch(x, *(table[rows] for table in tables), interleaved)
    expected = apply_rotary_emb(x, *tables, interleaved, seqlen_offsets=offsets)
    assert torch.equal(of_rows, expected)


def test_packed_queries_and_keys_turn_in_place(tables, random):
    cos, sin = tables
    qkv = random(B, T, 3, H, D)
    before = qkv.clone()
    assert apply_rotary_emb_qkv_(qkv, *tables, cos_k=sin, sin_k=cos, seqlen_offsets=2) is qkv
    assert torch.equal(qkv[:, :, 0], apply_rotary_emb(before[:, :, 0], cos, sin, seqlen_offsets=2))
    assert torch.equal(qkv[:, :, 1], apply_rotary_emb(before[:, :, 1], sin, cos, seqlen_offsets=2))
    assert torch.equal(qkv[:, :, 2], before[:, :, 2])
    grouped = before.flatten(2, 3)[:, :, : H + 4].clone()
    expected = grouped.clone()
    apply_rotary_emb_qkv_(grouped, *tables, num_heads_q=H)
    expected[:, :, : H + 2] = apply_rotary_emb(expected[:, :, : H + 2], *tables)
    assert torch.equal(grouped, expected)
    kv = before[:, :, 1:].clone()
    assert apply_rotary_emb_kv_(kv, *tables) is kv
    assert torch.equal(kv[:, :, 0], apply_rotary_emb(before[:, :, 1], *tables))
    assert torch.equal(kv[:, :, 1], before[:, :, 2])


def test_packed_turn_has_a_gradient(tables, random):
    qkv = random(B, T, 3, H, D).requires_grad_()
    direction = random(B, T, 3, H, D, seed=1)
    (gradient,) = torch.autograd.grad(apply_rotary_emb_qkv_(qkv * 1, *tables), qkv, direction)
    cos, sin = tables
    torch.testing.assert_close(gradient, apply_rotary_emb_qkv_(direction.clone(), cos, -sin))


def test_packed_argument_that_raises_is_unchanged(tables, random):
    qkv = random(B, T, 3, H, D)
    before = qkv.clone()
    with pytest.raises(ShapeError, match=r"^cos must be"):
        apply_rotary_emb_qkv_(qkv, *tables, cos_k=torch.ones(ROWS, 5), sin_k=tables[1])
    assert torch.equal(qkv, before)
    with pytest.raises(
        ShapeError, match=r"^qkv must be .*; got \(2, 5, 9, 8\), num_heads_q = None"
    ):
        apply_rotary_emb_qkv_(qkv.flatten(2, 3), *tables)
    with pytest.raises(ShapeError, match=r"^kv must be .*; got \(2, 5, 3, 3, 8\)"):
        apply_rotary_emb_kv_(qkv, *tables)
    with pytest.raises(ShapeError, match=r"^cos must be \(batch_size, seqlen, rotary_dim / 2\)"):
        apply_rotary_emb_torch(qkv[:, :, 0], torch.ones(B, T + 1, 3), torch.ones(B, T + 1, 3))


REFUSED = {
    "dimensions": ({"x": torch.ones(T, H, D)}, ShapeError, "x must be (batch_size, seqlen, "),
    "packed dimensions": (
        {"cu_seqlens": torch.tensor([0, 5])},
        ShapeError,
        "x must be (total, nheads, headdim); got (2, 5, 3, 8)",
    ),
    "columns": (
        {"cos": torch.ones(ROWS, 5), "sin": torch.ones(ROWS, 5)},
        ShapeError,
        "cos must be (seqlen_rotary, rotary_dim / 2), the second from 1 to headdim / 2 = 4",
    ),
    "shapes": ({"sin": torch.ones(ROWS, 2)}, ShapeError, "sin must be (seqlen_rotary,"),
    "dtype": (
        {"sin": torch.ones(ROWS, 3).double()},
        DtypeError,
        "sin must be torch.float32, as the features, or float32; got torch.float64",
    ),
    "positions": (
        {"seqlen_offsets": 7},
        ShapeError,
        "cos must have a row for each position, 7 to 11; got 11 rows; pass longer tables",
    ),
    "negative positions": (
        {"seqlen_offsets": torch.tensor([0, -1])},
        ShapeError,
        "cos must have a row for each position, -1 to 4; got 11 rows; count positions from 0",
    ),
    "bounds": (
        {"x": torch.ones(T, H, D), "cu_seqlens": torch.tensor([0, 4])},
        ArgumentError,
        "cu_seqlens must begin with 0, never decrease, and end with x's 5 tokens; got [0, 4]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_argument_raises_with_remedy(case, tables):
    changed, error, message = REFUSED[case]
    arguments = {"x": torch.ones(B, T, H, D), "cos": tables[0], "sin": tables[1]}
    with pytest.raises(error) as raised:
        apply_rotary_emb(**arguments | changed)
    assert str(raised.value).startswith(message)
