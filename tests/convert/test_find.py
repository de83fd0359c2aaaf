"""Layers found in a checkpoint: all are complete and converted, or none is."""

import pytest
import torch

import polyhead as ph
from polyhead.convert import state_dict
from polyhead.errors import ConversionError

D = 12
FAMILIES = {
    "gpt2": {"c_attn.weight": (D, 3 * D), "c_attn.bias": (3 * D,), "c_proj.weight": (D, D)},
    "llama": {f"{x}_proj.weight": (D, D) for x in "qkvo"},
    "neox": {"query_key_value.weight": (3 * D, D), "dense.weight": (D, D)},
    "bert": {f"{x}.weight": (D, D) for x in ("self.query", "self.key", "self.value")}
    | {"output.dense.weight": (D, D)},
    "t5": {f"{x}.weight": (D, D) for x in "qkvo"},
    "torch": {"in_proj_weight": (3 * D, D), "out_proj.weight": (D, D)},
    "qwen3": {f"{x}_proj.weight": (D, D) for x in "qkvo"}
    | {"q_norm.weight": (4,), "k_norm.weight": (4,)},
}


def model(family, layers=3):
    """Attention and an MLP, some of whose names are attention's too, in every layer."""
    tensors = {"wte.weight": torch.zeros(5, D)}
    for i in range(layers):
        for name, shape in FAMILIES[family].items():
            tensors[f"h.{i}.attn.{name}"] = torch.randn(shape)
        for name in ("c_proj", "dense", "output.dense", "out_proj"):
            tensors[f"h.{i}.mlp.{name}.weight"] = torch.zeros(D, D)
    return tensors


