"""Ablated heads against weights set to zero by hand, in our modules and in transformers'."""

from __future__ import annotations

import re

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError

T = 11


def split(**options):
    torch.manual_seed(0)
    return ph.MultiHeadAttention(12, 10, 64, 0.0, num_heads=6, head_dim=4, **options).eval()


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
def test_a_head_of_ours_adds_nothing(num_kv_heads, backend):
    mha, x = split(num_kv_heads=num_kv_heads, backend=backend), torch.randn(2, T, 12)
    parts = mha.head_contributions(x)
    with ph.look.ablate(mha, {(0, 1), (0, 4)}) as same:
        assert same is mha
        y = mha(x)
    torch.testing.assert_close(y, parts[:, [0, 2, 3, 5]].sum(dim=1) + mha.out_proj.bias)
    torch.testing.assert_close(mha(x), parts.sum(dim=1) + mha.out_proj.bias)


def test_a_head_adds_its_mean():
    mha, x = split(num_kv_heads=2), torch.randn(2, T, 12)
    parts = mha.head_contributions(x)
    parts[:, 1] = parts[:, 1].mean(dim=(0, 1))
    with ph.look.ablate(mha, [(0, 1)], how="mean"):
        y = mha(x)
    torch.testing.assert_close(y, parts.sum(dim=1) + mha.out_proj.bias)


@pytest.mark.parametrize("out_proj", [False, True])
def test_stacked_heads_with_aux(out_proj):
    torch.manual_seed(0)
    stacked = ph.MultiHeadAttentionWrapper(12, 4, 64, 0.0, num_heads=3, out_proj=out_proj)
    x = torch.randn(2, T, 12)
    parts = stacked.head_contributions(x)
    with ph.look.ablate(stacked, {(0, 2)}):
        y, aux = stacked(x, return_aux=ph.AuxRequest(lse=True))
    bias = stacked.out_proj.bias if out_proj else 0.0
    torch.testing.assert_close(y, parts[:, :2].sum(dim=1) + bias)
    assert aux.lse.shape == (2, 3, T)


@pytest.mark.parametrize("absorb", [True, False])
def test_latent_heads(absorb):
    torch.manual_seed(0)
    sizes = {"kv_rank": 6, "nope_head_dim": 4, "rope_head_dim": 2, "value_head_dim": 3}
    mla = ph.MultiHeadLatentAttention(12, 12, 64, 0.0, 4, rope=ph.Rope(), **sizes)
    x = torch.randn(2, T, 12)
    with ph.look.ablate(mla, {(0, 1)}):
        y = mla(x, absorb=absorb)
    with torch.no_grad():
        mla.out_proj.weight[:, 3:6] = 0.0
    torch.testing.assert_close(y, mla(x, absorb=absorb), rtol=1e-4, atol=1e-5)


def llama(attention):
    transformers = pytest.importorskip("transformers")
    ph.integrations.transformers.register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=29,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["polyhead", "sdpa", "eager"])
def test_a_model_of_transformers_with_grouped_heads(attention):
    model, ids = llama(attention), torch.randint(31, (2, T))
    with torch.no_grad(), ph.look.ablate(model, {(1, 3)}):
        ablated = model(ids).logits
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 12:16] = 0.0
        torch.testing.assert_close(ablated, model(ids).logits)
        again = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, again)


def test_gradients_flow_through_the_heads_that_stay():
    mha, x = split(), torch.randn(1, T, 12)
    with ph.look.ablate(mha, {(0, 2)}):
        mha(x).sum().backward()
    by_head = mha.W_value.weight.grad.unflatten(0, (6, 4)).abs().sum(dim=(1, 2))
    assert (by_head > 0).tolist() == [True, True, False, True, True, True]


def test_an_ablated_model_can_be_looked_at():
    mha, x = split(), torch.randn(1, T, 12)
    with ph.look.ablate(mha, {(0, 2)}):
        contribution = ph.look.capture(mha, x).layers[0].stats["contribution"]
    assert (contribution == 0).tolist() == [False, False, True, False, False, False]


def test_nothing_stays_behind():
    mha = split()
    with pytest.raises(RuntimeError), ph.look.ablate(mha, {(0, 2)}):
        raise RuntimeError
    for module in mha.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class Fused(torch.nn.Module):
    """Reads the projection's weight and never calls it."""

    def __init__(self):
        super().__init__()
        self.SomeAttention = type("SomeAttention", (torch.nn.Module,), {})()
        self.SomeAttention.num_heads = 2
        self.SomeAttention.o_proj = torch.nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.SomeAttention.o_proj.weight


def test_an_ablation_without_effect_is_an_error():
    message = "heads must be of layers that run; got layer 0 (SomeAttention), whose output projecti"
    model = Fused()
    with (
        ph.look.ablate(model, {(0, 1)}),
        pytest.raises(ArgumentError, match=re.escape(message)),
    ):
        model(torch.randn(3, 4))


def test_arguments_are_checked():
    mha = split()
    with (
        pytest.raises(ArgumentError, match="heads must name heads from 0 to 5 of layer 0; got"),
        ph.look.ablate(mha, {(0, 6)}),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match='how must be "zero" or "mean"; got \'median\''),
        ph.look.ablate(mha, {(0, 1)}, how="median"),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match="model must not be compiled"),
        ph.look.ablate(torch.compile(mha), {(0, 1)}),
    ):
        pass
    mha.compile()
    with (
        pytest.raises(ArgumentError, match="model must not be compiled"),
        ph.look.ablate(mha, {(0, 1)}),
    ):
        pass


def test_a_projection_of_unknown_name_is_told():
    module = type("OddAttention", (torch.nn.Module,), {"num_heads": 2})()
    with (
        pytest.raises(ArgumentError, match=r"one of out_proj, o_proj, c_proj.*got OddAttention"),
        ph.look.ablate(torch.nn.Sequential(module), {(0, 1)}),
    ):
        pass
