"""Pruned models against the same heads ablated."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError

SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 37,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {},
    "Qwen3": {"head_dim": 4},
    "Gemma2": {"head_dim": 4},
    "GptOss": {
        "head_dim": 4,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size": 32,
    },
}


def model_of(family):
    transformers = pytest.importorskip("transformers")
    ph.integrations.transformers.register()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
    config._attn_implementation = "eager"
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("attention", ["eager", "polyhead"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prune_transformers_models(family, attention):
    model, ids = model_of(family), torch.randint(3, 31, (2, 9))
    model.set_attn_implementation(attention)
    heads = {(0, 0), (0, 1), (0, 2), (1, 2), (1, 3)}
    with ph.look.ablate(model, heads):
        want = model(ids).logits
        text = model.generate(ids, max_new_tokens=4, do_sample=False, min_new_tokens=4)
    fresh = copy.deepcopy(model)
    before = model.num_parameters()
    assert ph.look.prune(model, heads) is model
    assert before - model.num_parameters() >= 5 * 2 * 24 * 4  # of W_query and out_proj alone
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    again = model.generate(ids, max_new_tokens=4, do_sample=False, min_new_tokens=4)
    assert torch.equal(again, text)
    assert [layer.num_heads for layer in ph.look.attention_layers(model)] == [3, 4]
    for parameter in fresh.parameters():
        parameter.add_(1.0)
    ph.look.prune(fresh, heads).load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_prune_our_modules_then_capture():
    torch.manual_seed(0)
    blocks = [ph.MultiHeadAttention(12, 12, 64, 0.0, num_heads=6, num_kv_heads=3) for _ in "ab"]
    model, x = torch.nn.Sequential(*blocks), torch.randn(1, 9, 12)
    with ph.look.ablate(model, {(1, 2), (1, 3)}):
        want = ph.look.capture(model, x)
    ph.look.prune(model, {(1, 2), (1, 3)})
    got = ph.look.capture(model, x)
    assert [len(layer.heads) for layer in got.layers] == [6, 4]
    torch.testing.assert_close(got.layers[1].map, want.layers[1].map[[0, 1, 4, 5]])
    for name, values in got.layers[1].stats.items():
        torch.testing.assert_close(values, want.layers[1].stats[name][[0, 1, 4, 5]])


def test_prune_error_leaves_the_model_unchanged():
    model = model_of("Llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=re.escape("got [2, 3] for key heads 0 to 1")):
        ph.look.prune(model, {(0, 0), (0, 3), (1, 1)})
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    ph.look.prune(model, {(0, 0), (0, 3), (1, 1)}, repeat_keys=True)


def test_prune_refuses_unsupported_layers():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "n_embd": 24, "n_layer": 1, "n_head": 6, "n_positions": 37}
    model = transformers.GPT2Model(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with pytest.raises(
        ArgumentError, match=r"o_proj, with per-head norms.*GPT2Attention \(h\.0\.attn"
    ):
        ph.look.prune(model, {(0, 1)})


HYBRID = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 4,
}
SHARING = {
    "head_dim": 4,
    "global_head_dim": 4,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 31,
}
# Parts of each layer other than projections, per-head norms and sinks.
UNPRUNABLE = [
    ("StableLm", {"qk_layernorm": True}, "q_layernorm.norms.0.weight (4,)"),
    ("BitNet", {}, "attn_sub_norm.weight (24,)"),
    ("Afmoe", {"head_dim": 4, "num_experts": 4}, "gate_proj.weight (24, 24)"),
    ("HrmText", {"head_dim": 4}, "gate_proj.weight (24, 24)"),
    ("Doge", {}, "with A (2,), dt_proj.weight (2, 8)"),
    ("Beam", {}, "gate_bias (6,)"),
    ("Laguna", {"head_dim": 4}, "g_proj.weight (6, 24)"),
    ("Qwen3Next", HYBRID, "with q_proj 48, k_proj 8, v_proj 8, o_proj 24"),
    ("Qwen3_5Text", HYBRID, "with q_proj 48, k_proj 8, v_proj 8, o_proj 24"),
    ("Gemma4Text", SHARING, "another output, as later layers read what is pruned"),
]


class Same:
    """State of a model that pruning could change."""

    def __init__(self, model):
        self.model, self.before = model, self.read(model)
        self.values = {n: t.clone() for n, t in model.state_dict().items() if not t.is_meta}

    @staticmethod
    def read(model):
        modules = {n: (m, m.training, dict(m._forward_hooks)) for n, m in model.named_modules()}
        plain = (int, float, str, type(None))
        attributes = {
            (n, key): value
            for n, m in model.named_modules()
            for key, value in vars(m).items()
            if isinstance(value, plain)
        }
        tensors = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
        return modules, attributes, tensors, torch.get_rng_state().tolist()

    def check(self):
        assert self.read(self.model) == self.before
        state = self.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in self.values.items())


@pytest.mark.parametrize(("family", "options", "got"), UNPRUNABLE)
def test_prune_other_per_head_parameters_refuses(family, options, got):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config", None)
    if config is None:
        pytest.skip("of a later transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**(SIZES | options))).train()
    layer = next(
        layer for layer in ph.look.attention_layers(model) if hasattr(layer.module, "q_proj")
    )
    same = Same(model)
    with pytest.raises(ArgumentError, match=re.escape(got)):
        ph.look.prune(model, {(layer.index, head) for head in range(3)})
    same.check()


class BiasAttention(torch.nn.Module):
    """Attention with per-head values that are not among its parameters."""

    num_heads, head_dim = 4, 3

    def __init__(self, factor):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, torch.nn.Linear(12, 12))
        self.factor = factor

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 3)) for p in (self.q_proj, self.k_proj, self.v_proj))
        heads = q.shape[2]
        weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        scale = torch.arange(1.0, heads + 1) if self.factor else torch.ones(heads)
        contexts = torch.einsum("bhts,bshd->bthd", weights, v) * scale[:, None]
        return self.o_proj(contexts.flatten(2))


def test_prune_checks_on_the_given_inputs():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    model = torch.nn.Sequential(BiasAttention(factor=False))
    same = Same(model)
    with pytest.raises(
        ArgumentError, match=r"inputs must be given, .* got Sequential; pass inputs="
    ):
        ph.look.prune(model, {(0, 1)})
    with pytest.raises(ArgumentError, match="inputs must be keywords that Sequential runs with"):
        ph.look.prune(model, {(0, 1)}, inputs={"x": x})
    same.check()
    with ph.look.ablate(model, {(0, 1)}):
        want = model(x)
    ph.look.prune(model, {(0, 1)}, inputs={"input": x})
    torch.testing.assert_close(model(x), want)


def test_prune_with_another_result_rolls_back():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(BiasAttention(factor=True)), torch.randn(2, 5, 12)
    same = Same(model)
    message = (
        r"same pruned as with the heads ablated; got BiasAttention \(0\): outputs 0\.\d+ apart"
    )
    with pytest.raises(ArgumentError, match=message):
        ph.look.prune(model, {(0, 1)}, inputs={"input": x})
    same.check()


def test_prune_our_module_within_another_class_is_checked():
    class Doubling(ph.MultiHeadAttention):
        def forward(self, x):
            return self.num_heads * super().forward(x)

    torch.manual_seed(0)
    model = torch.nn.Sequential(Doubling(8, 8, 16, 0.1, num_heads=4).fuse())
    x = torch.randn(2, 5, 8)
    same = Same(model)
    with pytest.raises(ArgumentError, match="got Doubling"):
        ph.look.prune(model, {(0, 1)}, inputs={"input": x})
    same.check()


def test_prune_offloaded_layers_refuses_with_the_remedy():
    accelerate = pytest.importorskip("accelerate")
    model, ids = model_of("Llama"), torch.randint(3, 31, (2, 9))
    with torch.no_grad(), ph.look.ablate(model, {(0, 0), (0, 1), (0, 2)}):
        want = model(ids).logits
    accelerate.cpu_offload(model)
    same = Same(model)
    message = (
        "with q_proj: Linear with accelerate's hooks, which hold its weights; use polyhead.look"
    )
    with pytest.raises(ArgumentError, match=re.escape(message)):
        ph.look.prune(model, {(0, 0), (0, 1), (0, 2)})
    same.check()
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    ph.look.prune(model, {(0, 0), (0, 1), (0, 2)})
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_prune_generates_pixels_for_image_models():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: SIZES[name] for name in names} | {"image_size": 16, "patch_size": 8}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes)).eval()
    if not hasattr(ph.look.attention_layers(model)[0].module, "o_proj"):
        pytest.skip("of a later transformers")
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        with ph.look.ablate(model, {(1, 0)}):
            want = model(pixels).last_hidden_state
        ph.look.prune(model, {(1, 0)})
        torch.testing.assert_close(model(pixels).last_hidden_state, want)
