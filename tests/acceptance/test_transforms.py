"""torch.func: vmap, forward and reverse derivatives, gradients of each sample, ensembles."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import polyhead as ph
from polyhead.errors import BackendError

BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def attend(query, key, value, backend="auto", **options):
    return ph.attention(query, key, value, mask=ph.mask.causal(), backend=backend, **options)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vmap_is_a_loop(backend, dtype):
    query, key, value = tensors(dtype)
    queries = torch.stack([query, 2 * query, -query])
    values = torch.stack([value, -value, value + 1], dim=2)
    got = vmap(lambda q, v: attend(q, key, v, backend), in_dims=(0, 2))(queries, values)
    want = [attend(queries[i], key, values[:, :, i], "reference") for i in range(3)]
    tolerance = 8 * torch.finfo(dtype).eps * values.abs().max().item()
    torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=tolerance)


@BACKENDS
def test_forward_and_reverse_derivatives_agree(backend):
    inputs = tensors()
    tangents = tuple(torch.randn_like(x) for x in inputs)

    def function(query, key, value):
        return attend(query, key, value, backend)

    output, forward = jvp(function, tuple(inputs), tangents)
    again, pull = vjp(function, *inputs)
    assert torch.equal(output, again)
    direction = torch.randn_like(output)
    # <direction, J tangent> = <J^T direction, tangent>
    left = (direction * forward).sum()
    right = sum((a * b).sum() for a, b in zip(pull(direction), tangents, strict=True))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12 * direction.numel())
    step = 1e-6
    ahead, behind = (
        function(*(x + s * t for x, t in zip(inputs, tangents, strict=True))) for s in (step, -step)
    )
    torch.testing.assert_close(forward, (ahead - behind) / (2 * step), rtol=0, atol=1e-7)


@BACKENDS
def test_jacobians_and_hessians(backend):
    query, key, value = tensors()

    def function(query):
        return attend(query, key, value, backend)[0, 0, 1].sum()

    wanted = query.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(wanted), wanted)
    for transform in (grad, jacrev, jacfwd):
        torch.testing.assert_close(transform(function)(query), want, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        hessian(function)(query), jacrev(jacrev(function))(query), rtol=0, atol=1e-13
    )


def test_who_runs_inside_a_transform():
    """torch's kernel knows no transform: it steps back, and says so if it is asked by name."""
    inputs, seen = tensors(torch.float32), []

    def function(query):
        seen.append(ph.explain(query, *inputs[1:]))
        return attend(query, *inputs[1:], backend="sdpa")

    with pytest.raises(BackendError, match=r"sdpa: .*no torch\.func transform; one is active"):
        vmap(function)(inputs[0][None])
    assert seen[0].chosen == "reference"
    assert ph.explain(*inputs).chosen != "reference"  # and not for good


def test_gradients_of_each_sample(variant):
    module, inputs = variant.build(dtype=torch.float64), variant.inputs(4, torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters, sample):
        one = {name: x[None] for name, x in sample.items()}
        return functional_call(module, parameters, (), one).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs)
    for b in range(2):
        value = loss(parameters, {name: x[b] for name, x in inputs.items()})
        want = torch.autograd.grad(value, list(parameters.values()))
        for name, gradient in zip(parameters, want, strict=True):
            torch.testing.assert_close(got[name][b], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["head", "stacked", "everything"], indirect=True)
def test_an_ensemble_runs_at_once(variant):
    models = [variant.build(dtype=torch.float64) for _ in range(3)]
    for i, model in enumerate(models):
        for parameter in model.parameters():
            parameter.data.mul_(1 + i / 4)
    parameters, buffers = stack_module_state(models)
    empty = copy.deepcopy(models[0]).to("meta")
    inputs = variant.inputs(5, torch.float64)

    def run(parameters, buffers):
        return functional_call(empty, (parameters, buffers), (), inputs)

    got = vmap(run)(parameters, buffers)
    want = torch.stack([model(**inputs) for model in models])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13 * want.abs().max().item())


def test_dropout_under_vmap_is_drawn_as_asked():
    query, key, value = tensors(torch.float32)

    def dropped(query):
        return attend(query, key, value, dropout=0.5)

    same = vmap(dropped, randomness="same")(torch.stack([query, query]))
    different = vmap(dropped, randomness="different")(torch.stack([query, query]))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
