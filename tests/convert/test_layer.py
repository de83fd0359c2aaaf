"""Shapes of one layer's tensors: any that does not fit is refused, in both directions."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.convert import state_dict
from polyhead.errors import ConversionError

H, G, D, d = 6, 2, 8, 42  # d is not H * D
NORMS = {"q_norm.weight": (D,), "k_norm.weight": (D,)}


def separate(queries, keys, values, output, *, kv=G, width=d, bias=False):
    """Shapes of a layer with one weight per projection."""
    shapes = {
        f"{queries}.weight": (H * D, width),
        f"{keys}.weight": (kv * D, width),
        f"{values}.weight": (kv * D, width),
        f"{output}.weight": (width, H * D),
    }
    biases = {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    return shapes | (biases if bias else {})


def fused(name, output, heads, *, width=d):
    """Shapes of a layer with one weight for queries, keys and values."""
    return {
        f"{name}.weight": (heads * D, width),
        f"{name}.bias": (heads * D,),
        f"{output}.weight": (width, H * D),
        f"{output}.bias": (width,),
    }


LLAMA = separate("q_proj", "k_proj", "v_proj", "o_proj", bias=True)
LATENT = {
    "kv_a_proj_with_mqa.weight": (14 + 4, d),
    "kv_a_layernorm.weight": (14,),
    "kv_b_proj.weight": (H * (5 + 7), 14),
    "o_proj.weight": (d, H * 7),
}
SHAPES = {
    "gpt2": {name: shape[::-1] for name, shape in fused("c_attn", "c_proj", 3 * H).items()},
    "llama": LLAMA,
    "qwen3": LLAMA | NORMS,
    "gemma2": separate("q_proj", "k_proj", "v_proj", "o_proj"),
    "gemma3": LLAMA | NORMS,
    "gpt_oss": LLAMA | {"sinks": (H,)},
    "phi3": fused("qkv_proj", "o_proj", H + 2 * G),
    "neox": fused("query_key_value", "dense", 3 * H),
    "bloom": fused("query_key_value", "dense", 3 * H),
    "falcon": fused("query_key_value", "dense", H + 2 * G),
    "opt": separate("q_proj", "k_proj", "v_proj", "out_proj", kv=H, bias=True),
    "bert": separate("self.query", "self.key", "self.value", "output.dense", kv=H, bias=True),
    "vit_saved": separate(
        "attention.query", "attention.key", "attention.value", "output.dense", kv=H, bias=True
    ),
    "t5": separate("q", "k", "v", "o", kv=H) | {"relative_attention_bias.weight": (9, H)},
    "torch": {
        "in_proj_weight": (3 * H * D, H * D),
        "in_proj_bias": (3 * H * D,),
        "out_proj.weight": (H * D, H * D),
        "out_proj.bias": (H * D,),
    },
    "deepseek": LATENT
    | {
        "q_a_proj.weight": (10, d),
        "q_a_layernorm.weight": (10,),
        "q_b_proj.weight": (H * (5 + 4), 10),
    },
    "deepseek, direct": LATENT | {"q_proj.weight": (H * (5 + 4), d)},
    "stacked": {
        f"heads.{h}.W_{what}.weight": (D, d) for h in range(H) for what in ("query", "key", "value")
    }
    | {"out_proj.weight": (d, H * D), "out_proj.bias": (d,)},
    "fused": fused("W_qkv", "out_proj", H + 2 * G),
}
SIZES = {"num_heads": H, "num_kv_heads": G, "nope_head_dim": 5, "value_head_dim": 7}
# Sizes that the checkpoint does not determine: the number of buckets, the widths of our layer.
FREE = {("t5", "relative_attention_bias.weight", 0), ("split t5", "position_bias.weight", 0)}
FREE |= {("fused", "W_qkv.weight", 1)}


def sizes_for(case):
    kv = {"gpt2": H, "neox": H, "bloom": H, "opt": H, "bert": H, "vit_saved": H, "t5": H}
    kv |= {"torch": H, "stacked": H}
    return SIZES | {"num_kv_heads": kv.get(case, G)}


def layer(case, prefix="a.0.attn."):
    torch.manual_seed(0)
    return {prefix + name: torch.randn(shape) for name, shape in SHAPES[case].items()}


def moved(case, tensors, **options):
    source = case.partition(",")[0]
    return state_dict(tensors, source=source, target="polyhead", **{**sizes_for(case), **options})


def back(case, tensors):
    target = case.partition(",")[0]
    return state_dict(tensors, source="polyhead", target=target, **sizes_for(case))


@pytest.mark.parametrize("case", SHAPES)
def test_layer_valid_shapes_round_trip_bit_for_bit(case):
    theirs = layer(case)
    again = back(case, moved(case, theirs))
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("case", SHAPES)
@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.data())
def test_layer_any_changed_size_raises(case, data):
    """Any tensor, any dimension, a little or a lot more or less: an error names the layer."""
    theirs = layer(case)
    name = data.draw(st.sampled_from(sorted(theirs)))
    axis = data.draw(st.integers(0, theirs[name].ndim - 1))
    below = name.removeprefix("a.0.attn.")
    if (case, below, axis) in FREE:
        return
    shape = list(theirs[name].shape)
    size = data.draw(st.integers(1, 3 * shape[axis]).filter(lambda n: n != shape[axis]))
    shape[axis] = size
    theirs[name] = torch.zeros(shape)
    with pytest.raises(ConversionError, match=r"^a\.0\.attn\.: "):
        moved(case, theirs)


@pytest.mark.parametrize("case", SHAPES)
@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.data())
def test_layer_any_changed_size_of_ours_raises(case, data):
    ours = moved(case, layer(case))
    name = data.draw(st.sampled_from(sorted(ours)))
    axis = data.draw(st.integers(0, ours[name].ndim - 1))
    below = name.removeprefix("a.0.attn.")
    # Without a bias, our layer may have any output width.
    wide = below == "out_proj.weight" and axis == 0 and "a.0.attn.out_proj.bias" not in ours
    if wide or (f"split {case}", below, axis) in FREE:
        return
    shape = list(ours[name].shape)
    shape[axis] = data.draw(st.integers(1, 3 * shape[axis]).filter(lambda n: n != shape[axis]))
    ours[name] = torch.zeros(shape)
    with pytest.raises(ConversionError, match=r"^a\.0\.attn\.: "):
        back(case, ours)


@pytest.mark.parametrize("case", SHAPES)
def test_layer_another_rank_raises(case):
    for name, tensor in layer(case).items():
        for odd in (tensor[None], tensor[0]):
            with pytest.raises(ConversionError, match=r"must have . dimensions?; got"):
                moved(case, layer(case) | {name: odd})
    for name, tensor in moved(case, layer(case)).items():
        with pytest.raises(ConversionError, match=r"must have . dimensions?; got"):
            back(case, moved(case, layer(case)) | {name: tensor[None]})


@pytest.mark.parametrize("d_model", [48, 768])
def test_layer_nanogpt_weights_as_gpt2_raise(d_model):
    """nanoGPT stores (out, in) under GPT-2's names: 16 rows became W_query without an error."""
    theirs = {
        "h.0.attn.c_attn.weight": torch.randn(3 * d_model, d_model),
        "h.0.attn.c_proj.weight": torch.randn(d_model, d_model),
    }
    message = (
        rf"h\.0\.attn\.: c_proj\.weight must take the {d_model // 3} features .*"
        rf"c_attn\.weight \({3 * d_model}, {d_model}\).*; got \({d_model}, {d_model}\); .*nanoGPT.*"
        r"transpose c_attn\.weight, c_proj\.weight first \(tensor\.T\)"
    )
    with pytest.raises(ConversionError, match=message):
        state_dict(theirs, source="gpt2", target="polyhead")
    # The remedy works.
    turned = {name: tensor.T for name, tensor in theirs.items()}
    ours = state_dict(turned, source="gpt2", target="polyhead")
    want = theirs["h.0.attn.c_attn.weight"][d_model : 2 * d_model]
    assert torch.equal(ours["h.0.attn.W_key.weight"], want)


