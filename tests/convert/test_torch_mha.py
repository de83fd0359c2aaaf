"""nn.MultiheadAttention and back: the same function, the same bits, or an error with the reason."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polyhead as ph
from polyhead.convert import from_torch, to_torch
from polyhead.errors import ConversionError

B, T, S = 2, 5, 7


def theirs_with(d=24, num_heads=3, **options):
    theirs = nn.MultiheadAttention(d, num_heads, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    return theirs


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 5]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.25]),
)
def test_from_torch_same_function_and_bits_round_trip(
    H, head_dim, bias, zero_attention, batch_first, training, dropout
):
    theirs = theirs_with(
        H * head_dim,
        H,
        bias=bias,
        add_zero_attn=zero_attention,
        batch_first=batch_first,
        dropout=dropout,
    ).train(training)
    random_state = torch.get_rng_state()
    ours = from_torch(theirs)
    back = to_torch(ours, batch_first=batch_first)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (ours.training, ours.dropout.p, ours.mask) == (training, dropout, None)
    assert list(back.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    for name in ("num_heads", "dropout", "add_zero_attn", "batch_first", "training"):
        assert getattr(back, name) == getattr(theirs, name), name

    x = torch.randn(B, T, H * head_dim, dtype=torch.float64)
    memory = torch.randn(B, S, H * head_dim, dtype=torch.float64)
    forbidden = torch.zeros(B, S, dtype=torch.bool)
    forbidden[1, 4:] = True
    allowed = torch.ones(T, S, dtype=torch.bool).tril(2)
    arguments = (x, memory, memory)
    if not batch_first:
        arguments = tuple(tensor.transpose(0, 1) for tensor in arguments)
    with torch.no_grad():
        want, _ = theirs.eval()(*arguments, key_padding_mask=forbidden, attn_mask=~allowed)
        mask = ph.mask.lengths([S, 4]) & ph.mask.dense(allowed)
        got = ours.eval()(x, memory, mask=mask)
    want = want if batch_first else want.transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())


def test_from_torch_zero_attention_sinks_stay_frozen():
    ours = from_torch(theirs_with(add_zero_attn=True))
    assert not ours.sinks.requires_grad
    ours(torch.randn(B, T, 24, dtype=torch.float64)).sum().backward()
    assert not ours.sinks.any()
    with torch.no_grad():
        ours.sinks[1] = 0.5
    with pytest.raises(
        ConversionError, match="no option for sinks other than 0, or that require grad;"
    ):
        to_torch(ours)


def test_to_torch_lecture_module_gets_frozen_zero_bias():
    ours = ph.MultiHeadAttention(24, 24, 9, 0.0, 3, mask=None, dtype=torch.float64)
    theirs = to_torch(ours)
    assert theirs.batch_first
    assert not theirs.in_proj_bias.requires_grad
    assert theirs.in_proj_weight.requires_grad
    x = torch.randn(B, T, 24, dtype=torch.float64)
    torch.testing.assert_close(theirs(x, x, x)[0], ours(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(to_torch(ours.fuse()).in_proj_weight, theirs.in_proj_weight)


def test_torch_mha_inputs_are_unchanged_and_copied():
    theirs = theirs_with().requires_grad_(False)
    before = copy.deepcopy(theirs.state_dict())
    ours = from_torch(theirs, context_length=9)
    back = to_torch(ours)
    assert ours.context_length == 9
    for module in (ours, back):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kdim": 5}, "embed_dim = 24: .*got kdim = 5, vdim = 24; project the memory"),
        ({"vdim": 5}, "got kdim = 24, vdim = 5"),
        ({"add_bias_kv": True}, "add_bias_kv must be off: .*got bias_k and bias_v"),
    ],
)
def test_from_torch_unsupported_option_raises(options, message):
    with pytest.raises(ConversionError, match=message):
        from_torch(theirs_with(**options))


def test_to_torch_stacked_heads_raise():
    stacked = ph.MultiHeadAttentionWrapper(6, 2, 11, 0.0, 3)
    with pytest.raises(
        ConversionError, match=r"mha must be a MultiHeadAttention; .* by stacked_to"
    ):
        to_torch(stacked)


def test_from_torch_other_module_raises():
    with pytest.raises(ConversionError, match=r"got Linear; .*call from_transformers"):
        from_torch(nn.Linear(3, 3))
    theirs = theirs_with()
    theirs.out_proj = nn.Sequential(theirs.out_proj)
    with pytest.raises(ConversionError, match=r"out_proj must be a plain .*Sequential"):
        from_torch(theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": ph.mask.causal()}, r"a mask of its own \(set mask to None"),
        ({"d_in": 23}, "d_in = 23, d_out = 24 other than all heads together, 24"),
        ({"d_out": 21, "head_dim": 8}, "d_in = 24, d_out = 21 other than"),
        ({"value_head_dim": 5}, "other than all heads"),
        ({"num_kv_heads": 1}, "num_kv_heads = 1 for 3 heads"),
        ({"out_proj": False}, "no output projection"),
        ({"qkv_bias": True, "out_bias": False}, "a bias before the heads and none after"),
        ({"rope": ph.Rope()}, "no option for rope; keep"),
        ({"alibi": True}, "no option for alibi; keep"),
        ({"position_bias": nn.Identity()}, "no option for position_bias; keep"),
        ({"softcap": 2.0}, "no option for softcap; keep"),
        ({"scale": 0.5}, "no option for scale; keep"),
        ({"qk_norm": nn.RMSNorm}, "no option for qk_norm; keep"),
        ({"output_gate": True}, "no option for output_gate; keep"),
        ({"sinks": True}, "no option for sinks other than 0, or that require grad; keep"),
        ({"alibi": True, "softcap": 2.0}, "no option for alibi; softcap; keep"),
    ],
)
def test_to_torch_unsupported_option_raises(options, message):
    arguments = {"d_in": 24, "d_out": 24, "context_length": 9, "dropout": 0.0, "num_heads": 3}
    ours = ph.MultiHeadAttention(**{**arguments, "mask": None, **options})
    with pytest.raises(ConversionError, match=message):
        to_torch(ours)
