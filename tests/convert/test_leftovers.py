"""Names below a layer that are none of its tensors: dropped as buffers, or refused by name."""

import pytest
import torch

import polyhead as ph
from polyhead.convert import state_dict
from polyhead.convert.leftovers import check_mask
from polyhead.errors import ConversionError

D = 12


def llama(prefix="model.layers.0.self_attn."):
    return {f"{prefix}{x}_proj.weight": torch.randn(D, D) for x in "qkvo"}


def neox(prefix="gpt_neox.layers.0.attention."):
    return {
        f"{prefix}query_key_value.weight": torch.randn(3 * D, D),
        f"{prefix}dense.weight": torch.randn(D, D),
    }


def gpt2(prefix="h.0.attn."):
    return {
        f"{prefix}c_attn.weight": torch.randn(D, 3 * D),
        f"{prefix}c_proj.weight": torch.randn(D, D),
    }


CAUSAL = torch.ones(1, 1, 7, 7).tril()
BUFFERS = {
    "gpt2": {"h.0.attn.bias": CAUSAL, "h.0.attn.masked_bias": torch.tensor(-1e4)},
    "neox": {
        "gpt_neox.layers.0.attention.bias": CAUSAL.bool(),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    },
    "llama": {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 7, 4),
        "model.layers.0.self_attn.rotary_emb.sin_cached": torch.ones(1, 1, 7, 4),
        "model.rotary_emb.inv_freq": torch.ones(2),
        "model.embeddings.position_ids": torch.arange(7)[None],
    },
}
LAYERS = {"gpt2": gpt2, "neox": neox, "llama": llama}


@pytest.mark.parametrize("source", BUFFERS)
def test_state_dict_old_buffers_are_dropped(source):
    theirs = LAYERS[source]()
    moved = state_dict(
        theirs | BUFFERS[source], source=source, target="polyhead", num_heads=3, num_kv_heads=3
    )
    without = state_dict(theirs, source=source, target="polyhead", num_heads=3)
    assert moved.keys() == without.keys()
    (prefix,) = {name.rpartition("W_key")[0] for name in moved if "W_key" in name}
    layer = ph.MultiHeadAttention(D, D, 7, 0.0, 3, out_bias=False)
    layer.load_state_dict({name.removeprefix(prefix): t for name, t in moved.items()}, strict=True)


def test_state_dict_custom_model_buffers_are_kept():
    own = {
        f"a.{name}": t for name, t in ph.MultiHeadAttention(D, D, 7, 0.0, 3).state_dict().items()
    }
    own["embeddings.position_ids"] = torch.arange(3)
    assert "embeddings.position_ids" in state_dict(own, source="polyhead", target="llama")


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(5, 5).tril(),
        torch.ones(5, 5).triu(1),
        torch.ones(1, 1, 5, 5, dtype=torch.uint8).tril(),
        torch.full((1, 5, 5), -torch.inf).triu(1),
        torch.full((5, 5), torch.finfo(torch.float16).min).triu(1).half(),
        torch.ones(1, 1, 5, 5, dtype=torch.bool),
    ],
)
def test_check_mask_causal_or_full_passes(mask):
    check_mask("bias", mask)


@pytest.mark.parametrize("mask", [CAUSAL.triu(-2), CAUSAL.flip(-1), torch.zeros(5, 5)])
def test_check_mask_other_mask_raises(mask):
    """GPT-Neo's local layers keep their window in attention.bias."""
    with pytest.raises(ConversionError, match=r"h\.0\.attn\.bias must be causal to be dropped"):
        state_dict({**gpt2(), "h.0.attn.bias": mask}, source="gpt2", target="polyhead")


# Names that programs write below a projection, or instead of it; the error's cause and remedy.
DEQUANTIZE, MERGE = r"dequantize the model first", r"merge it first, as model\.merge_and_unload\(\)"
PLAIN, UNWRAP = r"make it a plain weight first", r"take the wrapper's word out of the names"
EXTRA = {
    "weight.absmax": DEQUANTIZE,
    "weight.quant_map": DEQUANTIZE,
    "weight.nested_absmax": DEQUANTIZE,
    "weight.quant_state.bitsandbytes__nf4": DEQUANTIZE,
    "SCB": DEQUANTIZE,
    "weight_format": DEQUANTIZE,
    "weight_scale_inv": DEQUANTIZE,
    "weight_scale": DEQUANTIZE,
    "input_scale": DEQUANTIZE,
    "weight_zero_point": DEQUANTIZE,
    "activation_scale": DEQUANTIZE,
    "input_quantizer._amax": DEQUANTIZE,
    "lora_A": MERGE,
    "lora_A.default.weight": MERGE,
    "lora_B.weight": MERGE,
    "lora_magnitude_vector.default.weight": MERGE,
    "hada_w1_a.default": MERGE,
    "ia3_l.default": MERGE,
    "weight_mask": PLAIN,
    "weight_u": PLAIN,
    "something_new": r"choose the layout that has them, or save plain nn\.Linear",
}
INSTEAD = {
    "qweight": DEQUANTIZE,
    "weight_packed": DEQUANTIZE,
    "W_q": DEQUANTIZE,
    "weight._data": DEQUANTIZE,
    "_packed_params._packed_params": DEQUANTIZE,
    "Qidxs": DEQUANTIZE,
    "codebooks": DEQUANTIZE,
    "base_layer.weight": MERGE,
    "original_module.weight": MERGE,
    "weight_orig": PLAIN,
    "weight_v": PLAIN,
    "parametrizations.weight.original0": PLAIN,
    "parametrizations.weight.original": PLAIN,
    "_orig_mod.weight": UNWRAP,
    "module.weight": UNWRAP,
    "_fsdp_wrapped_module.weight": UNWRAP,
    "_checkpoint_wrapped_module.weight": UNWRAP,
    "linear.weight": UNWRAP,
    "something.new": r"choose the layout that has them, or save plain nn\.Linear",
}


