"""Second derivatives, and those of weights and statistics, of a kernel that has only first ones."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import polyhead as ph
from polyhead.backends import REFERENCE, reference, sdpa
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


ONCE = ph.Backend("once", lambda call: [], once, first_order_only=True)


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

    own = ph.Backend("own", lambda call: [], run, first_order_only=True)
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
        *tensors(), backend=ph.Backend("own", lambda call: [], run, first_order_only=True)
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

    own = ph.Backend("own", lambda call: [], run, first_order_only=True)
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


ALL_AUX = ph.AuxRequest(weights=True, lse=True, stats=True, mean_weights=True)
GIVING = ph.Backend("giving", lambda call: [], once, aux=REFERENCE.aux, first_order_only=True)


def named(output, aux):
    """Everything a call returned, by name; -inf, which has no gradient, as 0."""
    found = {"output": output, **vars(aux)}
    found |= found.pop("stats").tensors
    return {name: x.masked_fill(x == -math.inf, 0.0) for name, x in found.items() if x is not None}


def direction(x):
    """Random numbers of this shape, which bfloat16 has."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype)


def of(result, inputs):
    return torch.autograd.grad(result, inputs, retain_graph=True, materialize_grads=True)


@pytest.fixture
def definitions(monkeypatch):
    """What the definition is asked for, call by call."""
    asked, compute = [], reference.compute_aux

    def compute_aux(call, *args):
        asked.append(call.aux.names)
        return compute(call, *args)

    for module in (reference, ph.functional):
        monkeypatch.setattr(module, "compute_aux", compute_aux)
    return asked


def test_the_definition_runs_only_for_an_aux_that_is_differentiated(definitions):
    inputs = tensors()
    output, aux = ph.attention(*inputs, backend=GIVING, return_aux=ALL_AUX)
    assert aux.weights.requires_grad
    (output.sum() + aux.lse.sum()).backward(retain_graph=True)
    assert definitions == []
    (output.sum() + aux.weights.square().sum()).backward(retain_graph=True)
    aux.stats.entropy.sum().backward()
    assert definitions == [("weights",), ("stats",)]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": ph.mask.causal(), "softcap": 2.0},
        {"mask": ph.mask.lengths([3, 0]), "bias": torch.linspace(-1, 1, 35).view(5, 7)},
        {"mask": ph.mask.prefix(0)},
        {"sinks": torch.linspace(-1, 1, 6)},
        {"alibi_slopes": torch.linspace(0, 1, 6), "mask": ph.mask.window(before=2)},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_aux_and_its_gradients_are_those_of_the_definition(options, dtype, assert_as_good_as_eager):
    """Of every tensor that can be learnt, through each result alone and all of them together."""
    tensor_options = {k: x.to(dtype) for k, x in options.items() if k in ("bias", "sinks")}

    def run(backend, computed):
        inputs = [x.detach().to(computed).requires_grad_() for x in tensors(dtype)]
        added = {k: x.to(computed).requires_grad_() for k, x in tensor_options.items()}
        given = options | added
        results = named(*ph.attention(*inputs, **given, backend=backend, return_aux=ALL_AUX))
        parts = {name: (x * direction(x)).sum() for name, x in results.items()}
        parts["all"] = sum(parts.values())
        leaves = [*inputs, *added.values()]
        return results | {
            f"gradient of {name}": torch.cat([x.flatten() for x in of(part, leaves)])
            for name, part in parts.items()
        }

    exact, eager = (run("reference", kind) for kind in (torch.float64, dtype))
    got = run("cpu", dtype)
    assert got.keys() == eager.keys()
    for name in got:
        assert_as_good_as_eager(got[name], eager[name], exact[name])