@pytest.mark.parametrize("case", [case for case in SHAPES if case != "torch"])
def test_layer_transposed_weights_raise(case):
    turned = {name: t.T if t.ndim == 2 else t for name, t in layer(case).items()}
    with pytest.raises(ConversionError, match=r"^a\.0\.attn\.: "):
        moved(case, turned)


def test_layer_transposed_weights_raise_by_config():
    """Four weights (42, 48) and (48, 42) fit both ways; the config's width and head size decide."""
    straight = {
        f"x.{name}": torch.zeros(shape)
        for name, shape in separate("q_proj", "k_proj", "v_proj", "o_proj", kv=H).items()
    }
    turned = {name: tensor.T for name, tensor in straight.items()}
    for config in ({"hidden_size": d}, {"head_dim": D, "num_attention_heads": H}):
        options = {"source": "llama", "target": "polyhead", "config": config}
        state_dict(straight, **options)
        with pytest.raises(ConversionError, match=r"transpose q_proj\.weight.*\(tensor\.T\)"):
            state_dict(turned, **options)


def test_layer_wrong_num_heads_raises():
    for sizes in ({"num_heads": 5}, {"num_heads": H, "num_kv_heads": 3}, {"num_kv_heads": 5}):
        with pytest.raises(ConversionError, match="check num_heads, num_kv_heads and the config"):
            state_dict(layer("llama"), source="llama", target="polyhead", **sizes)
    with pytest.raises(ConversionError, match=r"num_heads must be the 6 heads .* stacked; got 3"):
        state_dict(layer("stacked"), source="stacked", target="polyhead", num_heads=3)


