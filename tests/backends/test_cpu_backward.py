"""The backward of the C++ kernels: gradients of all that has one, the same bits, little memory."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from polyhead.backends import cpu
from polyhead.validate import build_call

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_bias_on_all_scores_changes_nothing(tensors, shape):
    """Its gradient is 0 by cancellation: held to rounding in the terms that cancel."""
    inputs = tensors(T=53, S=210)
    bias = torch.full(shape, 0.7, requires_grad=True)
    output = ph.attention(*inputs, bias=bias, backend="cpu")
    torch.testing.assert_close(output, ph.attention(*inputs, backend="cpu"), rtol=0, atol=1e-6)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    terms = torch.zeros(2, 6, 53, 210, dtype=torch.float64, requires_grad=True)
    exact = ph.attention(*(x.double() for x in inputs), bias=terms, backend="reference")
    (by_term,) = torch.autograd.grad(exact, terms, direction.double())
    (grad,) = torch.autograd.grad(output, bias, direction)
    assert grad.shape == shape
    assert grad.abs() <= 4 * torch.finfo(torch.float32).eps * by_term.abs().sum()


def test_the_gradient_of_lse_and_of_stats(tensors):
    inputs = [x.requires_grad_() for x in tensors(T=20, S=30)]
    sinks = torch.zeros(6, requires_grad=True)
    request = ph.AuxRequest(lse=True, stats=True)
    got, want = (
        ph.attention(*inputs, sinks=sinks, backend=backend, return_aux=request)[1]
        for backend in ("cpu", "reference")
    )
    for name, result in {"lse": got.lse.sin().sum(), "stats": got.stats.entropy.sum()}.items():
        expected = want.lse.sin().sum() if name == "lse" else want.stats.entropy.sum()
        asked = [*inputs[:2], *([sinks] if name == "stats" else [])]
        for grad, expected_grad in zip(
            torch.autograd.grad(result, asked, retain_graph=True),
            torch.autograd.grad(expected, asked, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 16])
def test_few_queries_have_the_weights_of_eager_in_their_gradient(
    tensors, gradient, T, naive_attention
):
    """Scores summed in another order in backward made the gradient of values 4 times less exact."""
    inputs = [x.requires_grad_() for x in tensors(H=3, G=3, T=T, D=96)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    eager = [x.detach().requires_grad_() for x in inputs]
    outputs = [
        ph.attention(*inputs, backend="cpu"),
        naive_attention(*eager),
        naive_attention(*exact),
    ]
    ours, theirs, truth = (
        gradient(output, leaves[2:]).double()
        for output, leaves in zip(outputs, (inputs, eager, exact), strict=True)
    )
    rounding = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= (theirs - truth).abs().max() + rounding


def test_a_row_of_the_lowest_number_has_the_gradient_of_an_average(tensors):
    """lse alone would be too coarse there to tell how many keys share the weight."""
    inputs = [x.requires_grad_() for x in tensors(B=1, H=1, G=1, T=17, S=20)]
    bias = torch.full((17, 20), torch.finfo(torch.float32).min)
    output = ph.attention(*inputs, bias=bias, backend="cpu")
    grad = torch.autograd.grad(output.sum(), inputs[2])[0]
    torch.testing.assert_close(grad, torch.full_like(grad, 17 / 20))


@pytest.mark.parametrize("T", [2, 20])
def test_lse_of_a_row_of_the_lowest_number_has_the_gradient_of_an_average(tensors, T):
    query, key, value = tensors(B=1, H=2, G=2, T=T, S=30)
    bias = torch.full((T, 30), torch.finfo(torch.float32).min).requires_grad_()
    request = ph.AuxRequest(lse=True)
    _, aux = ph.attention(query, key, value, bias=bias, backend="cpu", return_aux=request)
    (grad,) = torch.autograd.grad(aux.lse.sum(), bias)
    torch.testing.assert_close(grad, torch.full_like(grad, 2 / 30))


@pytest.mark.parametrize("sink", [-200.0, 0.0, 200.0, 3e38])
def test_a_sink_far_from_the_scores_has_its_gradient(tensors, sink):
    inputs = tensors(B=1, H=2, G=2, T=3, S=5)
    sinks = torch.tensor([sink, 0.5], requires_grad=True)
    got, want = (
        torch.autograd.grad(ph.attention(*inputs, sinks=sinks, backend=backend).sum(), sinks)[0]
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_operator_alone_has_no_second_derivative(tensors):
    """So that it cannot be wrong in silence; `attention` takes the definition's."""
    inputs = [x.requires_grad_() for x in tensors()]
    output, _ = cpu.run(build_call(*inputs))
    (grad,) = torch.autograd.grad(output.sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), inputs[0])


@pytest.mark.parametrize("T", [3, 100])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_each_time(tensors, gradient, threads, T):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    inputs = [x.requires_grad_() for x in tensors(B=1, H=3, G=1, T=T, S=400)]
    bias = torch.zeros(T, 400, requires_grad=True)

    def run():
        output = ph.attention(*inputs, bias=bias, mask=ph.mask.causal(), backend="cpu")
        return [output, gradient(output, [*inputs, bias])]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    torch.set_num_threads(before)


def test_memory_grows_with_tokens_and_not_with_their_square(tensors, tensor_sizes):
    inputs = [x.requires_grad_() for x in tensors(B=1, H=2, G=1, T=512, S=512)]
    with tensor_sizes:
        ph.attention(*inputs, mask=ph.mask.causal(), backend="cpu").sum().backward()
    assert "attention_backward" in tensor_sizes.operations
    assert tensor_sizes.largest < 512 * 512 / 4


@pytest.mark.parametrize(("T", "S"), [(5, 5), (20, 70), (1, 70)])
def test_compiles_with_its_gradient_in_one_graph(tensors, gradient, T, S):
    torch.compiler.reset()
    inputs = [x.requires_grad_() for x in tensors(T=T, S=S)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query, key, value):
        return ph.attention(query, key, value, mask=ph.mask.causal(), backend="cpu")

    output, want = (
        compiled(*inputs),
        ph.attention(*inputs, mask=ph.mask.causal(), backend="cpu"),
    )
    assert torch.equal(output, want)
    assert torch.equal(gradient(output, inputs), gradient(want, inputs))
