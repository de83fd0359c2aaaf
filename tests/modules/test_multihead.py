"""Split heads: the lecture's MultiHeadAttention, and what modern decoders add."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import polyhead as ph
from polyhead.errors import ArgumentError, DtypeError, ShapeError


def test_the_lecture_s_numbers(lecture, lecture_input):
    torch.manual_seed(123)
    ours = ph.MultiHeadAttention(3, 2, 6, 0.0, 2)
    torch.manual_seed(123)
    theirs = lecture.MultiHeadAttention(3, 2, 6, 0.0, 2)
    expected = torch.tensor(
        [
            [0.319018, 0.485763],
            [0.294346, 0.389676],
            [0.285575, 0.359278],
            [0.269264, 0.387327],
            [0.263871, 0.392796],
            [0.257474, 0.402783],
        ]
    ).expand(2, 6, 2)
    torch.testing.assert_close(ours(lecture_input), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs(lecture_input), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("d_out", "options", "message"),
    [
        (7, {}, "d_out must be divisible by num_heads = 6: .*got 7"),
        (6, {"num_kv_heads": 4}, "num_kv_heads must divide num_heads = 6; got 4"),
        (6, {"num_kv_heads": 0}, "num_kv_heads must be .* at least 1; got 0"),
        (6, {"head_dim": 0}, "head_dim must be .* at least 1; got 0"),
        (
            7,
            {"head_dim": 2, "out_proj": False},
            r"d_out must be num_heads \* head_dim = 12 without .*got 7",
        ),
        (18, {"rope": ph.Rope()}, "head_dim must be even with rope; got 3"),
    ],
)
def test_sizes_that_do_not_fit(d_out, options, message):
    with pytest.raises(ShapeError, match=message):
        ph.MultiHeadAttention(5, d_out, 11, 0.0, 6, **options)


def test_num_heads_must_count():
    with pytest.raises(ShapeError, match=r"num_heads must be .* at least 1; got 0"):
        ph.MultiHeadAttention(5, 6, 11, 0.0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"out_proj": False},
        {"out_bias": False},
        {"num_kv_heads": 1},
        {"head_dim": 4, "num_kv_heads": 3, "rope": ph.Rope()},
    ],
)
def test_contributions_sum_to_the_output(options):
    mha = ph.MultiHeadAttention(5, 18, 11, 0.0, 6, True, **options).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    contributions = mha.head_contributions(x)
    assert contributions.shape == (2, 6, 7, 18)
    total = contributions.sum(dim=1)
    if mha.out_proj is not None and mha.out_proj.bias is not None:
        total = total + mha.out_proj.bias
    torch.testing.assert_close(total, mha(x), rtol=0, atol=1e-12)
    if mha.out_proj is None:  # each head stands in its own features
        for h in range(6):
            assert not contributions[:, h, :, : 3 * h].any()
            assert not contributions[:, h, :, 3 * h + 3 :].any()


def test_heads_work_independently():
    mha, x = ph.MultiHeadAttention(5, 21, 11, 0.0, 3), torch.randn(2, 6, 5)
    before = mha.head_contributions(x)
    with torch.no_grad():
        for name in ("W_query", "W_key", "W_value"):
            getattr(mha, name).weight[7:14] = 0.0
    after = mha.head_contributions(x)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not after[:, 1].any()
    assert before[:, 1].any()


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_grouped_heads_are_repeated_key_heads(kv_heads):
    mha = ph.MultiHeadAttention(5, 18, 11, 0.0, 6, True, num_kv_heads=kv_heads)
    full = ph.MultiHeadAttention(5, 18, 11, 0.0, 6, True)
    state = mha.state_dict()
    for name in ("W_key", "W_value"):
        assert state[f"{name}.weight"].shape == (3 * kv_heads, 5)
        for kind in ("weight", "bias"):
            rows = state[f"{name}.{kind}"].unflatten(0, (kv_heads, 3))
            state[f"{name}.{kind}"] = rows.repeat_interleave(6 // kv_heads, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 7, 5)
    torch.testing.assert_close(mha(x), full(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_cross_attention_is_torch_s(qkv_bias):
    mha = ph.MultiHeadAttention(12, 12, 11, 0.0, 3, qkv_bias, mask=None).double()
    theirs = nn.MultiheadAttention(12, 3, bias=True, batch_first=True).double()
    projections = (mha.W_query, mha.W_key, mha.W_value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.zero_()
        if qkv_bias:
            theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.weight.copy_(mha.out_proj.weight)
        theirs.out_proj.bias.copy_(mha.out_proj.bias)
    x, memory = torch.randn(2, 7, 12).double(), torch.randn(2, 5, 12).double()
    expected, weights = theirs(x, memory, memory, average_attn_weights=False)
    got, aux = mha(x, memory=memory, return_aux=ph.AuxRequest(weights=True))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(aux.weights, weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(mha.fuse()(x, memory=memory), expected, rtol=0, atol=1e-12)


def test_rope_with_a_memory_puts_the_queries_at_the_end():
    mha = ph.MultiHeadAttention(5, 12, 11, 0.0, 3, rope=ph.Rope())
    x = torch.randn(2, 7, 5)
    torch.testing.assert_close(mha(x[:, 4:], memory=x), mha(x)[:, 4:])
    given = mha(x[:, 4:], memory=x, positions=torch.arange(4, 7))
    torch.testing.assert_close(given, mha(x)[:, 4:])


FORMS = [
    {},
    {"num_kv_heads": 1},
    {"head_dim": 4, "num_kv_heads": 3, "rope": ph.Rope()},
    {"out_proj": False},
]


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("options", FORMS)
def test_fuse_moves_bits_and_keeps_the_function(qkv_bias, options):
    mha = ph.MultiHeadAttention(5, 18, 11, 0.0, 6, qkv_bias, **options)
    x, memory = torch.randn(2, 7, 5), torch.randn(2, 3, 5)
    before = {name: tensor.clone() for name, tensor in mha.state_dict().items()}
    expected, expected_cross = mha(x), mha(x, memory=memory)
    assert not mha.fused
    assert mha.fuse() is mha
    assert mha.fused
    assert mha.fuse() is mha  # twice is once
    assert not hasattr(mha, "W_query")
    assert sum(p.numel() for p in mha.parameters()) == sum(t.numel() for t in before.values())
    torch.testing.assert_close(mha(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(mha(x, memory=memory), expected_cross, rtol=0, atol=1e-6)
    assert mha.unfuse() is mha
    assert mha.unfuse() is mha
    after = mha.state_dict()
    assert list(after) == list(before)  # the order too: optimizers know parameters by number
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("options", FORMS)
def test_a_checkpoint_of_either_form_loads_into_either(options):
    def build():
        return ph.MultiHeadAttention(5, 18, 11, 0.0, 6, True, **options)

    source = build()
    x = torch.randn(2, 7, 5)
    expected = source(x)
    separate = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    fused = source.fuse().state_dict()
    assert "W_qkv.weight" in fused
    for state in (separate, fused):
        for target in (build(), build().fuse()):
            names = list(state)
            target.load_state_dict(state, strict=True)
            assert list(state) == names
            torch.testing.assert_close(target(x), expected, rtol=0, atol=1e-6)


def test_fuse_refuses_adapters():
    class Adapted(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

    mha = ph.MultiHeadAttention(5, 6, 11, 0.0, 3)
    mha.W_value = Adapted(mha.W_value)
    with pytest.raises(
        ArgumentError, match=r"W_value .*plain nn.Linear.*Adapted, an adapter; merge"
    ):
        mha.fuse()
    assert not mha.fused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "qk_norm must make a norm from a size; got True; pass nn.RMSNorm"),
        ({"qk_norm": nn.RMSNorm(2)}, r"qk_norm must make a norm .*; got RMSNorm\(\(2,\)"),
        ({"position_bias": 0.5}, r"position_bias must be a module .*; got 0\.5; pass polyhead"),
    ],
)
def test_options_of_another_type_are_refused(options, message):
    with pytest.raises(DtypeError, match=message):
        ph.MultiHeadAttention(5, 6, 11, 0.0, 3, **options)


def test_fuse_refuses_what_it_would_lose():
    mha = ph.MultiHeadAttention(5, 6, 11, 0.0, 3)
    mha.W_value = nn.Linear(5, 6, bias=True)
    with pytest.raises(ArgumentError, match=r"a bias in all of .*; got False, False, True; give"):
        mha.fuse()
    mha = ph.MultiHeadAttention(5, 6, 11, 0.0, 3)
    prune.l1_unstructured(mha.W_key, "weight", 0.5)
    with pytest.raises(
        ArgumentError, match=r"W_key .*got Linear with hooks .* weight; call .*prune.remove"
    ):
        mha.fuse()
    mha = ph.MultiHeadAttention(5, 6, 11, 0.0, 3)
    mha.W_key = nn.Linear(4, 6, bias=False)
    with pytest.raises(RuntimeError, match="Sizes of tensors"):
        mha.fuse()
    assert mha.W_query.in_features == 5  # as it was
    assert not mha.fused


def test_fuse_keeps_the_training_mode():
    mha = ph.MultiHeadAttention(5, 6, 11, 0.0, 3).eval()
    assert not any(module.training for module in mha.fuse().modules())
    assert not any(module.training for module in mha.unfuse().modules())
    assert all(module.training for module in mha.train().fuse().modules())


def test_a_call_that_raises_leaves_the_cache():
    mha = ph.MultiHeadAttention(5, 6, 11, 0.0, 3)
    with torch.no_grad():
        cache = mha.make_cache(2)
        with pytest.raises(DtypeError, match="return_aux must be"):
            mha(torch.ones(2, 3, 5), cache=cache, return_aux=True)
    assert len(cache) == 0


def test_fuse_keeps_frozen_frozen_and_refuses_a_mixture():
    mha = ph.MultiHeadAttention(5, 6, 11, 0.0, 3, True)
    mha.W_key.weight.requires_grad_(False)
    with pytest.raises(ArgumentError, match="all trainable or all frozen; got a mixture"):
        mha.fuse()
    assert not mha.fused
    frozen = ph.MultiHeadAttention(5, 6, 11, 0.0, 3, True)
    for name in ("W_query", "W_key", "W_value"):
        getattr(frozen, name).requires_grad_(False)
    frozen.fuse()
    assert not frozen.W_qkv.weight.requires_grad
    assert not frozen.W_qkv.bias.requires_grad
    frozen.unfuse()
    assert not any(p.requires_grad for p in frozen.W_value.parameters())
    assert frozen.out_proj.weight.requires_grad


def test_fused_gradients_are_the_separate_ones_side_by_side():
    mha = ph.MultiHeadAttention(5, 18, 11, 0.0, 6, num_kv_heads=2).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    mha(x).square().sum().backward()
    separate = torch.cat([p.weight.grad for p in (mha.W_query, mha.W_key, mha.W_value)])
    mha.fuse()
    mha(x).square().sum().backward()
    torch.testing.assert_close(mha.W_qkv.weight.grad, separate, rtol=0, atol=1e-12)


def test_scale_and_repr():
    mha = ph.MultiHeadAttention(5, 18, 11, 0.0, 6, num_kv_heads=2, scale=0.0, mask=None)
    x = torch.randn(2, 7, 5)
    _, aux = mha(x, return_aux=ph.AuxRequest(weights=True))
    torch.testing.assert_close(aux.weights, torch.full((2, 6, 7, 7), 1 / 7))
    text = repr(mha)
    assert "num_heads=6, num_kv_heads=2" in text
    assert "head_dim=3, context_length=11" in text
