"""`attention()`: every backend against the definition and a naive oracle."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch

import polyhead as ph

# Every backend of the table but flex, which compiles for seconds each kind of call: test_flex.py.
BACKENDS = [backend.name for backend in ph.backends() if backend.name != "flex"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def masks(T, S):
    """Every kind of mask for B = 2, some with queries that may attend to nothing."""
    by_head = torch.rand(2, 6, T, S, generator=torch.Generator().manual_seed(3)) < 0.5
    by_head[0, :, 0] = False
    causal, window = ph.mask.causal(), ph.mask.window(before=2)
    return {
        "none": None,
        "causal": causal,
        "causal from the start": ph.mask.causal(align="start"),
        "window": ph.mask.window(before=1, after=2),
        "window from the start": ph.mask.window(before=1, after=2, align="start"),
        "lengths": ph.mask.lengths([3, 0]),
        "dense by head": ph.mask.dense(by_head),
        "dense": ph.mask.dense(by_head[0, 1]),
        "dense for all queries": ph.mask.dense(by_head[:, :1, -1:]),
        "and": causal & window & ph.mask.lengths([S, 2]),
        "or, not": causal | ~window,
        "left padding": causal & ph.mask.left_padding([0, 2]),
        "prefix": causal | ph.mask.prefix(3),
        **({"documents": ph.mask.documents(torch.arange(S) // 3)} if T <= S else {}),
        "rows": causal.for_queries(2, 2 + T, T + 3),
        "columns": ph.mask.causal(align="start").for_keys(2, S + 2),
    }


KINDS = list(masks(1, 1))


def test_masks_of_these_tests_cover_every_primitive():
    """A new primitive is missing here until it is one of the masks above."""
    primitives = {
        kind
        for kind in vars(ph.mask.primitives).values()
        if isinstance(kind, type) and issubclass(kind, ph.mask.Mask) and kind is not ph.mask.Mask
    }
    used = {
        type(part)
        for mask in masks(5, 13).values()
        if mask is not None
        for part in mask.primitives()
    }
    assert primitives - used == {ph.mask.Custom}  # which cpu refuses: tests/test_backends.py


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "S"), [(13, 13), (5, 13), (13, 7), (1, 13)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_as_good_as_eager(
    tensors, gradient, naive_attention, assert_as_good_as_eager, backend, kind, T, S, dtype
):
    inputs = [x.requires_grad_() for x in tensors(T=T, S=S, D=24, dtype=dtype)]
    mask = masks(T, S).get(kind)  # documents have no T > S: then nothing is masked
    allowed = None if mask is None else mask.materialize(T, S)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    output = ph.attention(*inputs, mask=mask, backend=backend)
    eager = naive_attention(*inputs, allowed=allowed)
    exact = naive_attention(*exact_inputs, allowed=allowed)
    assert_as_good_as_eager(output, eager, exact)
    assert_as_good_as_eager(
        gradient(output, inputs), gradient(eager, inputs), gradient(exact, exact_inputs)
    )


VARIANTS = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.linspace(-1, 2, 6)},
    "alibi": {"alibi_slopes": torch.linspace(0, 1, 6)},
    "bias": {"bias": torch.linspace(-1, 1, 13)},
    "scale": {"scale": 0.3},
    "all of them": {
        "softcap": 1.5,
        "sinks": torch.linspace(-1, 2, 6),
        "alibi_slopes": torch.linspace(0, 1, 6),
        "bias": torch.linspace(-1, 1, 13),
        "scale": 0.3,
    },
    "values of another size": {},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [13, 5, 1])
@pytest.mark.parametrize("kind", ["none", "causal", "lengths", "and", "or, not", "dense by head"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_computes_a_variant_or_refuses(
    tensors, gradient, naive_attention, assert_as_good_as_eager, backend, variant, kind, T, dtype
):
    E = 40 if variant == "values of another size" else None
    inputs = [x.requires_grad_() for x in tensors(T=T, S=13, D=24, E=E, dtype=dtype)]
    options = VARIANTS[variant] | {"mask": masks(T, 13)[kind]}
    if ph.explain(*inputs, **options, backend=backend).chosen is None:
        with pytest.raises(ph.errors.BackendError):
            ph.attention(*inputs, **options, backend=backend)
        return
    output = ph.attention(*inputs, **options, backend=backend)
    mask, slopes = options.pop("mask"), options.pop("alibi_slopes", None)
    options["allowed"] = None if mask is None else mask.materialize(T, 13)
    if slopes is not None:
        distance = (torch.arange(13 - T, 13)[:, None] - torch.arange(13)).abs()
        options["bias"] = options.get("bias", 0.0) - slopes[:, None, None] * distance
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    eager, exact = (naive_attention(*x, **options) for x in (inputs, exact_inputs))
    assert_as_good_as_eager(output, eager, exact)
    assert_as_good_as_eager(
        gradient(output, inputs), gradient(eager, inputs), gradient(exact, exact_inputs)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("G", [1, 2, 6])
@pytest.mark.parametrize("D", [1, 24, 80, 96])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_at_odd_sizes_with_a_bias(
    tensors, naive_attention, assert_as_good_as_eager, backend, D, G, dtype
):
    inputs = tensors(G=G, T=37, S=67, D=D, dtype=dtype)
    bias = torch.randn(6, 37, 67, generator=torch.Generator().manual_seed(5)).to(dtype)
    allowed = ph.mask.causal().materialize(37, 67)
    output = ph.attention(*inputs, mask=ph.mask.causal(), bias=bias, scale=0.2, backend=backend)
    eager = naive_attention(*inputs, allowed=allowed, bias=bias, scale=0.2)
    exact_inputs = [x.double() for x in inputs]
    exact = naive_attention(*exact_inputs, allowed=allowed, bias=bias.double(), scale=0.2)
    assert_as_good_as_eager(output, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "S"), [(5, 7), (7, 5), (1, 6)])
def test_alibi_is_a_bias_of_the_distance(
    tensors, naive_attention, assert_as_good_as_eager, T, S, dtype
):
    """The bias is written here a second time, in plain Python."""
    slopes = torch.tensor([0.5, 0.25, 1.0, 0.0, -0.5, 2.0], dtype=torch.float64)
    distance = torch.tensor([[abs(S - T + t - s) for s in range(S)] for t in range(T)])
    inputs = tensors(T=T, S=S, dtype=dtype)
    bias = -slopes[:, None, None] * distance
    exact = naive_attention(*(x.double() for x in inputs), bias=bias)
    eager = naive_attention(*inputs, bias=bias)
    for backend in BACKENDS:
        if dtype == torch.float64 and backend != "reference":
            continue
        got = ph.attention(*inputs, alibi_slopes=slopes.float(), backend=backend)
        assert_as_good_as_eager(got, eager, exact)


@pytest.mark.parametrize("align", ["end", "start"])
@pytest.mark.parametrize(("T", "S"), [(3, 5), (5, 3), (4, 4), (1, 6)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_stand_where_they_should(tensors, naive_attention, backend, T, S, align):
    """The rule is written here a second time, in plain Python."""
    offset = S - T if align == "end" else 0
    allowed = torch.tensor([[s <= offset + t for s in range(S)] for t in range(T)])
    inputs = tensors(T=T, S=S, dtype=torch.float32)
    output = ph.attention(*inputs, mask=ph.mask.causal(align=align), backend=backend)
    want = naive_attention(*(x.double() for x in inputs), allowed=allowed)
    torch.testing.assert_close(output.double(), want, rtol=0, atol=2e-6)


def empty_rows(T=5, S=3):
    """Calls with queries that may attend to nothing, and which (B, T) those are."""
    dense = torch.ones(T, S, dtype=torch.bool)
    dense[2] = False
    bias = torch.zeros(T, S)
    bias[2] = -math.inf
    third = torch.tensor([[False, False, True, False, False]] * 2)
    before_keys = torch.tensor([[True, True, False, False, False]] * 2)
    second_row = torch.tensor([[False] * 5, [True] * 5])
    return {
        "dense": ({"mask": ph.mask.dense(dense)}, third),
        "dense, all": ({"mask": ph.mask.dense(~dense & dense)}, torch.ones(2, 5).bool()),
        "length 0": ({"mask": ph.mask.lengths([2, 0])}, second_row),
        "T > S": ({"mask": ph.mask.causal()}, before_keys),
        "bias": ({"bias": bias}, third),
        "bias by row": ({"bias": bias[None, None, :, :1]}, third),
        "mask and bias": (
            {"mask": ph.mask.causal(), "bias": bias},
            before_keys | third,
        ),
        "sinks": ({"mask": ph.mask.causal(), "sinks": torch.zeros(6)}, before_keys),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "kind"),
    [(b, kind) for b in BACKENDS for kind in empty_rows() if (b, kind) != ("sdpa", "sinks")],
)
def test_a_query_with_nothing_to_attend_to_gives_zeros(
    tensors, gradients, gradient, all_aux, backend, kind, dtype
):
    options, empty = empty_rows()[kind]
    options = {k: v.to(dtype) if k == "bias" else v for k, v in options.items()}
    inputs = [x.requires_grad_() for x in tensors(T=5, S=3, dtype=dtype)]
    output, aux = ph.attention(*inputs, **options, backend=backend, return_aux=all_aux)
    where = empty[:, None].expand(2, 6, 5)
    assert (output[where] == 0).all()
    assert (output[~where] != 0).any(dim=-1).all()
    assert (aux.weights[where] == 0).all()
    assert (aux.lse[where] == -math.inf).all()
    assert aux.lse[~where].isfinite().all()
    for name in ("entropy", "mean_distance", "mass_first", "mass_previous", "mass_self"):
        assert (getattr(aux.stats, name)[where] == 0).all()
    assert (aux.stats.max_logit[where] == -math.inf).all()
    assert gradient(output, inputs).isfinite().all()
    assert (gradients(output, inputs)[0][where] == 0).all()
    assert (gradient(output[where], inputs) == 0).all(), "nothing is heard of such a query"


@pytest.mark.parametrize("kind", empty_rows())
def test_the_aux_of_an_empty_query_has_zero_gradient(tensors, all_aux, kind):
    options, empty = empty_rows()[kind]
    inputs = [x.requires_grad_() for x in tensors(T=5, S=3, dtype=torch.float32)]
    _, aux = ph.attention(*inputs, **options, return_aux=all_aux)
    where = empty[:, None].expand(2, 6, 5)
    for result in (aux.lse, aux.stats.entropy, aux.stats.mean_distance, aux.weights.square()):
        by_query = torch.autograd.grad(result.sum(), inputs[0], retain_graph=True)[0]
        assert by_query.isfinite().all()
        assert (by_query[where] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lowest_number_as_bias_is_a_mask_where_something_is_left(tensors, backend, dtype):
    query, key, value = tensors(T=4, S=6, dtype=dtype)
    mask = ph.mask.causal() & ph.mask.window(before=2)
    bias = torch.zeros(4, 6, dtype=dtype)
    bias = bias.masked_fill(~mask.materialize(4, 6), torch.finfo(dtype).min)
    with_mask = ph.attention(query, key, value, mask=mask, backend=backend)
    with_bias = ph.attention(query, key, value, bias=bias, backend=backend)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(with_bias, with_mask, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_the_lowest_number_is_a_row_of_equals_not_an_empty_one(tensors, backend):
    """What HF models do with padding: finite, so it is an average and not zeros."""
    query, key, value = tensors(T=4, S=6, dtype=torch.float32)
    bias = torch.full((4, 6), torch.finfo(torch.float32).min)
    output = ph.attention(query * 1e-3, key, value, bias=bias, backend=backend)
    mean = value.mean(dim=2, keepdim=True).repeat_interleave(3, dim=1).expand_as(output)
    torch.testing.assert_close(output, mean)


@pytest.mark.parametrize(
    ("backend", "change"),
    [
        *(
            (backend, change)
            for backend in BACKENDS
            for change in (
                {"mask": ph.mask.causal()},
                {"mask": ph.mask.dense(torch.arange(35).view(5, 7) % 3 > 0)},
                {"bias": torch.linspace(-1, 1, 35).view(5, 7)},
                {"bias": torch.linspace(-1, 1, 7)},
                {"scale": 1.0},
            )
        ),
        ("reference", {"softcap": 0.5}),
        ("reference", {"sinks": torch.zeros(6)}),
        ("reference", {"dropout": 0.5}),
    ],
)
def test_every_argument_changes_the_output(tensors, backend, change):
    inputs = tensors(dtype=torch.float32)
    plain = ph.attention(*inputs, backend=backend)
    torch.manual_seed(0)
    changed = ph.attention(*inputs, **change, backend=backend)
    assert changed.shape == plain.shape
    assert (changed - plain).abs().amax(dim=(2, 3)).min() > 1e-3, "in every batch row and head"


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dropout_draws_no_random_numbers(tensors, backend):
    inputs = tensors(dtype=torch.float32)
    torch.manual_seed(1)
    first, drawn = ph.attention(*inputs, backend=backend), torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), drawn)
    assert torch.equal(ph.attention(*inputs, backend=backend), first)


def in_hostile_memory(x, rng):
    """The same numbers as a strided slice of a buffer that is NaN everywhere else."""
    steps = [rng.choice([1, 2, 3]) for _ in x.shape]
    offsets = [rng.choice([0, 1, 5]) for _ in x.shape]
    sizes = [o + n * s + 2 for o, n, s in zip(offsets, x.shape, steps, strict=True)]
    order = rng.sample(range(x.ndim), x.ndim)
    buffer = torch.full([sizes[axis] for axis in order], math.nan, dtype=x.dtype)
    view = buffer.permute([order.index(axis) for axis in range(x.ndim)])
    for axis, (o, n, s) in enumerate(zip(offsets, x.shape, steps, strict=True)):
        view = view.narrow(axis, o, n * s).unfold(axis, 1, s).squeeze(-1)
    view.copy_(x)
    return view


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_memory(tensors, gradient, naive_attention, assert_as_good_as_eager, backend, seed):
    rng = random.Random(seed)
    plain = tensors(T=13, S=11, D=24, dtype=torch.float32, seed=seed)
    bias = torch.randn(2, 6, 13, 11, generator=torch.Generator().manual_seed(seed))
    allowed = torch.rand(2, 1, 13, 11, generator=torch.Generator().manual_seed(seed)) < 0.7
    hostile = [in_hostile_memory(x, rng) for x in plain]
    assert all(torch.equal(x, y) for x, y in zip(plain, hostile, strict=True))
    inputs = [x.requires_grad_() for x in hostile]
    odd_mask = torch.ones(2, 1, 26, 33, dtype=torch.bool)[:, :, ::2, ::3]
    odd_mask.copy_(allowed)
    output = ph.attention(
        *inputs, mask=ph.mask.dense(odd_mask), bias=in_hostile_memory(bias, rng), backend=backend
    )
    exact_inputs = [x.double().requires_grad_() for x in plain]
    eager_inputs = [x.clone().requires_grad_() for x in plain]
    eager = naive_attention(*eager_inputs, allowed=allowed, bias=bias)
    exact = naive_attention(*exact_inputs, allowed=allowed, bias=bias.double())
    assert_as_good_as_eager(output, eager, exact)
    assert_as_good_as_eager(
        gradient(output, inputs), gradient(eager, eager_inputs), gradient(exact, exact_inputs)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_split_from_one_projection(backend):
    """What a module hands over: (B, T, H, D) seen as (B, H, T, D), q, k and v in one buffer."""
    joint = torch.randn(2, 9, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    query, key, value = (joint[:, :, i].transpose(1, 2) for i in range(3))
    output = ph.attention(query, key, value, mask=ph.mask.causal(), backend=backend)
    packed = [x.contiguous() for x in (query, key, value)]
    want = ph.attention(*packed, mask=ph.mask.causal(), backend=backend)
    torch.testing.assert_close(output, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_key_head_is_repeated_in_memory(tensors, tensor_sizes, backend):
    B, H, G, T, S, D = 2, 8, 2, 3, 64, 16
    inputs = tensors(B=B, H=H, G=G, T=T, S=S, D=D, dtype=torch.float32)
    with tensor_sizes:
        ph.attention(*inputs, mask=ph.mask.causal(), backend=backend)
    assert tensor_sizes.operations
    assert tensor_sizes.largest < B * H * S * D


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_into_a_backend(tensors, all_aux, backend):
    inputs = tensors(dtype=torch.float32)
    outside = ph.attention(*inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, aux = ph.attention(*inputs, backend=backend, return_aux=all_aux)
        assert (inputs[0] @ inputs[0].mT).dtype == torch.bfloat16
    assert torch.equal(inside, outside)
    assert aux.weights.dtype == aux.lse.dtype == torch.float32


def test_an_explanation_in_a_cell_is_as_printed():
    query = torch.ones(1, 2, 3, 8)
    explained, shown = ph.explain(query, query, query), []
    explained._repr_pretty_(SimpleNamespace(text=shown.append), False)
    assert shown == [str(explained)]
