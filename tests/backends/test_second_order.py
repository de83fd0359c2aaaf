"""Second derivatives through a backend whose kernel has only first ones."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.utils.checkpoint import checkpoint

import polyhead as ph
from polyhead.backends import REFERENCE, sdpa
from polyhead.errors import BackendError


def tensors(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def penalty(inputs, **options):
    """The size of the gradient, as in a gradient penalty: its own gradient is a second one."""
    output = ph.attention(*inputs, **options)
    first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
    return sum(g.square().sum() for g in first)


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": ph.mask.causal()}, {"mask": ph.mask.lengths([3, 0])}, {"scale": 0.5}],
    ids=str,
)
def test_second_derivatives_of_sdpa_are_those_of_the_definition(options):
    got, want = tensors(), tensors(torch.float64)
    penalty(got, **options, backend="sdpa").backward()
    penalty(want, **options, backend="reference").backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


def once(call):
    """A kernel of the caller's without a second derivative, exact in float64."""
    output, aux = REFERENCE.run(call)
    return _Once.apply(output), aux


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


ONCE = ph.Backend("once", lambda call: [], once, first_order=True)


def test_every_tensor_of_a_call_gets_its_second_derivative():
    inputs = [x.detach().double().requires_grad_() for x in tensors()]
    bias = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(6, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(6, dtype=torch.float64, requires_grad=True)

    def function(query, key, value, bias, sinks, slopes):
        options = {"bias": bias, "sinks": sinks, "alibi_slopes": slopes}
        return ph.attention(query, key, value, **options, backend=ONCE)

    assert gradgradcheck(function, (*inputs, bias, sinks, slopes))


def test_without_it_there_is_none():
    """The test above could otherwise pass by chance."""
    bare = ph.Backend("bare", lambda call: [], once)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty(tensors(), backend=bare).backward()


def test_an_input_without_gradient_gets_none():
    query, key, value = tensors()
    key.requires_grad_(False)
    output = ph.attention(query, key, value, backend="sdpa")
    output.sum().backward()
    assert key.grad is None
    assert query.grad is not None
    assert value.grad is not None


def test_a_retained_graph_is_run_again_and_a_freed_one_is_torchs_error():
    inputs = tensors()
    output = ph.attention(*inputs, backend="sdpa").sum()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    again = torch.autograd.grad(output, inputs)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, inputs)


def test_a_retained_graph_keeps_its_dropout():
    def run(call):
        return REFERENCE.run(call)

    own = ph.Backend("own", lambda call: [], run, first_order=True)
    inputs = tensors()
    output = ph.attention(*inputs, dropout=0.5, backend=own).sum()
    state = torch.get_rng_state()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    again = torch.autograd.grad(output, inputs)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state), "no backward pass moves the generator"


def test_what_the_kernel_saved_goes_with_the_backward_pass():
    kept = []

    def run(call):
        output, aux = REFERENCE.run(call)
        kept.append(weakref.ref(output))
        return output, aux

    output = ph.attention(
        *tensors(), backend=ph.Backend("own", lambda call: [], run, first_order=True)
    ).sum()
    gc.collect()
    assert kept[0]() is not None
    output.backward()
    gc.collect()
    assert kept[0]() is None
    assert output.requires_grad


def test_activation_checkpointing_gives_the_same_gradients():
    plain, saved = tensors(), tensors()
    ph.attention(*plain, mask=ph.mask.causal(), backend="sdpa").square().sum().backward()
    output = checkpoint(
        lambda *x: ph.attention(*x, mask=ph.mask.causal(), backend="sdpa"),
        *saved,
        use_reentrant=False,
    )
    output.square().sum().backward()
    for a, b in zip(plain, saved, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_dropout_of_another_backend_cannot_be_repeated():
    def run(call):
        return REFERENCE.run(call)

    own = ph.Backend("own", lambda call: [], run, first_order=True)
    with pytest.raises(BackendError, match=r"dropout = 0\.5 and create_graph=True"):
        penalty(tensors(), dropout=0.5, backend=own)


def test_explain_says_where_second_derivatives_come_from():
    note = "second derivatives through the definition: they hold T x S scores"
    assert note in ph.explain(*tensors(), backend="sdpa").notes
    assert note not in ph.explain(*tensors(), backend="reference").notes
    with torch.no_grad():
        assert note not in ph.explain(*tensors(), backend="sdpa").notes


def test_a_mask_that_allows_nothing_gives_zero_gradients():
    inputs = tensors()
    nothing = ph.mask.prefix(0)
    for backend in ph.backends():
        if backend.why_not(ph.functional.build_call(*inputs, nothing)):
            continue
        output = ph.attention(*inputs, mask=nothing, backend=backend)
        assert all((g == 0).all() for g in torch.autograd.grad(output.sum(), inputs))


def test_chunks_without_a_key_in_reach_give_zero_gradients(monkeypatch):
    monkeypatch.setattr(sdpa, "_WHOLE", 1)
    inputs = tensors()
    output = ph.attention(*inputs, mask=ph.mask.prefix(0), backend="sdpa")
    assert all((g == 0).all() for g in torch.autograd.grad(output.sum(), inputs))


def test_aux_asked_beside_a_kernel_keeps_its_gradient():
    got, want = tensors(), tensors()
    request = ph.AuxRequest(lse=True)
    ph.attention(*got, backend="sdpa", return_aux=request)[1].lse.sum().backward()
    ph.attention(*want, backend="reference", return_aux=request)[1].lse.sum().backward()
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
