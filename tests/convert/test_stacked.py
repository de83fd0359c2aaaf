"""Stacked heads and weight splits are one function: equal bits and gradients, both ways."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import polyhead as ph
from polyhead.convert import split_to_stacked, stacked_to_split
from polyhead.errors import ConversionError, ShapeError

T, CONTEXT = 5, 11
MASKS = [
    ph.mask.causal(),
    None,
    ph.mask.causal() & ph.mask.window(before=1),
    ~ph.mask.causal(),  # the last row may attend to nothing
]
OPTIONS = ("d_in", "context_length", "num_heads", "rope", "mask", "scale", "backend", "training")


@st.composite
def splits(draw, grouped=True):
    """A MultiHeadAttention in float64 with random weights, and an input for it."""
    G, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2])) if grouped else 1
    rope = draw(st.sampled_from([None, ph.Rope(), ph.Rope(50.0)]))
    head_dim = draw(st.sampled_from([2, 4])) if rope else draw(st.sampled_from([1, 3, 5]))
    H, d_in = G * group, draw(st.sampled_from([1, 5, 7]))
    out_proj = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    mha = ph.MultiHeadAttention(
        d_in,
        draw(st.sampled_from([1, 3, 7])) if out_proj else H * head_dim,
        CONTEXT,
        draw(st.sampled_from([0.0, 0.25])),
        H,
        draw(st.booleans()),
        num_kv_heads=G,
        head_dim=head_dim,
        out_proj=out_proj,
        out_bias=draw(st.booleans()),
        rope=rope,
        mask=draw(st.sampled_from(MASKS)),
        scale=draw(st.sampled_from([None, 0.3])),
        backend=draw(st.sampled_from(["auto", "reference"])),
        dtype=torch.float64,
    )
    mha.train(draw(st.booleans()))
    return mha, torch.randn(2, T, d_in, dtype=torch.float64)


def assert_same_state(left, right):
    assert list(left.state_dict()) == list(right.state_dict())
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, right.state_dict()[name]), name
    for name, parameter in left.named_parameters():
        assert parameter.requires_grad == dict(right.named_parameters())[name].requires_grad, name


def assert_same_options(left, right):
    for name in OPTIONS:
        assert getattr(left, name) == getattr(right, name), name
    assert left.dropout.p == right.dropout.p


def output_and_gradients(module, x) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    module = copy.deepcopy(module).eval()
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in module.named_parameters()}


@settings(deadline=None, max_examples=20)
@given(splits())
def test_stacked_and_split_have_equal_output_and_gradients(case):
    split, x = case
    stacked = split_to_stacked(split)
    y, x_grad, grads = output_and_gradients(split, x)
    stacked_y, stacked_x_grad, stacked_grads = output_and_gradients(stacked, x)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(stacked_y, y, **close)
    torch.testing.assert_close(stacked_x_grad, x_grad, **close)
    group = split.num_heads // split.num_kv_heads
    for name, grad in grads.items():
        if name.startswith("out_proj"):
            converted = stacked_grads[name]
        else:
            rows = torch.stack([stacked_grads[f"heads.{h}.{name}"] for h in range(split.num_heads)])
            if not name.startswith("W_query"):  # a group's copies share their gradient
                rows = rows.unflatten(0, (split.num_kv_heads, group)).sum(dim=1)
            converted = rows.flatten(0, 1)
        torch.testing.assert_close(converted, grad, **close)


@settings(deadline=None, max_examples=20)
@given(splits())
def test_split_to_stacked_round_trips(case):
    split, _ = case
    before = copy.deepcopy(split.state_dict())
    random_state = torch.get_rng_state()
    stacked = split_to_stacked(split)
    back = stacked_to_split(stacked, num_kv_heads=split.num_kv_heads)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_state(back, split)
    assert_same_options(back, split)
    assert (back.d_out, back.head_dim, back.num_kv_heads) == (
        split.d_out,
        split.head_dim,
        split.num_kv_heads,
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in split.state_dict().items())
    assert all(head.dropout.p == split.dropout.p for head in stacked.heads)
    assert all(head.training == split.training for head in stacked.heads)
    # The converted module owns its memory.
    own = {p.untyped_storage().data_ptr() for p in split.parameters()}
    copies = [p.untyped_storage().data_ptr() for p in stacked.parameters()]
    assert own.isdisjoint(copies)
    assert len(set(copies)) == len(copies)


@settings(deadline=None, max_examples=20)
@given(splits(grouped=False), st.booleans())
def test_stacked_to_split_round_trips(case, out_proj):
    like, x = case
    head_dim = like.head_dim
    stacked = ph.MultiHeadAttentionWrapper(
        like.d_in,
        head_dim,
        CONTEXT,
        like.dropout.p,
        like.num_heads,
        like.W_query.bias is not None,
        out_proj=out_proj,
        out_features=like.d_out if out_proj else None,
        out_bias=like.out_proj is None or like.out_proj.bias is not None,
        rope=like.rope,
        mask=like.mask,
        scale=like.scale,
        backend=like.backend,
        dtype=torch.float64,
    ).train(like.training)
    random_state = torch.get_rng_state()
    split = stacked_to_split(stacked)
    back = split_to_stacked(split)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_state(back, stacked)
    assert_same_options(split, like)
    for mine, theirs in zip(back.heads, stacked.heads, strict=True):
        for name in ("d_in", "d_out", "context_length", "rope", "mask", "scale", "backend"):
            assert getattr(mine, name) == getattr(theirs, name)
    y, x_grad, _ = output_and_gradients(stacked, x)
    split_y, split_x_grad, _ = output_and_gradients(split, x)
    torch.testing.assert_close(split_y, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(split_x_grad, x_grad, rtol=0, atol=1e-12)


def wrapper(**options):
    return ph.MultiHeadAttentionWrapper(
        **{"d_in": 5, "d_out": 4, "context_length": 11, "dropout": 0.0, "num_heads": 3, **options}
    )


def test_stacked_to_split_lecture_example_is_equal():
    torch.manual_seed(123)
    stacked = ph.MultiHeadAttentionWrapper(3, 2, 6, 0.0, 2)
    split = stacked_to_split(stacked)
    assert (split.d_out, split.head_dim, split.out_proj) == (4, 2, None)
    x = torch.rand(2, 6, 3)
    torch.testing.assert_close(split(x), stacked(x), rtol=0, atol=1e-6)


def test_stacked_to_split_unequal_kv_heads_raise():
    split = ph.MultiHeadAttention(5, 12, 11, 0.0, 6, num_kv_heads=2)
    stacked = split_to_stacked(split)
    with torch.no_grad():
        stacked.heads[4].W_value.weight[0, 0] += 0.5
    message = r"heads\[3\] and heads\[4\] must have equal W_value.weight .*differ by up to 0\.5;"
    with pytest.raises(ConversionError, match=message):
        stacked_to_split(stacked, num_kv_heads=2)
    kept = stacked_to_split(stacked)
    assert kept.num_kv_heads == 6
    x = torch.randn(2, 5, 5)
    torch.testing.assert_close(kept(x), stacked(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("groups", [0, -1, 2, 6])
def test_stacked_to_split_num_kv_heads_must_divide(groups):
    with pytest.raises(ShapeError, match=rf"num_kv_heads must divide num_heads = 3; got {groups}"):
        stacked_to_split(wrapper(), num_kv_heads=groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope": ph.Rope()}, r"share rope .*heads\[0\] has None, heads\[1\] has Rope\(theta="),
        ({"mask": None}, r"share mask .*heads\[0\] has causal\(\), heads\[1\] has None"),
        ({"scale": 0.25}, r"share scale .*heads\[1\] has 0\.25"),
        ({"dropout": 0.5}, r"share dropout .*heads\[0\] has 0\.0, heads\[1\] has 0\.5"),
        ({"qkv_bias": True}, r"share qkv_bias .*heads\[0\] has False, heads\[1\] has True"),
        ({"context_length": 13}, r"share context_length .*has 11, heads\[1\] has 13"),
        ({"d_out": 2}, r"share d_out .*has 4, heads\[1\] has 2"),
        ({"backend": "reference"}, r"share backend .*has 'auto', heads\[1\] has 'reference'"),
        (
            {"device": "meta"},
            r"heads\[1\]\.W_query must .*on the meta device, without values; load",
        ),
        ({"dtype": torch.float64}, r"share dtype .*has torch.float32, .* has torch.float64"),
    ],
)
def test_stacked_to_split_heads_with_other_options_raise(options, message):
    stacked = wrapper()
    arguments = {"d_in": 5, "d_out": 4, "context_length": 11, "dropout": 0.0}
    stacked.heads[1] = ph.CausalAttention(**{**arguments, **options})
    with pytest.raises(ConversionError, match=message):
        stacked_to_split(stacked)


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_stacked_to_split_dropout_is_kept(p):
    split = ph.MultiHeadAttention(5, 12, 11, p, 3).double()
    stacked = split_to_stacked(split)
    assert {head.dropout.p for head in stacked.heads} == {p}
    assert stacked_to_split(stacked).dropout.p == p
    torch.manual_seed(0)
    x = torch.randn(1, 11, 5, dtype=torch.float64)
    many = x.expand(1500, 11, 5)
    # Other weights are dropped, so one draw differs; the mean over many is the same.
    means = [module(many).mean(0) for module in (split, stacked)]
    assert not torch.allclose(split(x), split(x))
    assert not torch.allclose(stacked(x), stacked(x))
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=0.08)


@pytest.mark.parametrize("num_kv_heads", [3, 1])
def test_split_to_stacked_fused_input_stays_fused(num_kv_heads):
    split = ph.MultiHeadAttention(5, 12, 11, 0.0, 3, True, num_kv_heads=num_kv_heads)
    expected = split_to_stacked(split)
    split.fuse()
    random_state = torch.get_rng_state()
    assert_same_state(split_to_stacked(split), expected)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert split.fused


def test_split_to_stacked_requires_grad_is_kept():
    split = ph.MultiHeadAttention(5, 12, 11, 0.0, 3, True)
    split.W_key.weight.requires_grad_(False)
    split.out_proj.requires_grad_(False)
    stacked = split_to_stacked(split)
    frozen = {name for name, p in stacked.named_parameters() if not p.requires_grad}
    keys = {f"heads.{h}.W_key.weight" for h in range(3)}
    assert frozen == keys | {"out_proj.weight", "out_proj.bias"}
    assert_same_state(stacked_to_split(stacked), split)
    stacked.heads[2].W_key.weight.requires_grad_(True)
    with pytest.raises(ConversionError, match=r"W_key\.weight must have one requires_grad in all"):
        stacked_to_split(stacked)


class Adapted(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer


def test_stacked_one_missing_bias_raises():
    split = ph.MultiHeadAttention(5, 12, 11, 0.0, 3)
    split.W_value = nn.Linear(5, 12, bias=True)
    message = "must all have a bias or none to be converted; got none in W_query, W_key; give"
    with pytest.raises(ConversionError, match=message):
        split_to_stacked(split)
    stacked = wrapper()
    for head in stacked.heads:
        head.W_value = nn.Linear(5, 4, bias=True)
    with pytest.raises(ConversionError, match=r"heads\[0\]\.W_query, W_key .* none in heads\[0\]"):
        stacked_to_split(stacked)


def test_stacked_weight_made_by_hooks_raises():
    split = ph.MultiHeadAttention(5, 12, 11, 0.0, 3)
    prune.l1_unstructured(split.out_proj, "weight", 0.5)
    with pytest.raises(ConversionError, match=r"out_proj must be .*; got Linear with hooks that"):
        split_to_stacked(split)


def test_stacked_wrong_module_raises_with_the_other_function():
    with pytest.raises(ConversionError, match="mha must be a MultiHeadAttention; got MultiHeadAtt"):
        split_to_stacked(wrapper())
    split = ph.MultiHeadAttention(5, 12, 11, 0.0, 3)
    for other in (split, wrapper().heads[0]):
        message = f"wrapper must be a MultiHeadAttentionWrapper; got {type(other).__name__}; a spl"
        with pytest.raises(ConversionError, match=message):
            stacked_to_split(other)


def test_stacked_adapter_raises_with_its_name():
    plain = "must be a plain nn.Linear to be converted; got tests.convert.test_stacked.Adapted, an"
    for name in ("W_query", "W_key", "W_value", "out_proj"):
        split = ph.MultiHeadAttention(5, 12, 11, 0.0, 3)
        setattr(split, name, Adapted(getattr(split, name)))
        with pytest.raises(ConversionError, match=re.escape(f"{name} {plain}")):
            split_to_stacked(split)
    stacked = wrapper()
    stacked.heads[1].W_key = Adapted(stacked.heads[1].W_key)
    with pytest.raises(ConversionError, match=re.escape(f"heads[1].W_key {plain}")):
        stacked_to_split(stacked)
    stacked = wrapper()
    stacked.heads[2] = Adapted(stacked.heads[2])
    with pytest.raises(ConversionError, match=r"heads\[2\] must be a CausalAttention; got Adapted"):
        stacked_to_split(stacked)