@pytest.mark.parametrize("projection", ["q_proj", "o_proj"])
@pytest.mark.parametrize("extra", EXTRA)
def test_state_dict_unknown_name_next_to_weight_raises(extra, projection):
    theirs = llama() | llama("model.layers.1.self_attn.")
    theirs[f"model.layers.1.self_attn.{projection}.{extra}"] = torch.zeros(3)
    named = rf"model\.layers\.1\.self_attn\.: .*{projection}\.{extra}.*{EXTRA[extra]}"
    with pytest.raises(ConversionError, match=named):
        state_dict(theirs, source="llama", target="polyhead")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("projection", ["q_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("name", INSTEAD)
def test_state_dict_unknown_name_for_weight_raises(name, projection, layers):
    """In one layer of two, where the other moved, or in all, where none was found."""
    prefixes = [f"model.layers.{layer}.self_attn." for layer in range(2)]
    theirs = llama(prefixes[0]) | llama(prefixes[1])
    for prefix in prefixes[-layers:]:
        weight = theirs.pop(f"{prefix}{projection}.weight")
        theirs[f"{prefix}{projection}.{name}"] = weight
    if projection == "o_proj" and layers == 2:
        named = r"needs o_proj\.weight, which cannot be found"  # other layers have such names
    else:
        named = rf"{projection}\.weight, .*got {projection}\.{name}.*{INSTEAD[name]}"
    with pytest.raises(ConversionError, match=named):
        state_dict(theirs, source="llama", target="polyhead")


@pytest.mark.parametrize("name", ["q_proj_scale", "k_norm.weight", "sinks", "alpha", "q_ln.weight"])
def test_state_dict_unknown_name_in_family_layer_raises(name):
    theirs = llama() | {f"model.layers.0.self_attn.{name}": torch.ones(D)}
    with pytest.raises(ConversionError, match=rf"layout llama has no place for {name}"):
        state_dict(theirs, source="llama", target="polyhead")


@pytest.mark.parametrize("below", ["W_query.lora_A.weight", "out_proj.weight_scale", "alpha"])
@pytest.mark.parametrize("target", ["llama", "stacked", "fused"])
def test_state_dict_name_below_our_projection_raises(below, target):
    ours = {
        f"a.{name}": t for name, t in ph.MultiHeadAttention(D, D, 7, 0.0, 3).state_dict().items()
    }
    options = {"source": "polyhead", "target": target, "num_heads": 3, "num_kv_heads": 3}
    # A custom block may have other submodules next to the attention.
    kept = state_dict(ours | {"a.norm.weight": torch.ones(3)}, **options)
    assert "a.norm.weight" in kept
    with pytest.raises(ConversionError, match=f"layout polyhead has no place for {below}"):
        state_dict(ours | {f"a.{below}": torch.ones(3)}, **options)


def test_state_dict_adapter_in_stacked_head_raises():
    stacked = ph.MultiHeadAttentionWrapper(D, 4, 7, 0.0, 3).state_dict()
    lecture = stacked | {f"heads.{h}.mask": torch.ones(7, 7).triu(1) for h in range(3)}
    want = state_dict(stacked, source="stacked", target="split")
    assert state_dict(lecture, source="stacked", target="split").keys() == want.keys()
    odd = stacked | {"heads.1.W_key.lora_B.weight": torch.ones(3)}
    with pytest.raises(ConversionError, match=r"no place for heads\.1\.W_key\.lora_B\.weight"):
        state_dict(odd, source="stacked", target="split")


def test_state_dict_bert_norm_stays_distances_raise():
    names = ("self.query", "self.key", "self.value", "output.dense")
    bert = {f"l.0.attention.{name}.weight": torch.zeros(D, D) for name in names}
    norm = {"l.0.attention.output.LayerNorm.weight": torch.ones(D)}
    assert norm.keys() <= state_dict(bert | norm, source="bert", target="polyhead").keys()
    distances = {"l.0.attention.self.distance_embedding.weight": torch.ones(9, 4)}
    with pytest.raises(ConversionError, match=r"no place for self\.distance_embedding\.weight"):
        state_dict(bert | distances, source="bert", target="polyhead")
