"""Backend `cpu` against the float64 oracle: any shapes, strides, masks, variants and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import polyhead as ph

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = st.sampled_from([1, 2, 3, 7, 8, 13, 16, 24, 31, 64, 80, 97])


@st.composite
def tensor_in_memory(draw, shape, dtype, generator, last_is_dense=True):
    """Random numbers of this shape in an odd place of a larger tensor, NaN around them."""
    order = draw(st.permutations(range(3 if last_is_dense else 4)))
    order = [*order, 3] if last_is_dense else order
    margins = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in shape]
    padded = [size + sum(margin) for size, margin in zip(shape, margins, strict=True)]
    memory = torch.full([padded[axis] for axis in order], float("nan"), dtype=dtype)
    view = memory.permute([order.index(axis) for axis in range(4)])
    for axis, (margin, _) in enumerate(margins):
        view = view.narrow(axis, margin, shape[axis])
    view.copy_(torch.randn(shape, dtype=torch.float64, generator=generator))
    repeated = draw(st.sampled_from([None, None, 0, 1, 2]))
    if repeated is not None and shape[repeated]:
        view = view.narrow(repeated, 0, 1).expand(shape)
    return view


@st.composite
def masks(draw, B, H, T, S, generator):
    number = st.integers(-1, 50).map(lambda n: max(n, 0))
    ends = st.sampled_from(["end", "start"])
    per_row = st.lists(number, min_size=B, max_size=B)

    def bools(B, H, T, S):
        return ph.mask.dense(torch.rand(B, H, T, S, generator=generator) < 0.6)

    def documents(rows, kinds):
        ids = torch.randint(0, kinds, (rows, S), generator=generator)
        ids = ids if kinds > 2 else ids.sort(dim=1).values
        return ph.mask.documents(ids[0] if rows == 1 else ids)

    rules = [
        st.builds(lambda align: ph.mask.causal(align=align), ends),
        st.builds(lambda b, a, e: ph.mask.window(before=b, after=a, align=e), number, number, ends),
        st.builds(ph.mask.prefix, number),
        st.builds(ph.mask.lengths, per_row),
        st.builds(ph.mask.left_padding, per_row),
        st.builds(lambda n, e: ph.mask.causal(align=e) | ph.mask.prefix(n), number, ends),
        st.builds(bools, *(st.sampled_from([1, size]) for size in (B, H, T, S))),
        st.builds(lambda n: ~ph.mask.window(before=n, after=n), number),
    ]
    if T <= S:
        rules.append(st.builds(documents, st.sampled_from([1, B]), st.integers(1, 4)))
    mask = None
    for rule in draw(st.lists(st.one_of(rules), max_size=3)):
        mask = rule if mask is None else mask & rule
    return mask


@st.composite
def calls(draw):
    """(query, key, value), the mask, the other options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    B, G, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    T = draw(st.one_of(st.integers(1, 5), st.integers(0, 110)))
    many = st.integers(2048, 2200)  # of few queries with a gradient packed a block at a time
    S = draw(st.one_of(st.integers(0, 40), st.integers(0, 600), *([many] if T <= 5 else [])))
    D, E, H = draw(SIZES), draw(SIZES), G * group

    def tensor(shape, dtype=dtype, dense=True):
        return draw(tensor_in_memory(shape, dtype, generator, dense))

    inputs = [tensor((B, H, T, D)), tensor((B, G, S, D)), tensor((B, G, S, E))]
    options = {}
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, size])) for size in (B, H, T, S)]
        options["bias"] = tensor(shape, draw(st.sampled_from([dtype, torch.float32])), dense=False)
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.7, 3.0]))
    if draw(st.booleans()):
        options["sinks"] = torch.randn(H, generator=generator).to(dtype)
    if draw(st.booleans()):
        options["alibi_slopes"] = torch.rand(H, generator=generator) / 4
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([-0.3, 0.0, 0.5]))
    return inputs, draw(masks(B, H, T, S, generator)), options


def assert_agrees(naive_attention, case, learns):
    inputs, mask, options = case
    T, S = inputs[0].shape[2], inputs[1].shape[2]
    allowed = None if mask is None else mask.materialize(T, S)
    options = dict(options)
    leaves = [x.detach().requires_grad_(learns) for x in inputs]
    output = ph.attention(*leaves, mask=mask, **options, backend="cpu")
    results = [[output, *_gradients(output, leaves)]]
    slopes = options.pop("alibi_slopes", None)
    for dtype in (inputs[0].dtype, torch.float64):
        theirs = {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
        if slopes is not None:
            away = (torch.arange(S) - torch.arange(S - T, S)[:, None]).abs()
            bias = options.get("bias", torch.zeros(()))
            theirs["bias"] = (bias.double() - slopes.double()[:, None, None] * away).to(dtype)
        leaves = [x.detach().to(dtype, copy=True).requires_grad_(learns) for x in inputs]
        output = naive_attention(*leaves, allowed=allowed, **theirs)
        results.append([output, *_gradients(output, leaves)])
    query, key, values = (x.double().abs().max().item() if x.numel() else 0.0 for x in inputs)
    # What is added up: values; in gradients values times a direction, times a query or a key.
    terms = [values, 4 * values * max(query, key, 1.0)]
    for ours, eager, exact, size in zip(*results, terms[: len(results[0])], strict=True):
        assert_close(ours, eager, exact, size)


def assert_close(ours, eager, exact, terms):
    """Twice the error of an eager run, and some roundings of terms of this size.

    Where few terms cancel, eager may be right by chance.
    """
    if exact.numel() == 0:
        return
    eager_error = (eager.double() - exact).abs().max().item()
    info = torch.finfo(ours.dtype)
    rounding = (16 if info.bits == 32 else 4) * info.eps * max(terms, exact.abs().max().item())
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2 * eager_error + rounding)


def _gradients(output, leaves):
    """All in one, as they share the size of what cancels in them; or none."""
    if not leaves[0].requires_grad or not output.requires_grad:
        return []
    generator = torch.Generator().manual_seed(9)
    direction = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    grads = torch.autograd.grad(output, leaves, direction.to(output.dtype), materialize_grads=True)
    return [torch.cat([grad.flatten() for grad in grads])]


# The oracle walks over heads; what is drawn is large on purpose.
RARELY = settings(
    deadline=None, max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True
)
OFTEN = settings(RARELY, max_examples=3000, derandomize=False)


@RARELY
@given(case=calls(), learns=st.booleans())
def test_some_calls(naive_attention, case, learns):
    assert_agrees(naive_attention, case, learns)


@pytest.mark.slow
@OFTEN
@given(case=calls(), learns=st.booleans())
def test_many_calls(naive_attention, case, learns):
    assert_agrees(naive_attention, case, learns)
