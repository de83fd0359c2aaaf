"""`apply_rotary_emb` against rotations of complex numbers."""

from __future__ import annotations

import pytest
import torch

from polyhead.drop_in.flash_attn.rotary import apply_rotary_emb, apply_rotary_emb_func
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