def move(tensors, family, **options):
    return state_dict(tensors, source=family, target="polyhead", num_heads=3, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_missing_tensor_raises(family):
    """Layer 0 was converted, layer 1 was not, without an error."""
    assert len([name for name in move(model(family), family) if "W_key.weight" in name]) == 3
    for layer in range(3):
        for name in FAMILIES[family]:
            tensors = model(family)
            del tensors[f"h.{layer}.attn.{name}"]
            with pytest.raises(ConversionError, match=rf"h\.{layer}\.attn\..*{name}"):
                move(tensors, family)


@pytest.mark.parametrize("source", ["polyhead", "stacked", "fused"])
def test_state_dict_our_layer_with_missing_tensor_raises(source):
    split = ph.MultiHeadAttention(D, D, 7, 0.0, 3, True).state_dict()
    split = {f"b.{i}.{name}": tensor for i in range(2) for name, tensor in split.items()}
    sizes = {"num_heads": 3, "num_kv_heads": 3}
    if source != "polyhead":
        split = state_dict(split, source="polyhead", target=source, **sizes)
    target = "llama" if source == "polyhead" else "polyhead"
    state_dict(split, source=source, target=target, **sizes)
    for missing in [name for name in split if name.startswith("b.1.")]:
        tensors = {name: tensor for name, tensor in split.items() if name != missing}
        with pytest.raises(ConversionError, match=missing.removeprefix("b.1.")):
            state_dict(tensors, source=source, target=target, **sizes)


@pytest.mark.parametrize("missing", ["in_proj_bias", "out_proj.bias"])
def test_state_dict_torch_with_one_bias_raises(missing):
    theirs = torch.nn.MultiheadAttention(D, 3).state_dict()
    ours = move(theirs, "torch")
    del theirs[missing]
    with pytest.raises(ConversionError, match=r"must come with the other bias of torch's layer"):
        move(theirs, "torch")
    for name in ("W_query", "W_key", "W_value") if missing == "in_proj_bias" else ("out_proj",):
        del ours[f"{name}.bias"]
    with pytest.raises(ConversionError, match=r"or zeros where the layer has no bias"):
        state_dict(ours, source="polyhead", target="torch")


@pytest.mark.parametrize("missing", ["q_proj.bias", "k_proj.bias", "v_proj.bias"])
def test_state_dict_one_missing_qkv_bias_raises(missing):
    tensors = {f"l.{x}_proj.weight": torch.randn(D, D) for x in "qkvo"}
    tensors |= {f"l.{x}_proj.bias": torch.randn(D) for x in "qkv"}
    assert len(move(tensors, "llama")) == 7
    weight = tensors.pop(f"l.{missing}")
    with pytest.raises(ConversionError, match=r"one of them is missing; .*zeros where the model"):
        move(tensors, "llama")
    move({**tensors, f"l.{missing}": torch.zeros_like(weight)}, "llama")  # the remedy works
    ours = {f"l.W_{x}.weight": torch.randn(D, D) for x in ("query", "key", "value")}
    ours |= {"l.out_proj.weight": torch.randn(D, D), "l.W_key.bias": torch.randn(D)}
    with pytest.raises(ConversionError, match=r"l\.: W_key\.bias must come with"):
        state_dict(ours, source="polyhead", target="llama")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "torch"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_state_dict_layer_without_attention_raises(family, layer):
    tensors = {
        name: t for name, t in model(family).items() if not name.startswith(f"h.{layer}.attn.")
    }
    with pytest.raises(
        ConversionError, match=rf"h\.{layer}\.attn\. must be an attention layer, as h"
    ):
        move(tensors, family)


def test_state_dict_absent_layer_number_raises():
    tensors = {name: t for name, t in model("llama").items() if not name.startswith("h.1.")}
    with pytest.raises(
        ConversionError, match=r"h\.1\.attn\. must be .*; give the whole checkpoint"
    ):
        move(tensors, "llama")


def test_state_dict_hybrid_layers_are_no_gap():
    """A hybrid model: its recurrent layers have names of their own."""
    tensors = {name: t for name, t in model("llama").items() if not name.startswith("h.1.attn.")}
    tensors["h.1.mixer.conv.weight"] = torch.zeros(3)
    assert "h.2.attn.W_key.weight" in move(tensors, "llama")


def test_state_dict_custom_model_depths_are_no_gap():
    """torch's module and ours are in models of any kind: a net with attention at some depths."""
    mha = torch.nn.MultiheadAttention(D, 3)
    net = {f"down.{i}.conv.weight": torch.zeros(3) for i in range(4)}
    net |= {f"down.2.attn.{name}": tensor for name, tensor in mha.state_dict().items()}
    assert "down.2.attn.W_key.weight" in move(net, "torch")


@pytest.mark.parametrize("config", [{"num_hidden_layers": 4}, {"n_layer": 4}, {"num_layers": 4}])
def test_state_dict_fewer_layers_than_config_raises(config):
    config = {"model_type": "llama", "num_attention_heads": 3, **config}
    with pytest.raises(
        ConversionError, match=r"all 4 layers .* be present; got attention of 3; give"
    ):
        move(model("llama"), "llama", config=config)
    move(model("llama", 4), "llama", config=config)
    # A layer on its own, and a family whose layers are not all attention.
    layer = {name: torch.zeros(shape) for name, shape in FAMILIES["llama"].items()}
    move(layer, "llama", config=config)
    move(model("llama"), "llama", config={**config, "model_type": "jamba"})


OTHERS = {
    "opt": {f"{x}_proj.weight": (D, D) for x in "qkv"} | {"out_proj.weight": (D, D)},
    "neox": FAMILIES["neox"],
    "torch": FAMILIES["torch"],
    "polyhead": {f"{x}.weight": (D, D) for x in ("W_query", "W_key", "W_value", "out_proj")},
    "fused": {"W_qkv.weight": (3 * D, D), "out_proj.weight": (D, D)},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("prefix", ["h.1.attn.", "vision.blocks.0.attn."])
def test_state_dict_layer_of_another_layout_raises(other, prefix):
    tensors = {name: t for name, t in model("llama").items() if not name.startswith(prefix)}
    tensors |= {prefix + name: torch.zeros(shape) for name, shape in OTHERS[other].items()}
    with pytest.raises(
        ConversionError, match=rf"{prefix} is a layer of layout \w+, and would stay"
    ):
        move(tensors, "llama")
    only = {
        name: t for name, t in tensors.items() if name not in {prefix + x for x in OTHERS[other]}
    }
    if prefix.startswith("vision"):
        assert "h.1.attn.W_key.weight" in move(only, "llama")  # the remedy works


def test_state_dict_stacked_heads_are_one_layer():
    stacked = ph.MultiHeadAttentionWrapper(D, 4, 7, 0.0, 3).state_dict()
    for prefix in ("", "a."):
        tensors = {prefix + name: tensor for name, tensor in stacked.items()}
        with pytest.raises(ConversionError, match="is a layer of layout stacked, and would stay"):
            state_dict(tensors, source="polyhead", target="fused", num_heads=1, num_kv_heads=1)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "transformer.", "a.b.c.", ""]
)
def test_state_dict_prefixes_are_kept(prefix):
    tensors = {prefix + name: t for name, t in model("gpt2").items()}
    moved = move(tensors, "gpt2")
    assert {name for name in moved if "W_key.weight" in name} == {
        f"{prefix}h.{i}.attn.W_key.weight" for i in range(3)
    }
    again = state_dict(moved, source="polyhead", target="gpt2")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_state_dict_nested_checkpoint_raises_with_its_key():
    with pytest.raises(TypeError, match=r"tensors must be tensors by name; .*'state_dict'; pass t"):
        move({"state_dict": model("gpt2"), "epoch": 3}, "gpt2")
