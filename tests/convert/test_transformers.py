"""Every supported attention layer of transformers: the same function, the same bits back."""

import copy
import math

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.convert import from_transformers, to_transformers

transformers = pytest.importorskip("transformers")


B, T = 2, 11


def in_float64(layer):
    """transformers' layer with norms that do not always compute in float32."""
    layer = copy.deepcopy(layer)
    for parent in list(layer.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = nn.RMSNorm(norm.weight.shape, getattr(norm, "eps", 1e-6)).double()
                offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
                exact.weight = nn.Parameter(norm.weight.detach() + offset)
                setattr(parent, name, exact)
    return layer


def turns(case):
    """cos and sin computed here in float64: transformers computes angles in float32."""
    steps = torch.arange(0, case.rotary, 2, dtype=torch.float64) / case.rotary
    angles = torch.arange(T, dtype=torch.float64)[:, None] / case.theta**steps
    if case.layer != "GptOss":
        angles = torch.cat([angles, angles], dim=-1)
    angles = angles[None].expand(B, -1, -1)
    return angles.cos(), angles.sin()


def exact_softmax(scores, dim, dtype=None):
    """RMSNorm in the dtype of its input: most of transformers' compute in float32."""
    return torch.softmax(scores, dim)


def output_of(case, layer, x, allowed, modeling, is_transformers_4):
    """Output of transformers' layer for x and a mask `allowed` (B, 1, T, T)."""
    numbers = torch.zeros(B, 1, T, T).double().masked_fill(~allowed, -math.inf)
    named = {} if case.rotary is None else {"position_embeddings": turns(case)}
    if case.layer == "T5":
        positions = {"cache_position": torch.arange(T)} if is_transformers_4 else {}
        return layer(x, mask=numbers, **positions)[0]
    if case.layer == "Falcon":
        alibi = None
        if case.rotary is None:
            ones = torch.ones(B, T, dtype=torch.long)
            alibi = modeling(case).build_alibi_tensor(ones, layer.num_heads, x.dtype)
        return layer(x, alibi, numbers, **named)[0]
    if case.layer == "Bloom":
        distance = torch.arange(T).double().expand(B * layer.num_heads, 1, T)
        alibi = ph.alibi_slopes(layer.num_heads).repeat(B)[:, None, None] * distance
        return layer(x, torch.zeros_like(x), alibi, numbers)[0]
    if case.layer == "ViT" and is_transformers_4:
        return layer(x)  # which takes no mask
    if case.layer == "Bert":
        seen = []
        layer.output.dense.register_forward_hook(lambda module, args, y: seen.append(y))
        layer(x, attention_mask=numbers)
        return seen[0]
    return layer(x, attention_mask=numbers, **named)[0]


def test_from_transformers_same_output_bits_round_trip(
    modeling, build_layer, layer_cases, is_transformers_4, layer_name, monkeypatch
):
    if is_transformers_4 and layer_name in ("bert, a decoder", "t5, a decoder"):
        pytest.skip("in transformers 4 these do not say that they are causal, and are refused")
    case, layer = layer_cases[layer_name], build_layer(layer_name)
    ours = from_transformers(layer)
    assert ours.mask == case.mask
    assert not ours.training

    x = torch.randn(B, T, ours.d_in, dtype=torch.float64)
    padding = ph.mask.lengths([T, T - 2])  # shorter than a window: every query has a key
    if case.layer == "ViT" and is_transformers_4:
        padding = ph.mask.lengths([T, T])
    rule = padding if case.mask is None else case.mask & padding
    allowed = rule.materialize(T, T).expand(B, 1, T, T)
    with torch.no_grad(), monkeypatch.context() as patch:
        got = ours(x, mask=padding)
        patch.setattr(nn.functional, "softmax", exact_softmax)
        want = output_of(case, in_float64(layer), x, allowed, modeling, is_transformers_4)
    digits = 1e-5 if is_transformers_4 and case.layer == "T5" else 1e-12  # scores are float32 there
    torch.testing.assert_close(got, want, rtol=digits, atol=digits * want.abs().max().item())

    other = build_layer(layer_name)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for parameter in other.parameters():
        nn.init.constant_(parameter, math.nan)
    for key in ("LayerNorm.weight", "LayerNorm.bias"):  # stays with the model
        if case.layer == "Bert":
            other.output.get_parameter(key).data = layer.output.get_parameter(key).detach()
    assert to_transformers(ours, other) is other
    assert before.keys() == other.state_dict().keys()
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    again = from_transformers(other).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "neox", "phi3", "deepseek", "bert", "t5"])
def test_from_transformers_dropout_mode_and_grad_are_kept(build_layer, name):
    layer = build_layer(name).train().requires_grad_(False)
    random_state = torch.get_rng_state()
    ours = from_transformers(layer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert ours.training
    assert ours.dropout.p == {"t5": 0.1}.get(name, 0.125)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    to_transformers(ours.requires_grad_(True), layer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    copies = [parameter.untyped_storage().data_ptr() for parameter in ours.parameters()]
    assert own.isdisjoint(copies)
    assert len(set(copies)) == len(copies)


def test_to_transformers_trained_weights_run_in_the_layer(build_layer):
    layer = build_layer("neox")
    ours = from_transformers(layer)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    want = layer.query_key_value.weight * 1.5
    to_transformers(ours.fuse(), layer)
    assert ours.fused
    assert torch.equal(layer.query_key_value.weight, want)


def test_from_transformers_t5_layers_share_one_table(build_layer, is_transformers_4):
    first, later = build_layer("t5"), build_layer("t5, no table")
    ours = [from_transformers(layer) for layer in (first, later)]
    ours[1].position_bias = ours[0].position_bias
    x = torch.randn(B, T, 42, dtype=torch.float64)
    with torch.no_grad():
        bias = first.compute_bias(T, T)
        positions = {"cache_position": torch.arange(T)} if is_transformers_4 else {}
        want = later(x, position_bias=bias, **positions)[0]
        digits = 1e-5 if is_transformers_4 else 1e-12
        torch.testing.assert_close(ours[1](x), want, rtol=digits, atol=digits)


def test_from_transformers_bloom_in_a_running_model(layer_cases):
    """Their slopes are powers in float32, ours are rounded to it once."""
    config = transformers.BloomConfig(
        **layer_cases["bloom"].options, vocab_size=31, n_layer=1, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = transformers.BloomModel(config).eval()
    seen = {}

    def remember(module, args, kwargs, output):
        seen["x"], seen["residual"], seen["y"] = args[0], args[1], output[0]

    layer = model.h[0].self_attention
    nn.init.normal_(layer.query_key_value.weight, std=0.3)
    layer.register_forward_hook(remember, with_kwargs=True)
    with torch.no_grad():
        model(torch.randint(31, (B, T)))
        ours = from_transformers(layer)(seen["x"])
    torch.testing.assert_close(ours, seen["y"] - seen["residual"], rtol=1e-5, atol=1e-5)
