"""Weights in training: the kernel's numbers, with the gradient that the formula has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import polyhead as ph
from polyhead.backends import reference

ALL_AUX = ph.AuxRequest(weights=True, lse=True, stats=True, mean_weights=True)


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def heard(y, weights):
    """A loss of the output and the weights."""
    return y.square().sum() + weights.square().sum()


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("listens", ["output", "weights", "both"])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "kdim": 11}], ids=str)
def test_the_drop_in_trains_as_torchs(options, listens, average, assert_as_good_as_eager):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True, **options)
    ours = ph.drop_in.MultiheadAttention(24, 3, batch_first=True, **options)
    ours.load_state_dict(theirs.state_dict())
    inputs = torch.randn(2, 5, 24), torch.randn(2, 7, theirs.kdim), torch.randn(2, 7, 24)
    forbidden = torch.ones(5, 7, dtype=torch.bool).triu(2)
    found = []
    for module in (ours, theirs, copy.deepcopy(theirs).double()):
        dtype = module.out_proj.weight.dtype
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y, weights = module(*leaves, attn_mask=forbidden, average_attn_weights=average)
        losses = {"output": y.square().sum(), "weights": weights.square().sum()}
        loss = losses.get(listens, sum(losses.values()))
        leaves += module.parameters()
        gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        found.append((y, weights, flat(gradients)))
    for got, eager, exact in zip(*found, strict=True):
        assert_as_good_as_eager(got, eager, exact)


@pytest.mark.usefixtures("kernels")
def test_the_drop_in_trains_through_the_kernels_alone(monkeypatch):
    """It returns weights unless told not to, and few look at their gradient."""
    module = ph.drop_in.MultiheadAttention(24, 3, batch_first=True)
    x = torch.randn(2, 5, 24, requires_grad=True)

    def refuse(*arguments):
        pytest.fail("the definition ran")

    for place in (reference, ph.functional):
        monkeypatch.setattr(place, "compute_aux", refuse)
    y, weights = module(x, x, x)
    y.square().sum().backward()
    assert weights.requires_grad
    assert x.grad.any()


@pytest.mark.parametrize(
    "variant", ["head", "stacked", "lengths", "alibi", "everything"], indirect=True
)
def test_a_module_has_the_gradient_of_everything_it_returns(variant, assert_as_good_as_eager):
    found = []
    for backend, dtype in (
        ("auto", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        module = variant.build(backend=backend)
        module, inputs = module.to(dtype), variant.inputs(7)
        inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
        options = {"mask": ph.mask.lengths(inputs.pop("lengths"))} if variant.lengths else {}
        module = module.inner if variant.lengths else module
        y, aux = module(**inputs, **options, return_aux=ALL_AUX)
        loss = heard(y, aux.weights) + aux.mean_weights.square().sum()
        loss = loss + flat(aux.stats.tensors.values()).sum() + aux.lse.sin().sum()
        found.append(flat(torch.autograd.grad(loss, list(module.parameters()))))
    assert_as_good_as_eager(*found)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("variant", ["stacked", "grouped"], indirect=True)
def test_checkpointing_changes_no_gradient(variant, dropout):
    module, x = variant.build(dropout=dropout), variant.inputs(17)["x"]

    def loss(x):
        y, aux = module(x, return_aux=ALL_AUX)
        return heard(y, aux.weights)

    found = []
    for function in (loss, lambda x: checkpoint(loss, x, use_reentrant=False)):
        torch.manual_seed(0)
        found.append(flat(torch.autograd.grad(function(x), list(module.parameters()))))
    assert torch.equal(*found)


@pytest.mark.parametrize("variant", ["grouped"], indirect=True)
def test_compiled_it_has_the_same_gradient(variant):
    module, x = variant.build(), variant.inputs(7)["x"]

    def gradient(call):
        y, aux = call(x, return_aux=ALL_AUX)
        loss = heard(y, aux.weights) + aux.stats.entropy.sum()
        return flat(torch.autograd.grad(loss, list(module.parameters())))

    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), gradient(module))
    torch.compiler.reset()
