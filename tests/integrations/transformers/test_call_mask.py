"""The mask of one call, from its arguments and the layer's attributes."""

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, ShapeError
from polyhead.integrations.transformers.call_mask import read_mask
from polyhead.integrations.transformers.structured_mask import StructuredMask

B, H, D = 2, 3, 4


def read(T, S, attention_mask=None, *, layer=None, **given):
    mask, bias = read_mask(
        layer or carrying(is_causal=True),
        torch.empty(B, H, T, D),
        torch.empty(B, H, S, D),
        attention_mask,
        **given,
    )
    assert bias is None
    return mask


def carrying(name="SelfAttention", **flags):
    module = type(name, (torch.nn.Module,), {})()
    for flag, value in flags.items():
        setattr(module, flag, value)
    return module


def same(mask, expected, T, S):
    return torch.equal(mask.materialize(T, S), expected.materialize(T, S))


def test_read_mask_none_without_flag_is_no_mask():
    assert read(3, 5, layer=carrying()) is None


def test_read_mask_none_in_causal_layer_is_causal():
    assert read(3, 5) == ph.mask.causal()


@pytest.mark.parametrize(
    "layer",
    [
        carrying(is_causal=True, is_cross_attention=True),  # as GPTBigCode's
        carrying("TextCrossAttention", is_causal=True),
    ],
    ids=["flag", "name"],
)
def test_read_mask_none_in_cross_attention_is_no_mask(layer):
    assert read(3, 5, layer=layer) is None
    assert read(3, 5, layer=layer, is_causal=True) is None  # is_cross_attention wins


@pytest.mark.parametrize(("T", "S"), [(7, 7), (2, 7), (1, 7)])
def test_read_mask_window_without_mask_is_applied(T, S):
    expected = ph.mask.causal() & ph.mask.window(before=2)
    assert same(read(T, S, sliding_window=3), expected, T, S)
    both_ways = ph.mask.window(before=2, after=2)
    assert same(read(T, S, sliding_window=3, layer=carrying()), both_ways, T, S)


def test_read_mask_window_of_all_keys_is_omitted():
    assert read(3, 4, sliding_window=4) == ph.mask.causal()
    assert read(1, 4, sliding_window=4) is None


def test_read_mask_window_with_mask_is_not_applied():
    """In some models image tokens attend beyond the window: the mask includes both."""
    rule = ph.mask.causal() & (ph.mask.window(before=2) | ph.mask.prefix(2))
    mask = StructuredMask(rule, batch=B, T=6, S=6, device="cpu")
    assert read(6, 6, mask, sliding_window=3) is rule


@pytest.mark.parametrize("size", [0, -1, True, "4"])
def test_read_mask_invalid_window_raises(size):
    with pytest.raises(ArgumentError, match="sliding_window must be an integer of at least 1"):
        read(6, 6, sliding_window=size)


def test_read_mask_window_in_the_cache_is_not_applied():
    layer = carrying("DiffusionGemmaDecoderTextAttention", is_causal=False)
    assert read(3, 9, sliding_window=4, layer=layer, is_causal=False) is None


def test_read_mask_documents_combine_with_mask_and_window():
    bounds = torch.tensor([0, 4, 7, 14])
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [2] * 7])
    mask = StructuredMask(ph.mask.lengths([7, 5]), batch=B, T=7, S=7, device="cpu")
    got = read(7, 7, mask, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    assert same(got, ph.mask.lengths([7, 5]) & ph.mask.documents(ids), 7, 7)
    got = read(7, 7, sliding_window=2, cu_seq_lens_q=bounds)
    expected = ph.mask.causal() & ph.mask.window(before=1) & ph.mask.documents(ids)
    assert same(got, expected, 7, 7)


def test_read_mask_restarting_positions_without_mask():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    expected = ph.mask.causal() & ph.mask.documents(torch.tensor([[0, 0, 0, 1, 1]] * B))
    assert same(read(5, 5, position_ids=positions), expected, 5, 5)
    mask = StructuredMask(ph.mask.causal(), batch=B, T=5, S=5, device="cpu")
    assert read(5, 5, mask, position_ids=positions) == ph.mask.causal()
    assert read(5, 5, layer=carrying(), position_ids=positions) is None


def test_read_mask_indices_restrict_the_keys():
    indices = torch.tensor([[[0, 2], [1, -1], [3, 3]]]).expand(B, 3, 2)
    allowed = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]).bool()
    got = read(3, 4, indices=indices)
    assert same(got, ph.mask.causal() & ph.mask.dense(allowed.expand(B, 1, 3, 4)), 3, 4)


def test_read_mask_indices_of_other_shape_raise():
    with pytest.raises(ShapeError, match=r"indices must be \(B, T, K\) = \(2, 3, K\).*got \(2, 4"):
        read(3, 4, indices=torch.zeros(B, 4, 2, dtype=int))
