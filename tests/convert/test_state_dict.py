"""Checkpoints of whole models: converted as their modules are, and round trips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polyhead as ph
from polyhead.convert import from_transformers, state_dict
from polyhead.convert.layout import Sizes
from polyhead.convert.state_dict import LAYOUTS, plan
from polyhead.errors import ArgumentError, ConversionError, DtypeError

H, G, D = 6, 2, 8
SMALL = {"vocab_size": 31, "num_hidden_layers": 2, "intermediate_size": 23, "pad_token_id": 0}
WIDE = {**SMALL, "hidden_size": H * D, "num_attention_heads": H}
GROUPED = {**WIDE, "num_key_value_heads": G}
MODELS = {
    "gpt2": ("GPT2", {"vocab_size": 31, "n_embd": H * D, "n_head": H, "n_layer": 2}),
    "llama": ("Llama", {**GROUPED, "hidden_size": 42, "head_dim": D}),
    "mistral": ("Mistral", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 12}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": D}),
    "gemma3": ("Gemma3Text", {**GROUPED, "head_dim": D}),
    "gpt_oss": ("GptOss", {**GROUPED, "head_dim": D, "num_local_experts": 2}),
    "phi3": ("Phi3", GROUPED),
    "neox": ("GPTNeoX", WIDE),
    "bloom": ("Bloom", {"vocab_size": 31, "hidden_size": H * D, "n_head": H, "n_layer": 2}),
    "falcon": ("Falcon", {**WIDE, "new_decoder_architecture": True, "num_kv_heads": G}),
    "opt": ("OPT", {**WIDE, "ffn_dim": 23}),
    "bert": ("Bert", WIDE),
    "vit": ("ViT", {**WIDE, "image_size": 8, "patch_size": 4}),
    "t5": ("T5", {**SMALL, "d_model": 42, "d_kv": D, "num_heads": H, "num_layers": 2, "d_ff": 23}),
    "deepseek": (
        "DeepseekV3",
        {
            **WIDE,
            "num_key_value_heads": H,
            "kv_lora_rank": 14,
            "q_lora_rank": 10,
            "qk_nope_head_dim": 5,
            "qk_rope_head_dim": 4,
            "v_head_dim": 7,
            "first_k_dense_replace": 2,
        },
    ),
}


def build(layout, **more):
    transformers = pytest.importorskip("transformers")
    family, options = MODELS[layout]
    config = getattr(transformers, f"{family}Config")(**{**options, **more})
    torch.manual_seed(0)
    name = f"{family}Model"
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # biases and norms differ too
    return model


def layers_of(model):
    """Every attention layer that from_transformers supports, by its prefix; none twice."""
    found = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if type(module).__name__.endswith("Attention") and not inside:
            try:
                found[name] = from_transformers(module).state_dict()
            except ConversionError:
                continue  # T5LayerSelfAttention holds the attention and a norm
    return found


@pytest.mark.parametrize("layout", MODELS)
def test_state_dict_equals_from_transformers_per_layer(layout, is_transformers_4):
    model = build(layout)
    theirs, config = model.state_dict(), model.config.to_dict()
    ours = state_dict(theirs, source=layout, target="polyhead", config=config)
    layers = layers_of(model)
    assert len(layers) >= 2
    for prefix, layer in layers.items():
        for name, tensor in layer.items():
            assert torch.equal(ours[f"{prefix}.{name}"], tensor), name
    moved = {f"{prefix}.{name}" for prefix, layer in layers.items() for name in layer}
    if layout == "t5" and is_transformers_4:  # where from_transformers refuses a decoder's layers
        moved |= {name for name in ours if name.startswith("decoder.") and name not in theirs}
    kept = theirs.keys() & ours.keys() - moved
    assert ours.keys() == moved | kept
    assert all(ours[name] is theirs[name] for name in kept)
    if layout == "vit" and is_transformers_4:
        layout = "vit_saved"
    back = state_dict(ours, source="polyhead", target=layout, config=config)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_state_dict_deepseek_without_query_latent():
    model = build("deepseek", q_lora_rank=None)
    theirs, config = model.state_dict(), model.config.to_dict()
    ours = state_dict(theirs, source="deepseek", target="polyhead", config=config)
    for prefix, layer in layers_of(model).items():
        assert all(torch.equal(ours[f"{prefix}.{name}"], layer[name]) for name in layer)
    sizes = {"num_heads": H, "nope_head_dim": 5, "value_head_dim": 7}
    back = state_dict(ours, source="split", target="deepseek", **sizes)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_state_dict_vit_with_checkpoint_names():
    names = ("attention.query", "attention.key", "attention.value", "output.dense")
    prefix = "vit.encoder.layer.0.attention."
    theirs = {f"{prefix}{name}.weight": torch.randn(6, 6) for name in names}
    ours = state_dict(theirs, source="vit", target="polyhead")
    assert ours[f"{prefix}W_key.weight"] is theirs[f"{prefix}attention.key.weight"]
    assert list(ours)[3] == f"{prefix}out_proj.weight"
    back = state_dict(ours, source="polyhead", target="vit_saved")
    assert list(back) == list(theirs)


def test_state_dict_heads_come_from_text_config():
    config = {"vision_config": {}, "text_config": {"num_attention_heads": 2}}
    theirs = {"a.query_key_value.weight": torch.randn(12, 4), "a.dense.weight": torch.randn(4, 4)}
    ours = state_dict(theirs, source="neox", target="polyhead", config=config)
    want = state_dict(theirs, source="neox", target="polyhead", num_heads=2)
    assert all(torch.equal(ours[name], tensor) for name, tensor in want.items())
    other = state_dict(theirs, source="neox", target="polyhead", config=config, num_heads=1)
    assert not torch.equal(ours["a.W_key.weight"], other["a.W_key.weight"])


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 4, 5]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_state_dict_stacked_and_split_round_trip(G, group, head_dim, bias, out_proj, in_a_model):
    H = G * group
    split = ph.MultiHeadAttention(
        7,
        9 if out_proj else H * head_dim,
        11,
        0.0,
        H,
        bias,
        num_kv_heads=G,
        head_dim=head_dim,
        out_proj=out_proj,
    )
    stacked = ph.convert.split_to_stacked(split)
    if in_a_model:
        split, stacked = (
            nn.ModuleDict({"block": module, "norm": nn.LayerNorm(3)}) for module in (split, stacked)
        )
    got = state_dict(split.state_dict(), source="split", target="stacked", num_heads=H)
    stacked.load_state_dict(got)
    for name, tensor in got.items():
        assert torch.equal(stacked.state_dict()[name], tensor)
    back = state_dict(got, source="stacked", target="polyhead", num_kv_heads=G)
    assert back.keys() == split.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in split.state_dict().items())
    if group > 1:
        return
    fused = state_dict(back, source="polyhead", target="fused", num_heads=H, num_kv_heads=G)
    assert any("W_qkv.weight" in name for name in fused)
    again = state_dict(fused, source="fused", target="stacked", num_heads=H, num_kv_heads=G)
    assert all(torch.equal(again[name], got[name]) for name in got)


def test_state_dict_fused_module_round_trips():
    mha = ph.MultiHeadAttention(
        7, 9, 11, 0.0, H, True, num_kv_heads=G, head_dim=D, sinks=True, output_gate=True
    )
    want = mha.state_dict()
    fused = mha.fuse().state_dict()
    got = state_dict(want, source="polyhead", target="fused", num_heads=H, num_kv_heads=G)
    assert got.keys() == fused.keys()
    assert all(torch.equal(got[name], fused[name]) for name in fused)
    back = state_dict(fused, source="fused", target="polyhead", num_heads=H, num_kv_heads=G)
    assert all(torch.equal(back[name], want[name]) for name in want)


@pytest.mark.parametrize("kdim", [None, 5])
def test_state_dict_torch_packed_and_unpacked(kdim):
    model = nn.ModuleDict({"a": nn.MultiheadAttention(12, 3, kdim=kdim), "b": nn.Linear(2, 2)})
    theirs = model.state_dict()
    ours = state_dict(theirs, source="torch", target="polyhead")
    if kdim is None:
        module = ph.convert.from_torch(model["a"]).state_dict()
        assert all(torch.equal(ours[f"a.{name}"], module[name]) for name in module)
        back = state_dict(ours, source="polyhead", target="torch")
        assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    else:
        assert ours["a.W_key.weight"] is theirs["a.k_proj_weight"]
        assert ours["a.W_value.bias"].shape == (12,)
    biased = nn.ModuleDict({"a": nn.MultiheadAttention(12, 3, add_bias_kv=True)}).state_dict()
    with pytest.raises(
        ConversionError, match=r"^a\.: layout torch has no place for bias_k, bias_v"
    ):
        state_dict(biased, source="torch", target="polyhead")


def test_state_dict_one_family_becomes_another():
    gpt2 = build("gpt2")
    phi = state_dict(gpt2.state_dict(), source="gpt2", target="phi3", num_heads=H, num_kv_heads=H)
    want = gpt2.h[1].attn.c_attn.weight.T
    assert torch.equal(phi["h.1.attn.qkv_proj.weight"], want)
    assert torch.equal(phi["h.1.attn.qkv_proj.bias"], gpt2.h[1].attn.c_attn.bias)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": "gpt3"}, ArgumentError, r"source must be one of polyhead, .*got 'gpt3'"),
        ({"target": "ours"}, ArgumentError, r"target must be one of .*; got 'ours'"),
        ({"target": "neox"}, ArgumentError, r"another layout than source='neox'; got 'neox'"),
        ({}, ConversionError, r"^a\.: num_heads must be known"),
        ({"num_heads": 5}, ConversionError, r"^a\.: .*5 x \(1 \+ 1 \+ 1\) heads .*\(12, 4\)"),
        (
            {"source": "llama"},
            ConversionError,
            r"got 'llama', .*a\.dense\.weight.*; those of neox,",
        ),
        (
            {"source": "polyhead", "target": "t5"},
            ConversionError,
            r"got 'polyhead', .*bloom, falcon",
        ),
        (
            {"num_heads": 2, "target": "gemma3"},
            ConversionError,
            r"^a\.: layout gemma3 needs .*; k_norm.weight, q_norm.weight cannot be found",
        ),
        (
            {"num_heads": 2, "target": "stacked", "extra": "heads.0.W_key.weight"},
            ConversionError,
            r"^a\.: layout neox has no place for heads\.0\.W_key\.weight",
        ),
    ],
)
def test_state_dict_unsupported_input_raises_with_reason(options, error, message):
    options = {"source": "neox", "target": "polyhead", **options}
    theirs = {"a.dense.weight": torch.randn(4, 4), "a.query_key_value.weight": torch.randn(12, 4)}
    if extra := options.pop("extra", None):
        theirs[f"a.{extra}"] = torch.zeros(2)
    with pytest.raises(error, match=message):
        state_dict(theirs, **options)


def test_state_dict_name_that_would_occur_twice_raises():
    ours = {
        f"a.{name}": tensor
        for name, tensor in ph.MultiHeadAttention(8, 8, 4, 0.0, 2).state_dict().items()
    }
    with pytest.raises(ConversionError, match=r"a\.q_proj\.weight would occur twice"):
        state_dict({**ours, "a.q_proj.weight": torch.zeros(2)}, source="polyhead", target="llama")


def test_state_dict_module_as_tensors_raises():
    message = r"tensors must be tensors by name; got Linear; pass model\.state_dict\(\)"
    with pytest.raises(DtypeError, match=message):
        state_dict(nn.Linear(2, 2), source="llama", target="polyhead")


def test_state_dict_our_tensor_without_place_raises():
    mha = ph.MultiHeadAttention(8, 8, 4, 0.0, 2, True, output_gate=True, sinks=True)
    message = "layout gpt2 has no place for W_gate.bias, W_gate.weight, sinks; it holds W_key.bias"
    with pytest.raises(ConversionError, match=message):
        state_dict(mha.state_dict(), source="polyhead", target="gpt2")
    with pytest.raises(ConversionError, match="the layer: layout gpt2 has no place"):
        state_dict(mha.state_dict(), source="polyhead", target="gpt2")


@pytest.mark.parametrize("heads", [3, 5])
def test_state_dict_num_heads_must_divide_for_stacked(heads):
    mha = ph.MultiHeadAttention(7, 16, 4, 0.0, 4, num_kv_heads=2)
    message = {
        3: r"divide the 16 rows of W_query.weight, .*the 8 rows of W_key.weight; got 3",
        5: r"got 5",
    }[heads]
    with pytest.raises(ConversionError, match=message):
        state_dict(mha.state_dict(), source="split", target="stacked", num_heads=heads)


def test_state_dict_missing_stacked_head_raises():
    stacked = ph.MultiHeadAttentionWrapper(7, 4, 4, 0.0, 3, True).state_dict()
    del stacked["heads.1.W_key.bias"]
    with pytest.raises(ConversionError, match=r"heads\.1\.W_key\.bias cannot be found among the 3"):
        state_dict(stacked, source="stacked", target="split")


def test_state_dict_name_with_equal_suffix_is_no_layer():
    layer = {"a.dense.weight": torch.randn(4, 4), "a.query_key_value.weight": torch.randn(12, 4)}
    alike = {name.replace("a.", "b.my_"): tensor for name, tensor in layer.items()}
    moves = plan({**layer, **alike}, "neox", "polyhead", Sizes(2))
    assert [move.prefix for move in moves] == ["a."]


@pytest.mark.parametrize("target", ["llama", "stacked", "fused"])
def test_state_dict_lecture_causal_mask_is_dropped(target):
    """Every layer of the lecture's classes saves it; the loaded layer has mask=causal()."""
    mha = ph.MultiHeadAttention(7, 4, 4, 0.0, 2).state_dict()
    lecture = {**mha, "mask": torch.ones(4, 4).triu(1)}
    options = {"source": "split", "target": target, "num_heads": 2, "num_kv_heads": 2}
    assert state_dict(lecture, **options).keys() == state_dict(mha, **options).keys()
    with pytest.raises(ConversionError, match=r"mask must be causal .*another \(4, 4\) mask"):
        state_dict({**lecture, "mask": torch.ones(4, 4).triu(2)}, **options)


def test_state_dict_every_layout_is_tested():
    others = {"polyhead", "split", "stacked", "fused", "torch", "vit_saved"}
    assert set(LAYOUTS) - set(MODELS) == others
