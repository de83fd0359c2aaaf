"""Ablated heads against weights set to zero by hand, in our modules and transformers models."""

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
def test_ablate_zero_removes_a_heads_contribution(num_kv_heads, backend):
    mha, x = split(num_kv_heads=num_kv_heads, backend=backend), torch.randn(2, T, 12)
    parts = mha.head_contributions(x)
    with ph.look.ablate(mha, {(0, 1), (0, 4)}) as same:
        assert same is mha
        y = mha(x)
    torch.testing.assert_close(y, parts[:, [0, 2, 3, 5]].sum(dim=1) + mha.out_proj.bias)
    torch.testing.assert_close(mha(x), parts.sum(dim=1) + mha.out_proj.bias)


def test_ablate_mean_adds_the_mean():
    mha, x = split(num_kv_heads=2), torch.randn(2, T, 12)
    parts = mha.head_contributions(x)
    parts[:, 1] = parts[:, 1].mean(dim=1, keepdim=True)  # per batch row
    with ph.look.ablate(mha, [(0, 1)], how="mean"):
        y = mha(x)
    torch.testing.assert_close(y, parts.sum(dim=1) + mha.out_proj.bias)


@pytest.mark.parametrize(
    "mask", [ph.mask.lengths([4, T]), ph.mask.left_padding([3, 0]) & ph.mask.window(before=5)]
)
def test_ablate_mean_ignores_padding_of_our_modules(mask):
    mha, x = split(num_kv_heads=2), torch.randn(2, T, 12)
    parts = mha.head_contributions(x, mask=mask)
    real = [slice(0, 4) if isinstance(mask, ph.mask.Lengths) else slice(3, T), slice(0, T)]
    for row in range(2):
        parts[row, 1] = parts[row, 1][real[row]].mean(dim=0)
    with ph.look.ablate(mha, [(0, 1)], how="mean"):
        y = mha(x, mask=mask)
    torch.testing.assert_close(y, parts.sum(dim=1) + mha.out_proj.bias)


def test_ablate_mean_refuses_other_masks():
    mha, x = split(), torch.randn(1, T, 12)
    message = r'how must not be "mean" where .* got MultiHeadAttention \(\) with mask dense.*"zero"'
    for mask in (ph.mask.dense(torch.ones(T, T, dtype=torch.bool)), ph.mask.documents([0] * T)):
        with (
            ph.look.ablate(mha, [(0, 1)], how="mean"),
            pytest.raises(ArgumentError, match=message.replace("dense", "(dense|documents)")),
        ):
            mha(x, mask=mask)


@pytest.mark.parametrize("attention", ["polyhead", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_ablate_mean_is_per_sequence(attention, side):
    model, ids = llama(attention), torch.randint(31, (1, 6))
    other = torch.randint(31, (1, T))
    padding = torch.zeros(1, T - 6, dtype=torch.int64)
    padded = [padding, ids] if side == "left" else [ids, padding]
    mask = torch.cat([torch.full_like(x, x is ids) for x in padded], dim=1)
    batch = torch.cat([torch.cat(padded, dim=1), other])
    masks = torch.cat([mask, torch.ones_like(mask)])
    with ph.look.ablate(model, {(0, 1), (1, 3)}, how="mean"):
        alone = model(ids).logits[0]
        together = model(batch, attention_mask=masks).logits[0][mask[0].bool()]
        rows = model(torch.cat([ids, ids.flip(1)])).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows, alone, rtol=1e-4, atol=1e-5)


def test_ablate_mean_refuses_uncertain_padding():
    model, ids = llama("eager"), torch.randint(31, (1, T))
    dense = torch.zeros(1, 1, T, T)
    with ph.look.ablate(model, {(0, 1)}, how="mean"):
        with pytest.raises(ArgumentError, match=r"attention_mask \(1, 1, 11, 11\), not \(B = 1"):
            model(ids, attention_mask=dense)
        with pytest.raises(ArgumentError, match="packed sequences"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 5, T]), cu_seq_lens_k=torch.tensor([0, 5, T]))
    with ph.look.ablate(model, {(0, 1)}):
        model(ids, attention_mask=dense)


@pytest.mark.parametrize("out_proj", [False, True])
def test_ablate_stacked_heads_with_aux(out_proj):
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
def test_ablate_latent_heads(absorb):
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
def test_ablate_transformers_model_with_gqa(attention):
    model, ids = llama(attention), torch.randint(31, (2, T))
    with torch.no_grad(), ph.look.ablate(model, {(1, 3)}):
        ablated = model(ids).logits
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 12:16] = 0.0
        torch.testing.assert_close(ablated, model(ids).logits)
        again = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, again)


def test_ablate_keeps_gradients_of_other_heads():
    mha, x = split(), torch.randn(1, T, 12)
    with ph.look.ablate(mha, {(0, 2)}):
        mha(x).sum().backward()
    by_head = mha.W_value.weight.grad.unflatten(0, (6, 4)).abs().sum(dim=(1, 2))
    assert (by_head > 0).tolist() == [True, True, False, True, True, True]


def test_ablate_works_within_capture():
    mha, x = split(), torch.randn(1, T, 12)
    with ph.look.ablate(mha, {(0, 2)}):
        contribution = ph.look.capture(mha, x).layers[0].stats["contribution"]
    assert (contribution == 0).tolist() == [False, False, True, False, False, False]


def test_ablate_removes_its_hooks():
    mha = split()
    with pytest.raises(RuntimeError), ph.look.ablate(mha, {(0, 2)}):
        raise RuntimeError
    for module in mha.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class Fused(torch.nn.Module):
    """Layer that uses the projection's weight without calling the projection."""

    def __init__(self):
        super().__init__()
        self.SomeAttention = type("SomeAttention", (torch.nn.Module,), {})()
        self.SomeAttention.num_heads = 2
        self.SomeAttention.o_proj = torch.nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.SomeAttention.o_proj.weight


def test_ablate_without_effect_raises():
    message = "heads must be of layers that run; got layer 0 (SomeAttention), whose output projecti"
    model = Fused()
    with (
        ph.look.ablate(model, {(0, 1)}),
        pytest.raises(ArgumentError, match=re.escape(message)),
    ):
        model(torch.randn(3, 4))


def test_ablate_checks_its_arguments():
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


def test_ablate_unknown_projection_raises():
    module = type("OddAttention", (torch.nn.Module,), {"num_heads": 2})()
    with (
        pytest.raises(ArgumentError, match=r"one of out_proj, o_proj, c_proj.*got OddAttention"),
        ph.look.ablate(torch.nn.Sequential(module), {(0, 1)}),
    ):
        pass
