"""The C++ kernels against the float64 oracle, what they refuse and what they say of a call."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import polyhead as ph
from polyhead.backends import cpu, reference
from polyhead.backends.cpu import ops
from polyhead.validate import build_call

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [
    {"B": 1, "H": 1, "G": 1, "T": 1, "S": 1, "D": 1, "E": 3},
    {"H": 6, "G": 2, "T": 1, "S": 257, "D": 80},
    {"H": 7, "G": 1, "T": 3, "S": 65, "D": 24, "E": 1},
    {"H": 3, "G": 3, "T": 16, "S": 17, "D": 96, "E": 24},
    {"H": 7, "G": 7, "T": 17, "S": 17, "D": 96},
    {"B": 1, "H": 2, "G": 1, "T": 257, "S": 257, "D": 64},
    {"B": 1, "H": 2, "G": 1, "T": 257, "S": 17, "D": 24},
    {"B": 1, "H": 3, "G": 1, "T": 40, "S": 600, "D": 8, "E": 130},
    {"B": 1, "H": 1, "G": 1, "T": 17, "S": 19, "D": 512, "E": 511},
    {"B": 1, "H": 16, "G": 1, "T": 1, "S": 70, "D": 576, "E": 512},
    {"B": 1, "H": 2, "G": 1, "T": 19, "S": 23, "D": 575, "E": 576},
    # So many keys for so few queries are packed a block at a time.
    {"B": 1, "H": 3, "G": 1, "T": 100, "S": 4100, "D": 16, "E": 40},
    {"B": 1, "H": 7, "G": 1, "T": 1, "S": 2100, "D": 24},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(tensors, assert_agrees, isa, size, dtype):
    inputs = tensors(**size, dtype=dtype)
    assert_agrees(inputs, mask=ph.mask.causal())


VARIANTS = {
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.4},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": (6,)},
    **{
        f"bias {shape}": {"bias": shape}
        for shape in [
            (2, 6, "T", "S"),
            (2, 1, 1, "S"),
            (1, 6, "T", 1),
            (6, "T", "S"),
            ("T", "S"),
            ("S",),
        ]
    },
    "everything": {"bias": (6, "T", "S"), "sinks": (6,), "softcap": 2.0, "scale": 0.5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# 210: more than one block of keys in backward; 2100: packed a block at a time.
@pytest.mark.parametrize(
    ("variant", "T", "S"),
    [*((variant, T, 210) for variant in VARIANTS for T in (2, 53)), ("everything", 19, 2100)],
)
def test_variants(tensors, assert_agrees, variant, T, S, dtype):
    generator = torch.Generator().manual_seed(4)
    options = {
        name: torch.randn(
            [{"T": T, "S": S}.get(size, size) for size in value], generator=generator
        ).to(dtype)
        if isinstance(value, tuple)
        else value
        for name, value in VARIANTS[variant].items()
    }
    inputs = tensors(T=T, S=S, dtype=dtype)
    mask = ph.mask.causal() & ph.mask.lengths([S, 150])
    assert_agrees(inputs, mask=mask, **options)


def test_alibi(tensors, naive_attention, assert_as_good_as_eager, isa):
    T, S = 21, 70
    query, key, value = tensors(T=T, S=S)
    slopes = torch.tensor([2.0**-i for i in range(6)])
    call = build_call(query, key, value)
    if not hasattr(call, "alibi_slopes"):
        object.__setattr__(call, "alibi_slopes", slopes)
    else:
        call = replace(call, alibi_slopes=slopes)
    distance = (torch.arange(S) - torch.arange(S - T, S)[:, None]).abs()
    bias = -slopes[:, None, None] * distance
    exact = naive_attention(*(x.double() for x in (query, key, value)), bias=bias.double())
    eager = naive_attention(query, key, value, bias=bias)
    assert_as_good_as_eager(cpu.run(call)[0], eager, exact)


@pytest.mark.parametrize(("T", "S"), [(3, 70), (37, 70), (37, 2100)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": ph.mask.causal()},
        {"softcap": 2.0, "bias": "S"},
        {"sinks": torch.linspace(-1, 1, 6)},
        {"mask": ph.mask.lengths([0, 40])},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_aux_is_that_of_the_definition(tensors, isa, options, T, S):
    inputs = tensors(T=T, S=S)
    if "bias" in options:
        options = options | {"bias": torch.linspace(-1, 1, S)}
    request = ph.AuxRequest(weights=True, lse=True, stats=True, mean_weights=True)
    _, aux = ph.attention(*inputs, **options, backend="cpu", return_aux=request)
    exact_options = {
        name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    exact_call = build_call(*(x.double() for x in inputs), **exact_options, aux=request)
    exact = reference.compute_aux(exact_call)
    for name in ("weights", "mean_weights", "lse"):
        got, want = getattr(aux, name), getattr(exact, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6, msg=name)
    for name, want in exact.stats.tensors.items():
        got = getattr(aux.stats, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=5e-6, msg=name)


@pytest.mark.parametrize("T", [3, 50])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_infinity_reach_who_attends_to_them(tensors, isa, poison, where, T):
    inputs = dict(zip(("query", "key", "value"), tensors(T=T, S=60), strict=True))
    inputs[where][0, 0, 1] = poison
    output = ph.attention(*inputs.values(), backend="cpu")
    want = ph.attention(*inputs.values(), backend="reference")
    assert torch.equal(output.isfinite(), want.isfinite())
    assert torch.equal(output.isnan(), want.isnan())


@pytest.mark.parametrize("T", [1, 3])
def test_infinity_in_the_last_value_is_no_nan(tensors, isa, T):
    """A block of keys that ends early was filled up with the last row, of weight 0."""
    query, key, value = tensors(T=T, S=31)
    value[:, :, -1] = -math.inf
    output = ph.attention(query, key, value, backend="cpu")
    assert output.eq(-math.inf).all()


@pytest.mark.parametrize("T", [1, 20, 64])
def test_statistics_beside_a_block_of_the_lowest_number(tensors, isa, T):
    """As masks of finfo.min are written: between it and a score there is no finite number."""
    inputs = tensors(B=1, T=T, S=700)
    bias = torch.zeros(T, 700)
    bias[:, :520] = torch.finfo(torch.float32).min
    request = ph.AuxRequest(stats=True)
    got, want = (
        ph.attention(*inputs, bias=bias, backend=backend, return_aux=request)[1].stats
        for backend in ("cpu", "reference")
    )
    for name, x in vars(want).items():
        torch.testing.assert_close(getattr(got, name), x, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("T", [1, 40])
def test_the_largest_score_of_a_row_with_nan_is_nan(tensors, isa, T):
    query, key, value = tensors(T=T)
    query[0, 1, 0], key[1, 0, 3] = math.nan, math.nan
    request = ph.AuxRequest(stats=True)
    got, want = (
        ph.attention(query, key, value, backend=backend, return_aux=request)[1].stats.max_logit
        for backend in ("cpu", "reference")
    )
    assert want.isnan().any()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_nan_in_a_forbidden_key_is_not_heard_of(tensors, isa):
    query, key, value = tensors(T=50, S=60)
    clean = ph.attention(query, key, value, mask=ph.mask.lengths([50, 55]), backend="cpu")
    key[0, :, 50:] = math.nan
    key[1, :, 55:] = math.inf
    poisoned = ph.attention(query, key, value, mask=ph.mask.lengths([50, 55]), backend="cpu")
    assert torch.equal(clean, poisoned)


@pytest.mark.parametrize(
    ("sizes", "reasons"),
    [
        ({"dtype": torch.float64}, ["runs float32, bfloat16 and float16; got float64"]),
        ({"D": 577, "E": 7}, ["has heads of up to 576; got D = 577, E = 7"]),
        ({"E": 600}, ["has heads of up to 576; got D = 24, E = 600"]),
    ],
)
def test_why_not_with_numbers(tensors, sizes, reasons):
    assert cpu.why_not(build_call(*tensors(**sizes))) == reasons


def test_why_not_on_another_device_and_without_the_kernels(tensors, monkeypatch):
    call = build_call(*(x.to("meta") for x in tensors()))
    assert cpu.why_not(call) == ["runs on the CPU; got device meta"]
    monkeypatch.setattr(ops, "unavailable", "was not built")
    assert cpu.why_not(build_call(*tensors())) == ["was not built"]


def test_auto_leaves_bfloat16_to_torch_where_only_it_uses_amx(tensors, monkeypatch):
    monkeypatch.setattr(cpu, "_has_amx", lambda: True)
    inputs = tensors(dtype=torch.bfloat16, T=17)
    explained = ph.explain(*inputs)
    assert explained.chosen == "sdpa"
    reason = "uses no AMX, and torch's own bfloat16 kernel does on this processor"
    assert explained.auto_skip["cpu"] == (reason,)
    # What torch's kernel cannot do, or is asked for by name, stays here.
    assert ph.explain(*inputs, softcap=2.0).chosen == "cpu"
    assert ph.explain(*inputs, backend="cpu").chosen == "cpu"
    assert ph.explain(*tensors(T=17)).chosen == "cpu"
    # Decoding takes the time of reading keys, with matrix units or without.
    assert ph.explain(*tensors(dtype=torch.bfloat16, T=1)).chosen == "cpu"


@pytest.mark.parametrize(
    ("T", "way"), [(1, "read once, in place"), (17, "packed once per KV head")]
)
@pytest.mark.usefixtures("two_threads")
def test_notes_name_the_instruction_set_the_threads_and_the_way(tensors, isa, T, way):
    first, second = cpu.notes(build_call(*tensors(T=T)))
    assert first == f"{isa} kernels, up to 2 threads"
    assert way in second


@pytest.mark.parametrize(("S", "is_decoding"), [(11, False), (12, True)])
def test_few_queries_with_few_keys_or_a_gradient_go_the_way_of_training(
    tensors, isa, S, is_decoding
):
    query, key, value = tensors(T=3, S=S)
    way = "read once, in place" if is_decoding else "packed once per KV head"
    assert way in cpu.notes(build_call(query, key, value))[1]
    learnt = query.clone().requires_grad_()
    assert "packed once per KV head" in cpu.notes(build_call(learnt, key, value))[1]
    output, trained = cpu.run(build_call(query, key, value))[0], ph.attention(learnt, key, value)
    torch.testing.assert_close(output, trained)
    # The way of training is known by its bits.
    assert torch.equal(output, trained) != is_decoding
