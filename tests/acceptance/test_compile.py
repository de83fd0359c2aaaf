"""torch.compile: every variant is one graph, and the number of tokens is no reason for another."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter

import polyhead as ph
from polyhead.errors import BackendError, ShapeError

EVERY_LENGTH = ("x", "memory")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_variant_is_one_graph_for_every_length(traced_variant):
    module, counter = traced_variant.build(), CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for T in (5, 7, 17):
        inputs = traced_variant.inputs(T)
        for name in inputs.keys() & EVERY_LENGTH:
            torch._dynamo.mark_dynamic(inputs[name], 1)
        torch.testing.assert_close(compiled(**inputs), module(**inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("variant", ["head", "stacked"], indirect=True)
def test_unmarked_lengths_compile_at_most_twice(variant):
    """As torch does it: the second time a size differs, the graph is made for every size."""
    module, counter = variant.build().eval(), CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        for T in (5, 7, 11, 13, 17):
            inputs = variant.inputs(T)
            torch.testing.assert_close(compiled(**inputs), module(**inputs))
    assert counter.frame_count <= 2


def gradients(module, function, inputs):
    module.zero_grad()
    function(**inputs).square().sum().backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("variant", ["grouped", "sinks"], indirect=True)
def test_the_backward_pass_is_compiled_too(variant):
    """Through a fused kernel, and through the definition."""
    module, inputs = variant.build(), variant.inputs(7)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    want, got = (gradients(module, f, inputs) for f in (module, compiled))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


OTHERS = ("sdpa", "reference")  # as "auto" is where our own kernels were not built


@pytest.mark.parametrize("backend", ["auto", OTHERS], ids=str)
@pytest.mark.parametrize("name", ["scale", "softcap", "dropout"])
def test_a_number_that_changes_is_traced(name, backend):
    """torch.compile makes a number symbolic when it has seen two of it."""
    query = torch.randn(2, 6, 5, 8)

    def attend(**number):
        return ph.attention(query, query, query, backend=backend, **number)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for number in (0.2, 0.3):
        outputs = []
        for function in (compiled, attend):
            torch.manual_seed(0)
            outputs.append(function(**{name: number}))
        torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("G", [1, 6])
def test_every_size_symbolic(G, backend):
    """dynamic=True makes the numbers of heads symbolic too."""
    query, key = torch.randn(2, 6, 5, 8), torch.randn(2, G, 5, 8)
    compiled = torch.compile(ph.attention, fullgraph=True, dynamic=True, backend="eager")
    want = ph.attention(query, key, key, backend=backend)
    torch.testing.assert_close(compiled(query, key, key, backend=backend), want)


@pytest.mark.parametrize(
    ("variant", "backend"),
    [("head", "auto"), ("head", OTHERS), ("everything", OTHERS)],
    indirect=["variant"],
    ids=str,
)
def test_every_number_symbolic(variant, backend):
    """dynamic=True makes a module's own numbers symbolic too."""
    module, inputs = variant.build(dropout=0.5, backend=backend), variant.inputs(5)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    torch.manual_seed(0)
    got = compiled(**inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(got, module(**inputs))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rope", "everything"], indirect=True)
def test_inductor_gives_the_same(variant):
    module = variant.build()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for T in (5, 17):
        inputs = variant.inputs(T)
        torch.testing.assert_close(compiled(**inputs), module(**inputs))
        want, got = (gradients(module, f, inputs) for f in (module, compiled))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["everything"], indirect=True)
def test_decoding_steps_do_not_compile_again(variant):
    module, counter = variant.build().eval(), CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    x = variant.inputs(17)["x"]
    with torch.no_grad():
        cache = module.make_cache(2, preallocate=True)
        parts = [module(x[:, :5], cache=cache)]
        parts += [compiled(x[:, t : t + 1], cache=cache) for t in range(5, 17)]
        want = module(x)
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


class Recorder:
    """A compiler that runs the graph as it is and notes who computes attention in it."""

    def __init__(self):
        self.kernels = []

    def __call__(self, graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes]
        fused = sum("polyhead" in name or "scaled_dot_product" in name for name in names)
        self.kernels.append(["fused"] * fused + ["reference"] * sum(" exp " in n for n in names))
        return graph.forward


@pytest.mark.parametrize("variant", ["grouped"], indirect=True)
def test_use_backend_outside_is_no_stale_choice(variant):
    module, inputs, recorder = variant.build(), variant.inputs(5), Recorder()
    compiled = torch.compile(module, fullgraph=True, backend=recorder)
    outputs = [compiled(**inputs)]
    with ph.use_backend("reference"):
        outputs += [compiled(**inputs), compiled(**inputs), module(**inputs)]
    outputs += [compiled(**inputs), module(**inputs)]
    assert recorder.kernels == [["fused"], ["reference"]]
    assert torch.equal(outputs[1], outputs[3])
    assert torch.equal(outputs[2], outputs[3])
    assert torch.equal(outputs[0], outputs[5])
    assert torch.equal(outputs[4], outputs[5])


@pytest.mark.parametrize("variant", ["grouped"], indirect=True)
def test_use_backend_inside_holds_there_only(variant):
    module, inputs, recorder = variant.build(), variant.inputs(5), Recorder()

    @torch.compile(fullgraph=True, backend=recorder)
    def twice():
        with ph.use_backend("reference"):
            first = module(**inputs)
        return first, module(**inputs)

    first, second = twice()
    assert recorder.kernels == [["fused", "reference"]]
    assert torch.equal(second, module(**inputs))
    with ph.use_backend("reference"):
        assert torch.equal(first, module(**inputs))


BAD = {
    "shape": ({}, {"x": torch.zeros(2, 5, 11)}, ShapeError, "must have d_in = 10 features"),
    "backend": (
        {"softcap": 2.0, "backend": "sdpa"},
        {},
        BackendError,
        r"softcap; got softcap = 2\.0",
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("variant", ["split"], indirect=True)
def test_an_error_is_the_same_or_named_in_torchs(variant, bad):
    """Where a graph may break it is our error; fullgraph=True makes it torch's, which quotes it."""
    options, change, error, message = BAD[bad]
    module = variant.build(**options)
    inputs = variant.inputs(5) | change
    with pytest.raises(error, match=message), torch.no_grad():
        torch.compile(module, backend="eager")(**inputs)
    torch.compiler.reset()
    with pytest.raises(Unsupported, match=message):
        torch.compile(module, backend="eager", fullgraph=True)(**inputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("variant", ["everything"], indirect=True)
def test_aux_is_the_same_compiled_and_without_gradients(variant, mode):
    module, inputs = variant.build(), variant.inputs(5)
    request = ph.AuxRequest(weights=True, lse=True, stats=True)
    want, aux = module(**inputs, return_aux=request)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for function in (module, compiled):
        with mode():
            y, got = function(**inputs, return_aux=request)
            alone = function(**inputs)
        assert torch.equal(y, alone)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(got.weights, aux.weights)
        torch.testing.assert_close(got.lse, aux.lse)
        torch.testing.assert_close(got.stats.tensors, aux.stats.tensors)
