"""Captured reports of one forward, against the models' own eager attention."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, ModelError, ShapeError

T = 19
LATENT = {"kv_rank": 6, "nope_head_dim": 4, "rope_head_dim": 2, "value_head_dim": 3}


def ours(**options):
    torch.manual_seed(0)
    blocks = [
        ph.MultiHeadAttention(12, 12, 64, 0.0, num_heads=6, num_kv_heads=2, **options),
        ph.MultiHeadAttentionWrapper(12, 4, 64, 0.0, num_heads=3),
        ph.CausalAttention(12, 12, 64, 0.0),
        ph.MultiHeadLatentAttention(12, 12, 64, 0.0, 4, rope=ph.Rope(), **LATENT),
    ]
    return torch.nn.Sequential(torch.nn.Embedding(31, 12), *blocks).eval()


def llama(**options):
    transformers = pytest.importorskip("transformers")
    ph.integrations.transformers.register()
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, **options}
    config = transformers.LlamaConfig(**sizes, **heads, attn_implementation="eager")
    return transformers.LlamaForCausalLM(config).eval()


def test_capture_our_modules_matches_their_aux():
    model, ids = ours(), torch.randint(31, (T,))
    report = ph.look.capture(model, ids, weights=True, bins=7, n_keys=3)
    assert [layer.name for layer in report.layers] == ["1", "2", "3", "4"]
    assert [len(layer.heads) for layer in report.layers] == [6, 3, 1, 4]
    assert torch.equal(report.token_ids, ids)
    x = model[0](ids[None])
    for module, layer in zip(model[1:], report.layers, strict=True):
        request = ph.AuxRequest(weights=True, stats=True)
        y, aux = module(x, return_aux=request)
        torch.testing.assert_close(layer.weights, aux.weights[0])
        for name, want in aux.stats.per_head().items():
            torch.testing.assert_close(layer.stats[name], want, msg=name)
        rows, columns = ph.look.bin_edges(T, 7)[3:5], ph.look.bin_edges(T, 7)[2:4]
        cell = layer.weights[:, rows[0] : rows[1], columns[0] : columns[1]].mean(dim=(1, 2))
        torch.testing.assert_close(layer.map[:, 3, 2], cell)
        torch.testing.assert_close(layer.key_weights, layer.weights.topk(3).values)
        assert layer.keys.shape == (len(layer.heads), T, 3)
        if hasattr(module, "head_contributions"):
            want = module.head_contributions(x).norm(dim=-1).mean(dim=(0, 2))
            torch.testing.assert_close(layer.stats["contribution"], want)
        x = y
    single = report.layers[2].stats["contribution"]
    torch.testing.assert_close(single, model[:4](ids[None]).norm(dim=-1).mean()[None])


def test_capture_contribution_includes_the_gate():
    torch.manual_seed(0)
    gated = ph.MultiHeadAttention(8, 12, 64, 0.0, num_heads=3, output_gate=True)
    x = torch.randn(1, T, 8)
    found = ph.look.capture(gated, x).layers[0].stats["contribution"]
    torch.testing.assert_close(found, gated.head_contributions(x).norm(dim=-1).mean(dim=(0, 2)))


def test_capture_transformers_matches_eager_attention():
    model, ids = llama(), torch.randint(31, (T,))
    with torch.no_grad():
        theirs = model(ids[None], output_attentions=True).attentions
    report = ph.look.capture(model, ids, weights=True)
    assert model.config._attn_implementation == "eager"  # as it was
    assert [layer.name for layer in report.layers] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    for layer, weights in zip(report.layers, theirs, strict=True):
        torch.testing.assert_close(layer.weights, weights[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.map, weights[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.stats["mass_first"], weights[0, ..., 0].mean(-1))
        same = (ids[:, None] == ids).tril(-1)
        after = torch.zeros_like(same)
        after[:, 1:] = same[:, :-1]
        want = (weights[0] * after).sum(-1)[:, same.any(-1)].mean(-1)
        torch.testing.assert_close(layer.stats["mass_induction"], want)


def test_capture_contribution_equals_the_change_by_ablation():
    model, ids = llama(), torch.randint(31, (T,))
    found = ph.look.capture(model, ids).layers[1].stats["contribution"]
    attention = model.model.layers[1].self_attn
    merged, outputs = [], []
    attention.o_proj.register_forward_pre_hook(lambda _, args: merged.append(args[0]))
    attention.o_proj.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        model(ids[None])
        for head in range(6):
            without = merged[0].clone()
            without[..., 4 * head : 4 * head + 4] = 0
            lost = (outputs[0] - attention.o_proj(without)).norm(dim=-1).mean()
            torch.testing.assert_close(found[head], lost)


def test_capture_gpt2_and_bert_projections():
    transformers = pytest.importorskip("transformers")
    ph.integrations.transformers.register()
    gpt2 = transformers.GPT2Config(
        vocab_size=31,
        n_embd=24,
        n_layer=1,
        n_head=6,
        n_positions=37,
        bos_token_id=0,
        eos_token_id=0,
    )
    bert = transformers.BertConfig(
        vocab_size=31,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=6,
        intermediate_size=29,
    )
    models = [transformers.GPT2LMHeadModel(gpt2), transformers.BertModel(bert)]
    names = ["transformer.h.0.attn", "encoder.layer.0.attention.self"]
    for model, name in zip(models, names, strict=True):
        (layer,) = ph.look.capture(model.eval(), torch.randint(31, (T,))).layers
        assert layer.name == name
        assert layer.stats["contribution"].shape == (6,)
        assert (layer.stats["contribution"] > 0).all()


def test_capture_chosen_heads_only():
    report = ph.look.capture(ours(), torch.randint(31, (T,)), heads={(1, 2), (0, 5), (0, 1)})
    assert [(layer.index, layer.heads) for layer in report.layers] == [(0, (1, 5)), (1, (2,))]
    full = ph.look.capture(ours(), report.token_ids)
    for layer in report.layers:
        whole = full.layers[layer.index]
        for name, values in layer.stats.items():
            assert torch.equal(values, whole.stats[name][[*layer.heads]])
        assert torch.equal(layer.map, whole.map[[*layer.heads]])


def test_capture_removes_its_hooks():
    model = ours()
    ph.look.capture(model, torch.randint(31, (T,)))
    with pytest.raises(ShapeError):
        ph.look.capture(model, torch.randint(31, (65,)))  # longer than its context
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    seen = []
    with ph.functional.observe(seen.append):
        pass
    model(torch.randint(31, (1, T)))
    assert not seen


def test_capture_refuses_unsupported_models():
    ids = torch.zeros(1, 3, dtype=torch.int64)
    message = "model must have attention layers, polyhead's modules or a transformers model's; got"
    with pytest.raises(ArgumentError, match=re.escape(message)):
        ph.look.capture(torch.nn.Linear(3, 3), ids)
    with pytest.raises(ShapeError, match=re.escape("one text, (T,) or (1, T); got (2, 3)")):
        ph.look.capture(ours(), ids.expand(2, 3))
    with pytest.raises(ArgumentError, match="heads must name layers from 0 to 3; got"):
        ph.look.capture(ours(), ids, heads={(4, 0)})
    with pytest.raises(ArgumentError, match="heads must name heads from 0 to 2 of layer 1; got"):
        ph.look.capture(ours(), ids, heads={(1, 3)})
    with pytest.raises(ArgumentError, match="model must not be compiled; got itself"):
        ph.look.capture(torch.compile(ours()), ids)


def test_capture_refuses_models_with_own_attention():
    transformers = pytest.importorskip("transformers")
    ph.integrations.transformers.register()
    sizes = {"vocab_size": 31, "hidden_size": 24, "n_layer": 1, "n_head": 6}
    model = transformers.BloomModel(transformers.BloomConfig(**sizes)).eval()
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match="BloomModel cannot run"):
        ph.look.capture(model, torch.zeros(3, dtype=torch.int64))
    assert model.config._attn_implementation == before


def test_capture_layers_not_using_polyhead_raises():
    class OwnAttention(torch.nn.Module):
        num_heads = 2

        def forward(self, x):
            return x

    with pytest.raises(ArgumentError, match=r"must attend by .* Sequential, whose layers \(0, "):
        ph.look.capture(torch.nn.Sequential(OwnAttention()), torch.zeros(1, 3, 4))


def test_capture_unregistered_implementation_raises(monkeypatch):
    model = llama()
    from transformers import AttentionInterface

    known = {k: v for k, v in AttentionInterface._global_mapping.items() if k != "polyhead"}
    monkeypatch.setattr(AttentionInterface, "_global_mapping", known)
    with pytest.raises(ArgumentError, match=r"integrations\.transformers\.register\(\) once"):
        ph.look.capture(model, torch.zeros(3, dtype=torch.int64))


def test_capture_layer_called_twice_raises():
    mha = ph.MultiHeadAttention(12, 12, 64, 0.0, num_heads=6)
    with pytest.raises(ArgumentError, match="must call each attention layer once"):
        ph.look.capture(torch.nn.Sequential(mha, mha), torch.randn(1, T, 12))


def test_capture_report_is_a_value():
    report = ph.look.capture(ours(), torch.randint(31, (T,)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.model = "another"


def test_capture_adapter_has_no_contribution():
    mha = ph.MultiHeadAttention(12, 12, 64, 0.0, num_heads=6)
    mha.out_proj = torch.nn.Sequential(mha.out_proj)
    assert "contribution" not in ph.look.capture(mha, torch.randn(1, T, 12)).layers[0].stats
