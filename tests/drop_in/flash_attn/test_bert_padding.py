"""`unpad_input`, `pad_input` and the index functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.drop_in.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from polyhead.errors import ArgumentError, DtypeError, ShapeError

B, T, D = 3, 5, 2
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_pad_input_undoes_unpad_input(data, random):
    rows, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    size = rows * tokens
    bits = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    mask = torch.tensor(bits).view(rows, tokens)
    x = random(rows, tokens, D)
    packed, indices, bounds, longest, used = unpad_input(x, mask)
    assert torch.equal(packed, x[mask])
    assert torch.equal(indices, mask.flatten().nonzero().flatten())
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, *mask.sum(dim=1).cumsum(0).tolist()]
    assert (longest, used.tolist()) == (int(mask.sum(dim=1).max()), mask.sum(dim=1).tolist())
    assert torch.equal(pad_input(packed, indices, rows, tokens), x * mask[..., None])


def test_unused_tokens_are_packed_and_not_counted(random):
    unused = torch.tensor([[0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    x = random(B, T, D)
    packed, _, bounds, longest, used = unpad_input(x, MASK, unused)
    assert torch.equal(packed, x[(MASK + unused).bool()])
    assert (bounds.tolist(), longest, used.tolist()) == ([0, 4, 5, 9], 4, [3, 0, 4])


def test_several_sequences_per_row_are_bounded(random):
    """The example of flash-attn's docstring."""
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = random(3, 6, D)
    packed, indices, bounds, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert bounds.tolist() == [0, 2, 5, 8, 10, 16]
    assert longest == 6
    assert torch.equal(packed, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert torch.equal(pad_input(packed, indices, 3, 6)[0, 5], torch.zeros(D))


def test_gradients_go_back_to_their_tokens(random):
    x = random(B, T, D).requires_grad_()
    packed, indices, *_ = unpad_input(x, MASK)
    direction = random(B, T, D, seed=1)
    pad_input(packed * 2, indices, B, T).backward(direction)
    assert torch.equal(x.grad, 2 * direction * MASK[..., None])


def test_repeated_index_accumulates_its_gradient():
    x = torch.ones(3, 1, requires_grad=True)
    index_first_axis(x, torch.tensor([1, 1, 0])).sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 2.0, 0.0]


def test_transformers_gets_what_it_unpacks(random):
    """transformers takes the first four, or five, of the results."""
    packed, _, bounds, longest, *_ = unpad_input(random(B, T, 2, D), MASK.bool())
    assert packed.shape == (7, 2, D)
    assert (bounds.tolist(), longest) == ([0, 3, 3, 7], 4)


def ones():
    return torch.ones(B, T, D)


REFUSED = {
    "additive mask": (
        lambda: unpad_input(ones(), torch.zeros(B, T)),
        DtypeError,
        "attention_mask must be bool or integers; got torch.float32",
    ),
    "shape": (
        lambda: unpad_input(ones(), MASK[:, :4]),
        ShapeError,
        "attention_mask must be (batch, seqlen) = (3, 5); got (3, 4)",
    ),
    "numbers": (
        lambda: unpad_input(ones(), MASK * 2),
        ArgumentError,
        "attention_mask must be 0 or 1; got [0, 2]",
    ),
    "lengths": (
        lambda: unpad_input_for_concatenated_sequences(ones(), MASK * 3),
        ArgumentError,
        "attention_mask_in_length must have rows of lengths whose sum is at most seqlen = 5; got",
    ),
    "indices": (
        lambda: pad_input(torch.ones(4, D), torch.arange(3), B, T),
        ShapeError,
        "indices must be (m,) = (4,); got (3,)",
    ),
    "index's dtype": (
        lambda: index_first_axis(ones(), torch.ones(2)),
        DtypeError,
        "indices must be int32 or int64; got torch.float32",
    ),
    "size": (
        lambda: index_put_first_axis(ones(), torch.arange(B), -1),
        ArgumentError,
        "first_axis_dim must be an integer of at least 0; got -1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_argument_raises_with_remedy(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)
