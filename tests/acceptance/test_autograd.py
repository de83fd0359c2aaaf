"""Every derivative of every variant: in float64 against differences, in others against float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import polyhead as ph


def as_function(module, inputs):
    """`function(*leaves)` of all parameters and floating inputs, and these by name."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    floating = {name: x for name, x in inputs.items() if x.is_floating_point()}
    leaves = {name: x.clone().requires_grad_() for name, x in (parameters | floating).items()}

    def function(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        called = {name: given.get(name, x) for name, x in inputs.items()}
        return functional_call(module, {name: given[name] for name in parameters}, (), called)

    return function, leaves


def test_gradcheck_and_gradgradcheck(variant):
    module, inputs = variant.build(dtype=torch.float64), variant.inputs(4, torch.float64)
    function, leaves = as_function(module, inputs)
    assert gradcheck(function, tuple(leaves.values()), fast_mode=True)
    assert gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


def output_and_gradients(module, inputs):
    """The output, the gradient of every input, and those of each layer's parameters together.

    Together, because a key's bias moves all scores of a query alike: its own gradient is zero, and
    what is computed of it is the rounding of its neighbours.
    """
    function, leaves = as_function(module, inputs)
    y = function(*leaves.values())
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    gradients = torch.autograd.grad((y * direction.to(y.dtype)).sum(), tuple(leaves.values()))
    layers: dict[str, list[torch.Tensor]] = {}
    for name, gradient in zip(leaves, gradients, strict=True):
        layers.setdefault(name.removesuffix(".weight").removesuffix(".bias"), []).append(gradient)
    parts = {name: torch.cat([g.flatten() for g in layer]) for name, layer in layers.items()}
    return {"output": y.detach()} | parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_good_as_eager_ones(variant, dtype, eager, assert_as_good_as_eager):
    inputs, state = variant.inputs(17, dtype), variant.build(dtype=dtype).state_dict()
    # The same numbers, already rounded.
    module = variant.build(dtype=torch.float64, backend=eager)
    module.load_state_dict(state)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    exact = output_and_gradients(module, wide)
    plain = output_and_gradients(variant.build(dtype=dtype, backend=eager), inputs)
    got = output_and_gradients(variant.build(dtype=dtype), inputs)
    for name in exact:
        assert_as_good_as_eager(got[name], plain[name], exact[name])


def penalty(module, inputs):
    """The size of the gradient, and the gradient of that: a second derivative."""
    function, leaves = as_function(module, inputs)
    tensors = tuple(leaves.values())
    first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
    size = sum(gradient.square().sum() for gradient in first)
    return torch.cat([g.flatten() for g in torch.autograd.grad(size, tensors)])


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@pytest.mark.parametrize("variant", ["head", "grouped", "memory", "window"], indirect=True)
def test_second_derivatives_of_a_fused_kernel(variant, backend, eager, assert_as_good_as_eager):
    """Kernels have first derivatives only."""
    inputs, wide = variant.inputs(7), variant.inputs(7, torch.float64)
    got = penalty(variant.build(backend=backend), inputs)
    plain = penalty(variant.build(backend=eager), inputs)
    exact = penalty(variant.build(backend=eager, dtype=torch.float64), wide)
    assert_as_good_as_eager(got, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_a_bias(dtype, eager, assert_as_good_as_eager):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 7, 8), (2, 2, 5, 8), (2, 2, 5, 8), (1, 6, 7, 5)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def gradient(backend, dtype):
        *inputs, bias = [x.to(dtype).requires_grad_() for x in tensors]
        output = ph.attention(*inputs, bias=bias, mask=ph.mask.causal(), backend=backend)
        return torch.autograd.grad(output.square().sum(), bias)[0]

    exact = gradient(eager, torch.float64)
    assert_as_good_as_eager(gradient("auto", dtype), gradient(eager, dtype), exact)