@pytest.mark.parametrize("source", ["qwen3", "gemma3"])
@pytest.mark.parametrize("kv", [G, H])
@pytest.mark.parametrize("known", [True, False])
def test_layer_norms_over_all_heads_raise(source, kv, known):
    """OLMo 2's, which pass by name."""
    olmo = separate("q_proj", "k_proj", "v_proj", "o_proj", kv=kv)
    olmo |= {"q_norm.weight": (H * D,), "k_norm.weight": (kv * D,)}
    tensors = {f"l.0.{name}": torch.zeros(shape) for name, shape in olmo.items()}
    sizes = {"num_heads": H, "num_kv_heads": kv} if known else {}
    with pytest.raises(ConversionError, match=r"[qk]_norm\.weight must .*OLMo 2's"):
        state_dict(tensors, source=source, target="polyhead", **sizes)
    with pytest.raises(ConversionError, match=r"layout llama has no place for q_norm\.weight, k_n"):
        state_dict(tensors, source="llama", target="polyhead", **sizes)


def test_layer_norms_of_a_single_head_need_num_heads():
    one = {
        f"{name}.weight": torch.zeros(shape)
        for name, shape in {
            "q_proj": (D, d), "k_proj": (D, d), "v_proj": (D, d), "o_proj": (d, D),
            "q_norm": (D,), "k_norm": (D,),
        }.items()
    }  # fmt: skip
    with pytest.raises(ConversionError, match=r"pass num_heads=1, or"):
        state_dict(one, source="qwen3", target="polyhead")
    assert len(state_dict(one, source="qwen3", target="polyhead", num_heads=1)) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_proj.weight": torch.uint8}, r"q_proj\.weight must be floating .* got torch\.uint8"),
        (
            {"o_proj.weight": torch.int8},
            r"o_proj\.weight must be floating .*model\.dequantize\(\)",
        ),
        ({"k_proj.bias": torch.int64}, r"k_proj\.bias must be floating"),
        ({"v_proj.weight": torch.float8_e4m3fn}, r"16 bits or more; got torch\.float8_e4m3fn"),
        ({"v_proj.weight": torch.float8_e5m2}, r"float8_e5m2, quantized values"),
        ({"q_proj.weight": torch.bool}, r"got torch\.bool"),
        ({"q_proj.weight": torch.complex64}, r"got torch\.complex64"),
        (
            {"q_proj.weight": torch.float16},
            r"q_proj\.bias must be torch\.float16, as q_proj\.weight is; it is torch\.float32",
        ),
        ({"v_proj.bias": torch.bfloat16}, r"v_proj\.bias must be torch\.float32.*it is torch\.bf"),
    ],
)
def test_layer_quantized_or_mixed_dtype_raises(change, message):
    theirs = layer("qwen3")
    for name, dtype in change.items():
        theirs[f"a.0.attn.{name}"] = theirs[f"a.0.attn.{name}"].to(dtype)
    with pytest.raises(ConversionError, match=message):
        moved("qwen3", theirs)
    ours = state_dict(layer("qwen3"), source="qwen3", target="polyhead")
    for name, dtype in change.items():
        name = name.replace("q_proj", "W_query").replace("k_proj", "W_key")
        name = name.replace("v_proj", "W_value").replace("o_proj", "out_proj")
        ours[f"a.0.attn.{name}"] = ours[f"a.0.attn.{name}"].to(dtype)
    with pytest.raises(ConversionError, match=r"^a\.0\.attn\.: "):
        back("qwen3", ours)


