"""torch's kernel called in chunks of queries: the same numbers, and no T x S tensor."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from polyhead.backends import sdpa
from polyhead.functional import build_call


def tensors(B=1, H=2, G=1, T=16, S=None, D=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    S = T if S is None else S
    shapes = [(B, H, T, D), (B, G, S, D), (B, G, S, D)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


CASES = [
    ({}, {"mask": ph.mask.causal() & ph.mask.window(before=9)}),
    ({}, {"mask": ph.mask.window(before=3, after=20)}),
    ({"S": 60}, {"mask": ph.mask.causal()}),
    ({"T": 60, "S": 41}, {"mask": ph.mask.causal()}),
    ({"T": 60, "S": 20}, {"mask": ph.mask.causal() & ph.mask.window(before=5)}),
    ({"B": 2}, {"mask": ph.mask.causal() & ph.mask.lengths([0, 30])}),
    ({"B": 2}, {"mask": ph.mask.causal() & ph.mask.left_padding([41, 3])}),
    ({}, {"mask": ph.mask.causal() & ph.mask.documents([0] * 11 + [1] * 30)}),
    ({}, {"mask": ph.mask.causal() | ph.mask.prefix(20)}),
    ({}, {"bias": torch.linspace(-3, 3, 41)}),
    ({}, {"bias": torch.linspace(-3, 3, 41)[:, None]}),
    ({}, {"bias": torch.linspace(-3, 3, 82).view(1, 2, 41, 1) / 7}),
    ({}, {"mask": ph.mask.causal(), "alibi_slopes": torch.tensor([0.5, 0.01])}),
    ({"S": 60}, {"alibi_slopes": torch.tensor([0.5, 0.01])}),
    (
        {"S": 60},
        {
            "mask": ph.mask.causal(),
            "alibi_slopes": torch.tensor([0.5, 0.01]),
            "bias": torch.linspace(-3, 3, 60),
        },
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sizes", "options"), CASES, ids=str)
def test_chunks_give_the_numbers_of_the_definition(
    assert_as_good_as_eager, monkeypatch, sizes, options, dtype
):
    monkeypatch.setattr(sdpa, "_WHOLE", 100)
    monkeypatch.setattr(sdpa, "_ROWS", 16)
    inputs = [x.requires_grad_() for x in tensors(**{"T": 41} | sizes, dtype=dtype)]
    call = build_call(*inputs, **options)
    assert len(sdpa._chunks(call, call.mask)) > 1
    output = ph.attention(*inputs, **options, backend="sdpa")
    with torch.no_grad():
        assert torch.equal(ph.attention(*inputs, **options, backend="sdpa"), output)

    def definition(dtype):
        copies = [x.detach().to(dtype).requires_grad_() for x in inputs]
        wide = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in options.items()}
        return copies, ph.attention(*copies, **wide, backend="reference")

    (exact_inputs, exact), (eager_inputs, eager) = definition(torch.float64), definition(dtype)
    assert_as_good_as_eager(output, eager, exact)
    weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    for result, leaves in ((output, inputs), (eager, eager_inputs), (exact, exact_inputs)):
        (result.float() * weight).sum().backward()
        assert all(leaf.grad is not None for leaf in leaves)
    for ours, theirs, truth in zip(inputs, eager_inputs, exact_inputs, strict=True):
        assert_as_good_as_eager(ours.grad, theirs.grad, truth.grad)


LINEAR = [
    ({}, {"mask": ph.mask.causal()}),
    ({}, {"mask": ph.mask.causal() & ph.mask.window(before=255)}),
    ({"B": 2}, {"mask": lambda T: ph.mask.lengths([T - 5, T - 5])}),
    ({"B": 2}, {"mask": lambda T: ph.mask.causal() & ph.mask.lengths([T - 5, 9])}),
    ({"S": 1.25}, {"mask": ph.mask.causal()}),
    ({}, {"mask": ph.mask.causal(), "alibi_slopes": torch.tensor([0.5, 0.01])}),
]


def peak(mode, T, sizes, options, backward):
    """Bytes alive at once in operations' results, inputs and their gradients among them."""
    S = int(T * sizes["S"]) if "S" in sizes else T
    inputs = tensors(**{"D": 4} | sizes | {"T": T, "S": S})
    options = {k: v(T) if callable(v) else v for k, v in options.items()}
    with mode:
        if backward:
            inputs = [x.requires_grad_() for x in inputs]
        output = ph.attention(*inputs, **options, backend="sdpa")
        if backward:
            output.sum().backward()
    return mode.peak


@pytest.mark.parametrize("T", [4096, pytest.param(16384, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("sizes", "options"), LINEAR, ids=str)
def test_memory_is_linear_in_the_number_of_tokens(tensor_sizes, sizes, options, backward, T):
    small = peak(type(tensor_sizes)(), T // 2, sizes, options, backward)
    large = peak(tensor_sizes, T, sizes, options, backward)
    assert large < 2.2 * small
    assert tensor_sizes.largest < T * T


def test_memory_of_a_mask_written_out_whole_is_seen(tensor_sizes, monkeypatch):
    """The test above, broken on purpose."""
    monkeypatch.setattr(sdpa, "_WHOLE", 2**62)
    sizes, options = LINEAR[1]
    small = peak(type(tensor_sizes)(), 1024, sizes, options, True)
    assert peak(tensor_sizes, 2048, sizes, options, True) > 3 * small


def test_explain_says_how_many_queries_at_a_time():
    mask = ph.mask.causal() & ph.mask.window(before=511)
    with torch.no_grad():
        explained = ph.explain(*tensors(T=4096), mask=mask, backend="sdpa")
    assert explained.notes == (
        "torch's flash kernel, causal() & window(before=511) written out, T = 4096 by S = 4096, "
        "512 queries by at most 1023 keys at a time",
    )


@pytest.mark.parametrize("transform", ["vmap", "jvp", "dual", "grad"])
def test_sdpa_leaves_transforms_to_the_definition(transform):
    inputs = tensors(T=5)
    reason = "has no forward-mode derivative and no torch.func transform; one is active"
    seen = []

    def attend(query):
        seen.append(ph.explain(query, *inputs[1:]))
        return ph.attention(query, *inputs[1:])

    want = ph.attention(*inputs, backend="reference")
    if transform == "vmap":
        got = torch.func.vmap(attend)(torch.stack([inputs[0]] * 3))
        torch.testing.assert_close(got, torch.stack([want] * 3))
    elif transform == "grad":
        torch.func.grad(lambda query: attend(query).sum())(inputs[0])
    elif transform == "jvp":
        got, _ = torch.func.jvp(attend, (inputs[0],), (inputs[0],))
        torch.testing.assert_close(got, want)
    else:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inputs[0], inputs[0])
            got = torch.autograd.forward_ad.unpack_dual(attend(dual))
        torch.testing.assert_close(got.primal, want)
        assert got.tangent is not None
    assert seen[0].chosen == "reference"
    assert seen[0].reasons["cpu"] == seen[0].reasons["sdpa"] == (reason,)
    assert ph.explain(*inputs).chosen != "reference"
