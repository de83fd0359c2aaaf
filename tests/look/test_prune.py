"""Models without some heads for good, against the same heads ablated."""

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
def test_models_of_transformers(family, attention):
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


def test_our_modules_and_the_heads_that_stay_can_be_looked_at():
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


def test_an_error_leaves_the_model_as_it_was():
    model = model_of("Llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=re.escape("got [2, 3] for key heads 0 to 1")):
        ph.look.prune(model, {(0, 0), (0, 3), (1, 1)})
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    ph.look.prune(model, {(0, 0), (0, 3), (1, 1)}, repeat_keys=True)


def test_other_layers_are_refused():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "n_embd": 24, "n_layer": 1, "n_head": 6, "n_positions": 37}
    model = transformers.GPT2Model(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ArgumentError, match=r"o_proj, each head.*GPT2Attention \(h\.0\.attn"):
        ph.look.prune(model, {(0, 1)})