def test_layer_norms_and_sinks_may_have_another_dtype():
    theirs = {name: tensor.bfloat16() for name, tensor in layer("qwen3").items()}
    for name in ("q_norm", "k_norm"):
        theirs[f"a.0.attn.{name}.weight"] = theirs[f"a.0.attn.{name}.weight"].float()
    ours = moved("qwen3", theirs)
    assert ours["a.0.attn.q_norm.weight"].dtype == torch.float32
    assert ours["a.0.attn.W_query.weight"].dtype == torch.bfloat16


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            lambda t: t.as_subclass(Subclass),
            r"must be a plain tensor to be converted; got a Subclass;",
        ),
        (lambda t: t.to_sparse(), r"must be a dense tensor .*torch\.sparse_coo; call to_dense\(\)"),
        (lambda t: t.to("meta"), r"must have values; got a tensor on the meta device"),
        (
            lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            r"must be floating point .*qint8",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_layer_tensor_without_plain_values_raises(odd, message):
    for name in ("q_proj.weight", "o_proj.bias"):
        theirs = layer("llama")
        theirs[f"a.0.attn.{name}"] = odd(theirs[f"a.0.attn.{name}"])
        with pytest.raises(ConversionError, match=re.escape(name) + " " + message):
            moved("llama", theirs)


def test_layer_sharded_tensor_raises():
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.tensor import DTensor, init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        theirs = layer("llama")
        name = "a.0.attn.q_proj.weight"
        theirs[name] = DTensor.from_local(theirs[name], mesh)
        with pytest.raises(ConversionError, match=r"got a DTensor; gather it .*full_tensor\(\)"):
            moved("llama", theirs)
        theirs[name] = theirs[name].full_tensor()
        moved("llama", theirs)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kdim", [5, 48])
def test_layer_kdim_has_no_place_in_families(kdim):
    tensors = {
        "q_proj_weight": torch.zeros(48, 48),
        "k_proj_weight": torch.zeros(48, kdim),
        "v_proj_weight": torch.zeros(48, 48),
        "out_proj.weight": torch.zeros(48, 48),
    }
    if kdim == 48:
        assert "q_proj.weight" in state_dict(tensors, source="torch", target="opt")
        return
    with pytest.raises(ConversionError, match=r"W_key\.weight must take the 48 features"):
        state_dict(tensors, source="torch", target="opt")


@pytest.mark.parametrize("target", ["gpt2", "bert", "opt", "t5", "neox", "torch"])
def test_layer_gqa_has_no_place_in_mha_families(target):
    mha = ph.MultiHeadAttention(12, 12, 4, 0.0, 4, num_kv_heads=2)
    with pytest.raises(ConversionError, match=r"W_key\.weight"):
        state_dict(mha.state_dict(), source="polyhead", target=target, num_heads=4)


@pytest.mark.parametrize("pair", [("gemma3", "qwen3"), ("qwen3", "gemma3")])
def test_layer_offset_norms_to_plain_norms_raise(pair):
    """Gemma multiplies by 1 + weight: the same values are another norm."""
    source, target = pair
    with pytest.raises(ConversionError, match=rf"of one kind to move from {source} to {target}; "):
        state_dict(layer(source), source=source, target=target)
    ours = state_dict(layer(source), source=source, target="fused", **SIZES)
    assert "a.0.attn.k_norm.weight" in ours


def test_state_dict_names_that_are_not_str_raise():
    with pytest.raises(
        TypeError, match="tensors must be tensors by name; got a name 3; pass model"
    ):
        state_dict({3: torch.zeros(2)}, source="llama", target="polyhead")


@pytest.mark.parametrize("sizes", [{"nope_head_dim": 10, "value_head_dim": 14}, {"num_heads": 3}])
def test_layer_latent_heads_of_other_sizes_raise(sizes):
    sizes = SIZES | sizes
    with pytest.raises(ConversionError, match=r"^a\.0\.attn\.: kv_b_proj\.weight must "):
        state_dict(layer("deepseek"), source="deepseek", target="polyhead", **sizes)
    ours = moved("deepseek", layer("deepseek"))
    with pytest.raises(ConversionError, match=r"^a\.0\.attn\.: "):
        state_dict(ours, source="polyhead", target="deepseek", **sizes)


@pytest.mark.parametrize("odd", [None, [1.0], torch.zeros(48, 42).numpy()])
def test_layer_values_that_are_not_tensors_raise(odd):
    theirs = layer("llama") | {"a.0.attn.q_proj.weight": odd}
    with pytest.raises(ConversionError, match=r"q_proj\.weight must be a tensor; got a \w+; pass"):
        moved("llama", theirs)


def test_state_dict_wrong_source_names_the_present_layout():
    for source in ("opt", "qwen3", "phi3"):
        with pytest.raises(ConversionError, match=r"those of llama, mistral, .* are present"):
            state_dict(layer("llama"), source=source, target="polyhead")
