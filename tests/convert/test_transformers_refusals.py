"""Layers of transformers that cannot be converted, and modules that do not fit one: all reasons."""

import copy

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.convert import from_transformers, to_transformers
from polyhead.errors import ConversionError

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("unknown", [nn.Linear(3, 3), nn.MultiheadAttention(4, 2)])
def test_from_transformers_unknown_class_lists_known_ones(unknown):
    known = r"one of .*LlamaAttention, MistralAttention, Qwen2Attention"
    message = known + rf".*; got {type(unknown).__name__}; pass .*layers\[0\]\.self_attn"
    with pytest.raises(ConversionError, match=message):
        from_transformers(unknown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, r"the mask of the layer .*causal\(\); got None"),
        ({"rope": ph.Rope(7.0)}, r"the rope of the layer .*theta=500.0.*; got Rope\(theta=7.0"),
        ({"scale": 0.5}, r"the scale of the layer .*0.35.*; got 0.5"),
        ({"softcap": 2.0}, r"the softcap of the layer .*None; got 2.0"),
        ({"num_heads": 2, "num_kv_heads": 2}, r"the num_heads of the layer .*6; got 2"),
        ({"qk_norm": nn.RMSNorm}, r"the qk_norm of the layer .*'None'; got 'RMSNorm"),
        ({"position_bias": nn.Identity()}, r"the position_bias .*'None'; got 'Identity"),
        ({"dropout": 0.5}, r"the dropout of the layer .*0.125; got 0.5"),
        ({"out_bias": True}, r"weights as the layer; o_proj.bias is in only one"),
        ({"sinks": True}, r"layout llama has no place for sinks"),
        ({"output_gate": True}, r"layout llama has no place for W_gate.weight"),
        ({"dtype": torch.float32}, r"q_proj.weight must be torch.float64.*; got torch.float32"),
    ],
)
def test_to_transformers_other_function_raises(build_layer, change, message):
    layer = build_layer("llama")
    before = copy.deepcopy(layer.state_dict())
    options = {
        "d_in": 42,
        "d_out": 42,
        "context_length": 37,
        "dropout": 0.125,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "out_bias": False,
        "rope": ph.Rope(500.0),
        "dtype": torch.float64,
    }
    to_transformers(ph.MultiHeadAttention(**options), copy.deepcopy(layer))
    with pytest.raises(ConversionError, match=message):
        to_transformers(ph.MultiHeadAttention(**{**options, **change}), layer)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def test_to_transformers_latent_heads_need_latent_layer(build_layer, layer_cases, modeling):
    latent, plain = build_layer("deepseek"), build_layer("llama")
    with pytest.raises(
        ConversionError, match=r"must be a MultiHeadAttention .*got MultiHeadLatent"
    ):
        to_transformers(from_transformers(latent), plain)
    options = {**layer_cases["deepseek"].options, "kv_lora_rank": 13}
    config = transformers.DeepseekV3Config(**options)
    other = modeling(layer_cases["deepseek"]).DeepseekV3Attention(config, 0)
    with pytest.raises(ConversionError, match=r"the kv_rank of the layer .*13; got 14"):
        to_transformers(from_transformers(latent), other)


def test_from_transformers_decoder_without_is_causal_raises(build_layer):
    """As in transformers 4, where self- and cross-attention are of one class."""
    layer = build_layer("t5").train()
    layer.is_causal, layer.is_decoder = None, True
    with pytest.raises(ConversionError, match="a T5Attention of a decoder must have the attribute"):
        from_transformers(layer)
    layer.is_decoder = False
    assert from_transformers(layer).mask is None


def test_from_transformers_unsupported_layer_raises(build_layer, layer_cases, modeling):
    gpt2 = modeling(layer_cases["gpt2"]).GPT2Attention
    config = transformers.GPT2Config(**layer_cases["gpt2"].options)
    with pytest.raises(ConversionError, match="attend to its own tokens; got one for cross"):
        from_transformers(gpt2(config, is_cross_attention=True, layer_idx=0))
    gemma = build_layer("gemma2")
    gemma.config.use_bidirectional_attention = True
    with pytest.raises(ConversionError, match="use_bidirectional_attention must be off; got True"):
        from_transformers(gemma)
    bert = build_layer("bert, alone")
    bert.position_embedding_type = "relative_key"
    with pytest.raises(ConversionError, match='must be "absolute"; got "relative_key"'):
        from_transformers(bert)
    neox = build_layer("neox")
    neox.query_key_value = nn.Sequential(neox.query_key_value)
    with pytest.raises(ConversionError, match=r"query_key_value must be a plain nn\.Linear"):
        from_transformers(neox)
    bias = build_layer("qwen3")
    bias.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ConversionError, match="layout qwen3 has no place for extra; it holds k_"):
        from_transformers(bias)
