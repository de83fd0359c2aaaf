"""Trace of the lecture's classes, against the modules, the formula and the lecture's digits."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.errors import ArgumentError, DtypeError, ShapeError

TOKENS = [[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64]]
TOKENS += [[0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]]
T, D_IN = 7, 5


def randomized(module):
    """In float64, with no parameter at its initial zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.7)
    return module.double().eval()


class Bias(nn.Module):
    def forward(self, T, S):
        return torch.linspace(-1, 1, T * S).view(T, S)


VARIANTS = {
    "one head": functools.partial(ph.CausalAttention, D_IN, 4, 11, 0.3, qkv_bias=True),
    "one head, rope, scale": functools.partial(
        ph.CausalAttention, D_IN, 4, 11, 0.0, rope=ph.Rope(), scale=0.3
    ),
    "stacked": functools.partial(ph.MultiHeadAttentionWrapper, D_IN, 4, 11, 0.0, 3),
    "stacked, out_proj": functools.partial(
        ph.MultiHeadAttentionWrapper, D_IN, 4, 11, 0.0, 3, out_proj=True, out_features=2
    ),
    **{
        f"split, {name}": functools.partial(ph.MultiHeadAttention, D_IN, 12, 11, 0.0, **options)
        for name, options in {
            "plain": {"num_heads": 3},
            "no out_proj": {"num_heads": 3, "out_proj": False},
            "grouped": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4},
            "rope, norms": {"num_heads": 3, "rope": ph.Rope(), "qk_norm": nn.RMSNorm},
            "softcap, sinks": {"num_heads": 3, "softcap": 0.8, "sinks": True},
            "alibi": {"num_heads": 3, "alibi": True},
            "bias, gate": {"num_heads": 3, "position_bias": Bias(), "output_gate": True},
            "value size": {"num_heads": 3, "value_head_dim": 2},
            "window": {"num_heads": 3, "mask": ph.mask.causal() & ph.mask.window(before=2)},
            "no mask": {"num_heads": 3, "mask": None},
            "empty rows": {"num_heads": 3, "mask": ~ph.mask.prefix(3) & ph.mask.causal()},
        }.items()
    },
}


