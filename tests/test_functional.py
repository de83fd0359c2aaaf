"""`attention()`: the definition against a naive oracle, every backend against the definition."""

from __future__ import annotations

import math
import random

import pytest
import torch

import polyhead as ph

BACKENDS = ["reference", "sdpa", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_AUX = ph.AuxRequest(weights=True, lse=True, stats=True, mean_weights=True)


def tensors(B=2, H=6, G=2, T=5, S=7, D=8, E=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, D), (B, G, S, D), (B, G, S, E or D)]
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes
    ]


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


def gradients(output, inputs, seed=9):
    direction = torch.randn(
        output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return torch.autograd.grad(output, inputs, direction.to(output.dtype), retain_graph=True)


def gradient(output, inputs):
    """All gradients as one vector, so that a part that is zero by cancellation has a scale."""
    return torch.cat([x.flatten() for x in gradients(output, inputs)])


def test_the_oracle_attends_as_plain_python_does(naive_attention):
    """One head by hand, a number at a time."""
    query, key, value = (x.tolist() for x in tensors(B=1, H=1, G=1, T=2, S=3, D=2))
    want = []
    for q in query[0][0]:
        powers = [math.exp(sum(a * b for a, b in zip(q, k, strict=True)) * 0.5) for k in key[0][0]]
        want.append(
            [
                sum(p * v[e] for p, v in zip(powers, value[0][0], strict=True)) / sum(powers)
                for e in range(2)
            ]
        )
    got = naive_attention(*tensors(B=1, H=1, G=1, T=2, S=3, D=2), scale=0.5)
    torch.testing.assert_close(got, torch.tensor([[want]], dtype=torch.float64))


SIZES = [
    {"H": 1, "G": 1, "T": 1, "S": 1, "D": 24},
    {"H": 3, "G": 3, "T": 17, "S": 17, "D": 80},
    {"H": 6, "G": 3, "T": 17, "S": 31, "D": 96},
    {"H": 21, "G": 7, "T": 5, "S": 3, "D": 24, "E": 40},
    {"H": 7, "G": 1, "T": 1, "S": 257, "D": 80, "E": 1},
    {"B": 1, "H": 2, "G": 1, "T": 257, "S": 17, "D": 24},
    {"B": 1, "H": 2, "G": 2, "T": 257, "S": 257, "D": 96, "E": 24},
    {"H": 6, "G": 2, "T": 5, "S": 7, "D": 1, "E": 3},
]
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -1.5},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "causal": {"mask": ph.mask.causal()},
    "everything": {
        "mask": ph.mask.causal() | ph.mask.window(after=3),
        "bias": (1, 1, "T", "S"),
        "scale": 0.9,
        "softcap": 2.0,
        "sinks": True,
    },
    **{
        f"bias {shape}": {"bias": shape}
        for shape in [
            ("B", "H", "T", "S"),
            ("B", 1, 1, "S"),
            (1, "H", "T", 1),
            ("H", "T", "S"),
            ("T", "S"),
            ("S",),
            (1,),
            (),
        ]
    },
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_definition_is_the_oracle_to_1e12(naive_attention, size, option):
    inputs = [x.requires_grad_() for x in tensors(**size)]
    (B, H, T, _), S = inputs[0].shape, inputs[1].shape[2]
    options = dict(OPTIONS[option])
    generator = torch.Generator().manual_seed(4)
    if "bias" in options:
        named = {"B": B, "H": H, "T": T, "S": S, 1: 1}
        shape = [named[axis] for axis in options["bias"]]
        options["bias"] = torch.randn(shape, dtype=torch.float64, generator=generator)
        inputs.append(options["bias"].requires_grad_())
    if "sinks" in options:
        options["sinks"] = torch.randn(H, dtype=torch.float64, generator=generator)
        inputs.append(options["sinks"].requires_grad_())
    output = ph.attention(*inputs[:3], **options, backend="reference")
    mask = options.pop("mask", None)
    allowed = None if mask is None else mask.materialize(T, S)
    want = naive_attention(*inputs[:3], **options, allowed=allowed)
    assert output.shape == (B, H, T, inputs[2].shape[-1])
    torch.testing.assert_close(output, want, rtol=0, atol=1e-12)
    for got, expected in zip(gradients(output, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "S"), [(5, 7), (7, 5), (1, 6)])
def test_alibi_is_a_bias_of_the_distance(naive_attention, assert_as_good_as_eager, T, S, dtype):
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


