"""Latent attention held to DeepSeek's published layer."""

import copy

import pytest
import torch
from torch import nn

import polyhead as ph
import polyhead.modules.latent
from polyhead.modules.latent import MultiHeadLatentAttention


def deepseek(query_rank, *, interleave=True, bias=False, yarn=False):
    """Their layer, our Rope for it, and cos and sin by their own rotary embedding."""
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    parameters = {"rope_type": "default", "rope_theta": 100.0}
    scaling = None
    if yarn:
        scaling = ph.YarnScaling(4.0, 8, beta_fast=4.0, mscale=0.7, mscale_all_dim=1.3)
        parameters |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
        parameters |= {"beta_fast": 4.0, "beta_slow": 1.0, "mscale": 0.7, "mscale_all_dim": 1.3}
    # Distinct sizes, so that a swapped axis cannot pass.
    config = DeepseekV3Config(
        hidden_size=19,
        num_attention_heads=3,
        num_key_value_heads=3,
        kv_lora_rank=11,
        q_lora_rank=query_rank,
        qk_nope_head_dim=5,
        qk_rope_head_dim=4,
        v_head_dim=7,
        max_position_embeddings=32,
        rope_parameters=parameters,
        rope_interleave=interleave,
        attention_bias=bias,
        attn_implementation="eager",
    )
    layer = modeling.DeepseekV3Attention(config, 0).requires_grad_(False)
    for norm in (layer.kv_a_layernorm, layer.q_a_layernorm):
        if norm is not None:
            norm.weight.uniform_(0.5, 1.5)
    rope = ph.Rope(100.0, interleaved=interleave, scaling=scaling)
    return layer, rope, modeling.DeepseekV3RotaryEmbedding(config)


def ours_of(layer, rope, dtype=torch.float32):
    """Their weights in our module: kv_b_proj has, head by head, keys and values together."""
    bias, theirs = layer.o_proj.bias is not None, layer.config
    nope, E = theirs.qk_nope_head_dim, theirs.v_head_dim
    names = {"W_kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "out_proj": "o_proj"}
    if layer.q_lora_rank is None:
        names |= {"W_query": "q_proj"}
    else:
        names |= {"W_query_down": "q_a_proj", "q_norm": "q_a_layernorm", "W_query": "q_b_proj"}
    mla = MultiHeadLatentAttention(
        19,
        19,
        32,
        0.0,
        theirs.num_attention_heads,
        kv_rank=theirs.kv_lora_rank,
        query_rank=layer.q_lora_rank,
        nope_head_dim=nope,
        rope_head_dim=theirs.qk_rope_head_dim,
        value_head_dim=E,
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        scale=layer.scaling,
        dtype=dtype,
    )
    state = {
        f"{name}.{kind}": tensor
        for name, their_name in names.items()
        for kind, tensor in layer.get_submodule(their_name).state_dict().items()
    }
    keys, values = layer.kv_b_proj.weight.unflatten(0, (-1, nope + E)).split((nope, E), dim=1)
    state |= {"W_key.weight": keys.flatten(0, 1), "W_value.weight": values.flatten(0, 1)}
    mla.load_state_dict(state)
    return mla.requires_grad_(False)


def in_double(layer):
    """Their layer in float64, without the float32 that its norm and eager softmax insist on."""
    layer = copy.deepcopy(layer).double()
    layer.config._attn_implementation = "sdpa"
    for name in ("kv_a_layernorm", "q_a_layernorm"):
        theirs = getattr(layer, name)
        if theirs is not None:
            norm = nn.RMSNorm(len(theirs.weight), theirs.variance_epsilon, dtype=torch.float64)
            norm.weight.data.copy_(theirs.weight)
            setattr(layer, name, norm)
    return layer


def angles_in_double(layer, rope, T):
    """cos and sin as their layer takes them: each pair's angle twice."""
    R = layer.config.qk_rope_head_dim
    exponents = torch.arange(0, R, 2, dtype=torch.float64) / R
    frequencies, factor = rope.theta**-exponents, 1.0
    if rope.scaling is not None:
        frequencies, factor = rope.scaling.frequencies(rope.theta, exponents, torch.arange(T))
    angles = (torch.arange(T).double()[:, None] * frequencies).repeat(1, 2)[None]
    return angles.cos() * factor, angles.sin() * factor


DEEPSEEKS = [
    {"query_rank": 13},
    {"query_rank": None},
    {"query_rank": 13, "bias": True, "interleave": False},
    {"query_rank": 13, "yarn": True},
]


@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("options", DEEPSEEKS, ids=str)
def test_deepseek_s_layer(options, absorb, assert_as_good_as_eager):
    layer, rope, rotary = deepseek(**options)
    x = torch.randn(2, 17, 19)
    mask = torch.zeros(17, 17).masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf)[
        None, None
    ]
    eager, _ = layer(x, rotary(x, torch.arange(17)[None]), mask)
    exact, _ = in_double(layer)(x.double(), angles_in_double(layer, rope, 17), mask.double())
    torch.testing.assert_close(eager.double(), exact, rtol=0, atol=1e-6)  # two runs of one layer
    ours = ours_of(layer, rope, torch.float64)(x.double(), absorb=absorb)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    assert_as_good_as_eager(ours_of(layer, rope)(x, absorb=absorb), eager, exact)


@pytest.mark.parametrize("chunks", [[1] * 17, [12, 1, 1, 3], [17]])
def test_decoding_is_deepseek_s_layer_uncached(chunks):
    layer, rope, _ = deepseek(query_rank=13, yarn=True)
    mla = ours_of(layer, rope, torch.float64)
    x = torch.randn(2, 17, 19, dtype=torch.float64)
    mask = torch.zeros(17, 17).double().masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf)
    expected, _ = in_double(layer)(x, angles_in_double(layer, rope, 17), mask[None, None])
    cache = mla.make_cache(2)
    y = torch.cat([mla(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