@pytest.mark.parametrize("build", VARIANTS.values(), ids=VARIANTS)
def test_trace_output_and_weights_match_the_module(build):
    torch.manual_seed(0)
    module, x = randomized(build()), torch.randn(2, T, D_IN, dtype=torch.float64)
    steps = ph.trace(module, x)
    y, aux = module(x, return_aux=ph.AuxRequest(weights=True))
    torch.testing.assert_close(steps.output, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(steps.weights, aux.weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(steps.contexts, module.head_contexts(x), rtol=0, atol=1e-12)
    for got, own in zip((steps.query, steps.key, steps.value), module.project_qkv(x), strict=True):
        assert torch.equal(got, own)


@pytest.mark.parametrize("name", ["one head", "stacked, out_proj", "split, grouped"])
def test_trace_steps_match_the_formula(name):
    module, x = randomized(VARIANTS[name]()), torch.randn(2, T, D_IN, dtype=torch.float64)
    steps = ph.trace(module, x)
    group = steps.query.shape[1] // steps.key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (steps.key, steps.value))
    above = torch.ones(T, T).triu(1).bool()
    torch.testing.assert_close(steps.scores, steps.query @ key.mT)
    torch.testing.assert_close(steps.masked, (steps.scores / 2.0).masked_fill(above, -torch.inf))
    torch.testing.assert_close(steps.weights, steps.masked.softmax(dim=-1))
    torch.testing.assert_close(steps.contexts, steps.weights @ value)
    assert torch.equal(steps.merged, torch.cat([*steps.contexts.unbind(1)], dim=-1))


def test_trace_uses_memory_mask_and_positions():
    torch.manual_seed(0)
    mha = randomized(ph.MultiHeadAttention(D_IN, 12, 11, 0.0, 3, mask=None, rope=ph.Rope()))
    x, memory = torch.randn(2, 3, D_IN).double(), torch.randn(2, 7, D_IN).double()
    options = {"memory": memory, "mask": ph.mask.lengths([4, 7]), "positions": torch.arange(5, 8)}
    steps = ph.trace(mha, x, **options)
    torch.testing.assert_close(steps.output, mha(x, **options), rtol=0, atol=1e-12)
    assert not steps.weights[0, ..., 4:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_trace_steps_have_the_dtype_of_the_input(dtype):
    for options in ({}, {"position_bias": Bias(), "alibi": True, "sinks": True}):
        mha = ph.MultiHeadAttention(D_IN, 12, 11, 0.0, 3, dtype=dtype, **options)
        steps = ph.trace(mha, torch.randn(2, T, D_IN, dtype=dtype))
        assert {step.dtype for _, step in steps._steps()} == {dtype}


def test_trace_of_stacked_heads_matches_the_lecture_s_digits():
    torch.manual_seed(123)
    stacked = ph.MultiHeadAttentionWrapper(3, 2, 6, 0.0, 2)
    steps = ph.trace(stacked, torch.tensor([TOKENS]))
    expected = torch.tensor([-0.529901, -0.108068, 0.507653, 0.349348])
    torch.testing.assert_close(steps.output[0, -1], expected, rtol=0, atol=1e-6)


def test_trace_gradients_match_the_module():
    module = randomized(ph.MultiHeadAttention(D_IN, 12, 11, 0.0, 3))
    x = torch.randn(2, T, D_IN, dtype=torch.float64, requires_grad=True)
    traced = torch.autograd.grad(ph.trace(module, x).output.sum(), x)[0]
    torch.testing.assert_close(traced, torch.autograd.grad(module(x).sum(), x)[0])


def test_trace_str_shows_every_step_with_its_shape():
    mha = ph.MultiHeadAttention(3, 4, 6, 0.0, 2)
    steps = ph.trace(mha, torch.tensor([TOKENS]))
    text = str(steps)
    for name, step in steps._steps():
        assert f"{name:9}{tuple(step.shape)}" in text
    assert f"{steps.weights[0, 1, 2, 0].item():8.4f}" in text
    assert "-inf" in text
    assert repr(steps).count("\n") == 0
    assert "weights=(1, 2, 6, 6)" in repr(steps)


def test_trace_str_of_a_long_text_shows_shapes_only():
    mha = ph.MultiHeadAttention(3, 4, 40, 0.0, 2, out_proj=False)
    text = str(ph.trace(mha, torch.randn(1, 40, 3)))
    assert "(1, 2, 40, 40)" in text
    assert len(text.splitlines()) == 9


class OwnForward(ph.CausalAttention):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "got"),
    [
        (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (nn.Linear(3, 3), "Linear"),
        (OwnForward(3, 2, 6, 0.0), "OwnForward with its own forward"),
        (ph.MultiHeadAttention, "type"),
    ],
)
def test_trace_of_another_class_raises_with_the_remedy(module, got):
    with pytest.raises(DtypeError, match=f"module must be polyhead's .*; got {got}; convert it"):
        ph.trace(module, torch.randn(1, 3, 3))


def test_trace_of_a_stacked_head_of_another_class_raises():
    wrapper = ph.MultiHeadAttentionWrapper(3, 2, 6, 0.0, 2)
    wrapper.heads[1] = OwnForward(3, 2, 6, 0.0)
    with pytest.raises(DtypeError, match="OwnForward with its own forward"):
        ph.trace(wrapper, torch.randn(1, 3, 3))


def test_trace_of_another_class_remedy_works():
    theirs, x = nn.MultiheadAttention(4, 2, batch_first=True).eval(), torch.randn(1, 3, 4)
    steps = ph.trace(ph.convert.from_torch(theirs), x)
    torch.testing.assert_close(steps.output, theirs(x, x, x)[0])


@pytest.mark.parametrize("name", ["CausalAttention", "MultiHeadAttentionWrapper"])
def test_trace_with_dropout_raises_until_eval(name):
    heads = () if name == "CausalAttention" else (2,)
    module, x = getattr(ph, name)(3, 2, 6, 0.25, *heads), torch.randn(1, 3, 3)
    with pytest.raises(ArgumentError, match=r"dropout=0\.25 in training; call module\.eval"):
        ph.trace(module, x)
    torch.testing.assert_close(ph.trace(module.eval(), x).output, module(x))


def test_trace_bad_shape_raises_as_the_module_does():
    with pytest.raises(ShapeError, match="x must"):
        ph.trace(ph.CausalAttention(3, 2, 6, 0.0), torch.randn(1, 7, 3))