def test_alibi_slopes_can_be_learnt():
    slopes = torch.tensor([0.5, 0.25, 1.0, 0.1, 0.2, 2.0], dtype=torch.float64, requires_grad=True)
    inputs = tensors(T=3, S=4)
    assert torch.autograd.gradcheck(lambda s: ph.attention(*inputs, alibi_slopes=s), (slopes,))


def test_a_custom_mask_is_the_rule_it_states(naive_attention):
    inputs = tensors()
    rule = ph.mask.custom(lambda b, h, q, k: (q + k + b + h) % 3 > 0, batch=2, heads=6)
    at = torch.meshgrid(*(torch.arange(n) for n in (2, 6, 5, 7)), indexing="ij")
    allowed = (at[2] + 2 + at[3] + at[0] + at[1]) % 3 > 0  # query 0 of 5 stands at key 2 of 7
    want = naive_attention(*inputs, allowed=allowed)
    torch.testing.assert_close(ph.attention(*inputs, mask=rule), want, rtol=0, atol=1e-12)
    mask = rule & ph.mask.causal()
    want = naive_attention(*inputs, allowed=allowed & ph.mask.causal().materialize(5, 7))
    torch.testing.assert_close(ph.attention(*inputs, mask=mask), want, rtol=0, atol=1e-12)


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
    naive_attention, assert_as_good_as_eager, backend, variant, kind, T, dtype
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


