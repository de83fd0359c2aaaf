"""Discovery of attention layers in our modules and transformers models."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph

SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 37,
}
PADDED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# (class, options, names of the layers, output projection)
FAMILIES = [
    ("Llama", {"num_key_value_heads": 2}, "layers.{}.self_attn", "o_proj"),
    ("Qwen3", {"num_key_value_heads": 2, "head_dim": 4}, "layers.{}.self_attn", "o_proj"),
    ("Phi", {}, "layers.{}.self_attn", "dense"),
    ("GPTNeoX", {}, "layers.{}.attention", "dense"),
    ("OPT", {"word_embed_proj_dim": 24, "ffn_dim": 29}, "decoder.layers.{}.self_attn", "out_proj"),
    ("GPT2", {}, "h.{}.attn", "c_proj"),
    ("Bert", {}, "encoder.layer.{}.attention.self", "BertSelfOutput"),
    ("ModernBert", {}, "layers.{}.attn", "Wo"),
]


@pytest.mark.parametrize(("family", "options", "name", "mixes"), FAMILIES)
def test_attention_layers_of_transformers_models(family, options, name, mixes):
    transformers = pytest.importorskip("transformers")
    special = {"cls_token_id": 1, "sep_token_id": 2} if family == "ModernBert" else {}
    config = getattr(transformers, f"{family}Config")(**SIZES, **PADDED, **special, **options)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(config)
    layers = ph.look.attention_layers(model)
    assert [(layer.index, layer.name) for layer in layers] == [(i, name.format(i)) for i in (0, 1)]
    named = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        assert layer.num_heads == 6
        where = named[id(layer.projection)]
        beside = model.get_submodule(where.rpartition(".")[0])
        assert mixes in (where.rpartition(".")[2], type(beside).__name__)


def test_attention_layers_of_encoder_and_decoder():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "d_model": 24, "d_kv": 4, "d_ff": 29, "num_layers": 1}
    with torch.device("meta"):
        model = transformers.T5Model(transformers.T5Config(**sizes, num_heads=6))
    layers = ph.look.attention_layers(model)
    assert [layer.name for layer in layers] == [
        "encoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention",
    ]
    assert [layer.num_heads for layer in layers] == [6, 6, 6]


def test_attention_layers_stacked_heads_are_one_layer():
    class MyAttentionBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ph.MultiHeadAttentionWrapper(8, 4, 16, 0.0, num_heads=3)

    layers = ph.look.attention_layers(torch.nn.Sequential(MyAttentionBlock()))
    assert [(layer.name, layer.num_heads) for layer in layers] == [("0.inner", 3)]


def test_attention_layers_single_layer_has_no_name():
    (layer,) = ph.look.attention_layers(ph.CausalAttention(8, 8, 16, 0.0))
    assert (layer.name, layer.num_heads, layer.projection) == ("", 1, None)


def test_attention_layers_refuses_torch_module():
    with pytest.raises(ph.errors.ArgumentError, match="model must have attention layers"):
        ph.look.attention_layers(torch.nn.TransformerEncoderLayer(8, 2))