def test_every_derivative_of_aux_by_differences():
    """Of every tensor of a call, the first and the second."""
    query, key, value = (x.detach()[:1, :2, :3].double() for x in tensors())
    bias = direction(torch.empty(3, 3)).double()
    sinks, slopes = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.25, 1.0]).double()
    inputs = [x.requires_grad_() for x in (query, key[:, :, :3], value, bias, sinks, slopes)]

    def function(query, key, value, bias, sinks, slopes):
        options = {"bias": bias, "sinks": sinks, "alibi_slopes": slopes, "softcap": 2.0}
        results = ph.attention(
            query, key, value, **options, mask=ph.mask.causal(), backend=GIVING, return_aux=ALL_AUX
        )
        return tuple(named(*results).values())

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
    loss = sum((x * direction(x)).sum() for x in function(*inputs))
    announced = torch.autograd.grad(loss, inputs, create_graph=True)
    for a, b in zip(announced, of(loss, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_a_retained_graph_gives_the_gradients_of_aux_again_and_a_freed_one_none():
    inputs = tensors()
    output, aux = ph.attention(*inputs, backend=GIVING, return_aux=ALL_AUX)
    of_weights = of(aux.weights.square().sum(), inputs)
    of_output = of(output.square().sum(), inputs)  # the kernel's own graph went with the first pass
    together = aux.weights.square().sum() + output.square().sum()
    for a, b, c in zip(of(together, inputs), of_weights, of_output, strict=True):
        assert torch.equal(a, b + c)
    for a, b in zip(of(aux.weights.square().sum(), inputs), of_weights, strict=True):
        assert torch.equal(a, b)
    torch.autograd.grad(aux.stats.entropy.sum(), inputs)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(aux.weights.sum(), inputs)


@pytest.mark.parametrize("backend", [GIVING, "cpu"], ids=str)
def test_weights_under_dropout_are_differentiated_as_without(backend, request):
    if backend == "cpu":
        request.getfixturevalue("kernels")
    inputs = tensors()
    results = []
    for dropout, asked in ((0.0, ALL_AUX), (0.5, ALL_AUX), (0.5, ph.AuxRequest())):
        torch.manual_seed(1)
        results.append(ph.attention(*inputs, dropout=dropout, backend=backend, return_aux=asked))
    (_, whole), (output, aux), (alone, _) = results
    state = torch.get_rng_state()
    dropped = of(output.sum() + aux.weights.square().sum(), inputs)
    want = of(alone.sum(), inputs), of(whole.weights.square().sum(), inputs)
    for a, b, c in zip(dropped, *want, strict=True):
        torch.testing.assert_close(a, b + c)
    assert torch.equal(torch.get_rng_state(), state), "no backward pass moves the generator"
    second = torch.autograd.grad(aux.weights.square().sum(), inputs[0], create_graph=True)[0]
    assert second.requires_grad
    with pytest.raises(BackendError, match=r"dropout = 0\.5 and create_graph=True"):
        torch.autograd.grad(output.sum() + aux.weights.sum(), inputs, create_graph=True)


def test_weights_have_no_gradient_where_only_values_are_learnt():
    query, key, value = tensors()
    inputs = query.detach(), key.detach(), value
    output, aux = ph.attention(*inputs, backend=GIVING, return_aux=ALL_AUX)
    assert output.requires_grad
    assert not aux.weights.requires_grad
    assert not aux.stats.entropy.requires_grad
    output.sum().backward()
    assert value.grad is not None


@pytest.mark.usefixtures("kernels")
def test_the_graph_does_not_hold_the_weights():
    output, aux = ph.attention(*tensors(), backend="cpu", return_aux=ALL_AUX)
    kept = StorageWeakRef(aux.weights.untyped_storage())
    del aux
    gc.collect()
    assert kept.expired()
    assert output.requires_grad


@pytest.mark.usefixtures("kernels")
def test_training_with_statistics_holds_nothing_of_t_by_s(tensor_sizes):
    inputs = [torch.randn(1, 2, 512, 8, requires_grad=True) for _ in range(3)]
    request = ph.AuxRequest(lse=True, stats=True)
    with tensor_sizes:
        output, aux = ph.attention(*inputs, backend="cpu", return_aux=request)
        (output.sum() + aux.lse.sum()).backward()
    assert tensor_sizes.operations
    assert tensor_sizes.largest < 512 * 512 / 4


def test_what_the_kernel_saved_goes_with_a_pass_through_the_weights_too():
    kept = []

    def run(call):
        output, aux = once(call)
        kept.append(weakref.ref(output))
        return output, aux

    own = ph.Backend("own", lambda call: [], run, aux=REFERENCE.aux, first_order_only=True)
    _, aux = ph.attention(*tensors(), backend=own, return_aux=ph.AuxRequest(weights=True))
    gc.collect()
    assert kept[0]() is not None
    aux.weights.square().sum().backward(retain_graph=True)
    gc.collect()
    assert kept[0]() is None
    aux.weights.square().sum().backward()
    assert len(kept) == 1, "weights need no second run of the kernel"


def test_autocast_around_a_backward_pass_does_not_reach_the_definition():
    inputs = tensors()
    _, aux = ph.attention(*inputs, backend=GIVING, return_aux=ALL_AUX)
    outside = of(aux.weights.square().sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = of(aux.weights.square().sum(), inputs)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_gives_the_same_gradients_of_aux():
    plain, saved = tensors(), tensors()

    def loss(*inputs):
        output, aux = ph.attention(*inputs, backend=GIVING, return_aux=ALL_AUX)
        return output.square().sum() + aux.weights.square().sum() + aux.stats.entropy.sum()

    loss(*plain).backward()
    checkpoint(loss, *saved, use_reentrant=False).backward()
    for a, b in zip(plain, saved, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    "function", [lambda x: (x, x, x), lambda x: (x, 2 * x, 3 * x)], ids=["one", "of one another"]
)
def test_a_gradient_announced_as_the_first_of_two_counts_each_tensor_once(function):
    x = tensors(torch.float64)[0]
    output, aux = ph.attention(*function(x), backend=GIVING, return_aux=ALL_AUX)
    loss = output.square().sum() + aux.weights.square().sum()
    announced = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(announced, of(loss, x))