def test_gradcheck_of_everything_differentiable():
    inputs = [x.requires_grad_() for x in tensors(B=2, H=2, G=1, T=3, S=2, D=3, E=2)]
    bias = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def everything(query, key, value, bias, sinks):
        output, aux = ph.attention(
            query,
            key,
            value,
            bias=bias,
            sinks=sinks,
            softcap=3.0,
            mask=ph.mask.causal(),  # T > S: the first query attends to nothing
            return_aux=ALL_AUX,
        )
        lse = aux.lse.masked_fill(aux.lse == -math.inf, 0.0)
        return output, aux.weights, lse, aux.stats.entropy, aux.stats.mean_distance

    assert torch.autograd.gradcheck(everything, (*inputs, bias, sinks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "S"), [(13, 13), (5, 13), (13, 7), (1, 13)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_as_good_as_eager(
    naive_attention, assert_as_good_as_eager, backend, kind, T, S, dtype
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("G", [1, 2, 6])
@pytest.mark.parametrize("D", [1, 24, 80, 96])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_at_odd_sizes_with_a_bias(
    naive_attention, assert_as_good_as_eager, backend, D, G, dtype
):
    inputs = tensors(G=G, T=37, S=67, D=D, dtype=dtype)
    bias = torch.randn(6, 37, 67, generator=torch.Generator().manual_seed(5)).to(dtype)
    allowed = ph.mask.causal().materialize(37, 67)
    output = ph.attention(*inputs, mask=ph.mask.causal(), bias=bias, scale=0.2, backend=backend)
    eager = naive_attention(*inputs, allowed=allowed, bias=bias, scale=0.2)
    exact_inputs = [x.double() for x in inputs]
    exact = naive_attention(*exact_inputs, allowed=allowed, bias=bias.double(), scale=0.2)
    assert_as_good_as_eager(output, eager, exact)


@pytest.mark.parametrize("align", ["end", "start"])
@pytest.mark.parametrize(("T", "S"), [(3, 5), (5, 3), (4, 4), (1, 6)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_stand_where_they_should(naive_attention, backend, T, S, align):
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
def test_a_query_with_nothing_to_attend_to_gives_zeros(backend, kind, dtype):
    options, empty = empty_rows()[kind]
    options = {k: v.to(dtype) if k == "bias" else v for k, v in options.items()}
    inputs = [x.requires_grad_() for x in tensors(T=5, S=3, dtype=dtype)]
    output, aux = ph.attention(*inputs, **options, backend=backend, return_aux=ALL_AUX)
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
def test_the_aux_of_an_empty_query_has_zero_gradient(kind):
    options, empty = empty_rows()[kind]
    inputs = [x.requires_grad_() for x in tensors(T=5, S=3, dtype=torch.float32)]
    _, aux = ph.attention(*inputs, **options, return_aux=ALL_AUX)
    where = empty[:, None].expand(2, 6, 5)
    for result in (aux.lse, aux.stats.entropy, aux.stats.mean_distance, aux.weights.square()):
        by_query = torch.autograd.grad(result.sum(), inputs[0], retain_graph=True)[0]
        assert by_query.isfinite().all()
        assert (by_query[where] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lowest_number_as_bias_is_a_mask_where_something_is_left(backend, dtype):
    query, key, value = tensors(T=4, S=6, dtype=dtype)
    mask = ph.mask.causal() & ph.mask.window(before=2)
    bias = torch.zeros(4, 6, dtype=dtype)
    bias = bias.masked_fill(~mask.materialize(4, 6), torch.finfo(dtype).min)
    with_mask = ph.attention(query, key, value, mask=mask, backend=backend)
    with_bias = ph.attention(query, key, value, bias=bias, backend=backend)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(with_bias, with_mask, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_the_lowest_number_is_a_row_of_equals_not_an_empty_one(backend):
    """What HF models do with padding: finite, so it is an average and not zeros."""
    query, key, value = tensors(T=4, S=6, dtype=torch.float32)
    bias = torch.full((4, 6), torch.finfo(torch.float32).min)
    output = ph.attention(query * 1e-3, key, value, bias=bias, backend=backend)
    mean = value.mean(dim=2, keepdim=True).repeat_interleave(3, dim=1).expand_as(output)
    torch.testing.assert_close(output, mean)


AUX_CASES = {
    "plain": {},
    "mask": {"mask": ph.mask.causal()},
    "bias": {"bias": torch.linspace(-1, 1, 35).view(5, 7)},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 1, 6)},
    "dropout": {"dropout": 0.3},
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("case", AUX_CASES)
def test_asking_for_aux_changes_neither_output_nor_random_numbers(case, dtype):
    inputs = tensors(dtype=dtype)
    options = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in AUX_CASES[case].items()
    }
    torch.manual_seed(1)
    alone, next_alone = ph.attention(*inputs, **options), torch.rand(3)
    asked = [{name: True} for name in ("weights", "lse", "stats", "mean_weights")]
    asked.append({"weights": True, "lse": True})
    for names in asked:
        torch.manual_seed(1)
        output, aux = ph.attention(*inputs, **options, return_aux=ph.AuxRequest(**names))
        assert torch.equal(output, alone)
        assert torch.equal(torch.rand(3), next_alone)
        for name in ("weights", "lse", "stats", "mean_weights"):
            assert (getattr(aux, name) is not None) == (name in names)


@pytest.mark.parametrize("case", [name for name in AUX_CASES if name != "dropout"])
def test_weights_and_lse_are_those_of_the_output(case):
    query, key, value = tensors()
    options = {
        k: v.double() if isinstance(v, torch.Tensor) else v for k, v in AUX_CASES[case].items()
    }
    output, aux = ph.attention(query, key, value, **options, return_aux=ALL_AUX)
    repeated_key, repeated_value = (x.repeat_interleave(3, dim=1) for x in (key, value))
    torch.testing.assert_close(aux.weights @ repeated_value, output, rtol=0, atol=1e-13)
    assert torch.equal(aux.mean_weights, aux.weights.mean(dim=1))
    scores = query @ repeated_key.mT / math.sqrt(8)
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores + options.get("bias", 0.0)
    if "mask" in options:
        scores = scores.masked_fill(~options["mask"].materialize(5, 7), -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    torch.testing.assert_close(aux.lse, lse)
    torch.testing.assert_close(aux.stats.max_logit, scores.amax(dim=-1))
    total = aux.weights.sum(dim=-1)
    if "sinks" in options:
        left = torch.exp(lse) / (torch.exp(lse) + torch.exp(options["sinks"])[:, None])
        torch.testing.assert_close(total, left)
    else:
        torch.testing.assert_close(total, torch.ones_like(total))


def test_a_large_sink_takes_the_weight_and_leaves_lse_alone():
    inputs = [x.requires_grad_() for x in tensors(dtype=torch.float32)]
    _, without = ph.attention(*inputs, return_aux=ALL_AUX)
    sinks = torch.full((6,), 300.0, requires_grad=True)
    output, aux = ph.attention(*inputs, sinks=sinks, return_aux=ALL_AUX)
    assert torch.equal(aux.lse, without.lse)
    assert (aux.weights == 0).all()
    assert (gradient(output, [*inputs, sinks]) == 0).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_dtype_in_is_the_dtype_out(backend, dtype):
    output, aux = ph.attention(*tensors(dtype=dtype), backend=backend, return_aux=ALL_AUX)
    assert output.dtype == aux.weights.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert aux.lse.dtype == aux.stats.entropy.dtype == wide


def test_a_float32_bias_beside_16_bit_queries_is_not_rounded(naive_attention):
    inputs = tensors(dtype=torch.bfloat16)
    bias = torch.full((7,), 100.0)
    bias[3] += 0.2  # bfloat16 has no number between 100 and 100.5
    output, aux = ph.attention(*inputs, bias=bias, return_aux=ph.AuxRequest(lse=True))
    assert output.dtype == torch.bfloat16
    _, wide = ph.attention(
        *(x.float() for x in inputs), bias=bias, return_aux=ph.AuxRequest(lse=True)
    )
    torch.testing.assert_close(aux.lse, wide.lse, rtol=1e-6, atol=0)


def test_stats_by_hand():
    """Scores are the logs of 1, 2, 1: weights 1/4, 1/2, 1/4 for a query that stands at key 2."""
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64).log().view(1, 1, 3, 1)
    _, aux = ph.attention(query, key, key, scale=1.0, return_aux=ALL_AUX)
    assert aux.weights.flatten().tolist() == pytest.approx([0.25, 0.5, 0.25])
    assert aux.lse.item() == pytest.approx(math.log(4))
    stats = aux.stats
    assert stats.entropy.item() == pytest.approx(1.5 * math.log(2))
    assert stats.mean_distance.item() == pytest.approx(0.25 * 2 + 0.5 * 1)
    assert stats.mass_first.item() == pytest.approx(0.25)
    assert stats.mass_previous.item() == pytest.approx(0.5)
    assert stats.mass_self.item() == pytest.approx(0.25)
    assert stats.max_logit.item() == pytest.approx(math.log(2))


def test_stats_of_equal_weights_by_hand():
    """T = 2 against S = 4 with equal scores: the queries stand at keys 2 and 3."""
    query, key = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 4, 8)
    _, aux = ph.attention(query, key, key, mask=ph.mask.causal(), return_aux=ALL_AUX)
    stats = {name: x.flatten().tolist() for name, x in vars(aux.stats).items()}
    assert stats["entropy"] == pytest.approx([math.log(3), math.log(4)])
    assert stats["mean_distance"] == pytest.approx([(2 + 1) / 3, (3 + 2 + 1) / 4])
    assert stats["mass_first"] == pytest.approx([1 / 3, 1 / 4])
    assert stats["mass_previous"] == pytest.approx([1 / 3, 1 / 4])
    assert stats["mass_self"] == pytest.approx([1 / 3, 1 / 4])
    assert stats["max_logit"] == [0.0, 0.0]


def test_a_distance_to_a_later_key_counts_as_one_to_an_earlier():
    """T = S = 3 and equal weights, nothing masked."""
    zeros = torch.zeros(1, 1, 3, 8)
    _, aux = ph.attention(zeros, zeros, zeros, return_aux=ALL_AUX)
    assert aux.stats.mean_distance.flatten().tolist() == pytest.approx([3 / 3, 2 / 3, 3 / 3])
    assert aux.stats.mass_previous.flatten().tolist() == pytest.approx([0, 1 / 3, 1 / 3])


def test_the_same_seed_gives_the_same_bits():
    inputs = tensors(dtype=torch.float32)

    def output(seed):
        torch.manual_seed(seed)
        return ph.attention(*inputs, dropout=0.5)

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dropout_draws_no_random_numbers(backend):
    inputs = tensors(dtype=torch.float32)
    torch.manual_seed(1)
    first, drawn = ph.attention(*inputs, backend=backend), torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), drawn)
    assert torch.equal(ph.attention(*inputs, backend=backend), first)


def test_dropout_acts_on_normalised_weights():
    """Values are the unit vectors, so that the output is the weights that were kept."""
    query, key, _ = tensors(B=400, H=2, G=1, T=5, S=7, dtype=torch.float64)
    value = torch.eye(7, dtype=torch.float64).expand(400, 1, 7, 7)
    torch.manual_seed(0)
    kept, aux = ph.attention(query, key, value, dropout=0.25, return_aux=ALL_AUX)
    whole, before = ph.attention(query, key, value, return_aux=ALL_AUX)
    torch.testing.assert_close(aux.weights, whole, rtol=0, atol=1e-14)
    assert torch.equal(aux.lse, before.lse)
    assert torch.equal(aux.stats.entropy, before.stats.entropy)
    dropped = kept == 0
    torch.testing.assert_close(kept, torch.where(dropped, 0.0, whole / 0.75))
    count = kept.numel()
    assert dropped.double().mean().item() == pytest.approx(
        0.25, abs=5 * math.sqrt(0.25 * 0.75 / count)
    )


def test_dropout_is_unbiased():
    query, key, value = tensors(B=1, H=2, G=1, T=3, S=5, D=4)
    many = 20_000
    torch.manual_seed(0)
    outputs = ph.attention(*(x.expand(many, -1, -1, -1) for x in (query, key, value)), dropout=0.4)
    error = (outputs.mean(dim=0) - ph.attention(query, key, value)[0]).abs()
    assert (error < 5 * outputs.std(dim=0) / math.sqrt(many)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask", [None, ph.mask.causal(), ph.mask.window(before=1)], ids=repr)
@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_nothing_in_gives_nothing_or_zeros(B, T, S, mask, dtype):
    inputs = [x.requires_grad_() for x in tensors(B=B, T=T, S=S, E=3, dtype=dtype)]
    output, aux = ph.attention(*inputs, mask=mask, return_aux=ALL_AUX)
    assert output.shape == (B, 6, T, 3)
    assert (output == 0).all()
    assert aux.weights.shape == (B, 6, T, S)
    assert aux.lse.shape == aux.stats.entropy.shape == (B, 6, T)
    if S == 0:
        assert (aux.lse == -math.inf).all()
        assert (aux.stats.max_logit == -math.inf).all()
    assert [x.shape for x in gradients(output, inputs)] == [x.shape for x in inputs]
    assert (gradient(output, inputs) == 0).all()


def test_no_keys_but_a_sink_gives_zeros():
    query, key, value = tensors(S=0)
    output = ph.attention(query, key, value, sinks=torch.zeros(6))
    assert (output == 0).all()


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
def test_hostile_memory(naive_attention, assert_as_good_as_eager, backend, seed):
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
def test_every_argument_changes_the_output(backend, change):
    inputs = tensors(dtype=torch.float32)
    plain = ph.attention(*inputs, backend=backend)
    torch.manual_seed(0)
    changed = ph.attention(*inputs, **change, backend=backend)
    assert changed.shape == plain.shape
    assert (changed - plain).abs().amax(dim=(2, 3)).min() > 1e-3, "in every batch row and head"


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_key_head_is_repeated_in_memory(tensor_sizes, backend):
    B, H, G, T, S, D = 2, 8, 2, 3, 64, 16
    inputs = tensors(B=B, H=H, G=G, T=T, S=S, D=D, dtype=torch.float32)
    with tensor_sizes:
        ph.attention(*inputs, mask=ph.mask.causal(), backend=backend)
    assert tensor_sizes.operations
    assert tensor_sizes.largest < B * H * S * D


def test_no_key_head_is_repeated_in_the_gradient_of_the_definition(tensor_sizes):
    B, H, G, T, S, D = 2, 8, 2, 3, 64, 16
    inputs = tensors(B=B, H=H, G=G, T=T, S=S, D=D, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    with tensor_sizes:
        ph.attention(*inputs, backend="reference").sum().backward()
    assert tensor_sizes.largest < B * H * S * D


@pytest.mark.parametrize("mask", [None, ph.mask.causal(), ph.mask.causal(align="start")], ids=repr)
def test_sdpa_holds_no_scores(tensor_sizes, mask):
    T = S = 512
    inputs = tensors(B=1, H=2, G=1, T=T, S=S, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    with tensor_sizes:
        ph.attention(*inputs, mask=mask, backend="sdpa").sum().backward()
    assert tensor_sizes.operations
    assert tensor_sizes.largest < T * S / 4


def test_decoding_one_token_writes_no_mask(tensor_sizes):
    inputs = tensors(T=1, S=64, dtype=torch.float32)
    with tensor_sizes:
        ph.attention(*inputs, mask=ph.mask.causal(), backend="sdpa")
    assert tensor_sizes.operations == ["_scaled_dot_product_flash_attention_for_cpu"]


@pytest.mark.parametrize(("T", "S"), [(5, 5), (5, 7), (1, 7)])
def test_compiles_in_one_graph(T, S):
    torch.compiler.reset()
    inputs = tensors(T=T, S=S, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(query, key, value):
        return ph.attention(query, key, value, mask=ph.mask.causal())

    assert torch.equal(compiled(*inputs), ph.attention(*inputs, mask=ph.mask.causal()))


def test_without_aux_is_the_same_call():
    call = ph.functional.build_call(*tensors(), scale=0.5, aux=ALL_AUX)
    bare = call.without_aux()
    assert bare.aux.names == ()
    assert call.aux.names == ("weights", "lse", "stats", "mean_weights")
    assert bare.query is call.query
    assert bare.scale == 0.5
    assert (call.B, call.H, call.G, call.T, call.S, call.D, call.E) == (2, 6, 2, 5, 7, 8, 8)
    assert call.group == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_into_a_backend(backend):
    inputs = tensors(dtype=torch.float32)
    outside = ph.attention(*inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, aux = ph.attention(*inputs, backend=backend, return_aux=ALL_AUX)
        assert (inputs[0] @ inputs[0].mT).dtype == torch.bfloat16
    assert torch.equal(inside, outside)
    assert aux.weights.dtype == aux.lse.dtype == torch.float32
