"""The C++ kernels against the float64 oracle, and what torch needs of an operator."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.arguments import build_call
from polyhead.backends import cpu, cpu_operators, reference

if cpu_operators.missing:
    if os.environ.get("CI"):
        pytest.fail("CI has a compiler, so the kernels must be there", pytrace=False)
    pytest.skip("built without a C++ compiler", allow_module_level=True)

CPU = next(backend for backend in ph.backends() if backend.name == "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def has(isa: str) -> bool:
    before = cpu_operators.isa()
    try:
        cpu_operators.choose_isa(isa)
    except RuntimeError:
        return False
    cpu_operators.choose_isa(before)
    return True


ISAS = [isa for isa in ("avx512_bf16", "avx512", "avx2", "portable") if has(isa)]


@pytest.fixture(params=ISAS)
def isa(request):
    before = cpu_operators.isa()
    cpu_operators.choose_isa(request.param)
    yield request.param
    cpu_operators.choose_isa(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tensors(B=2, H=6, G=2, T=17, S=31, D=24, E=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, D), (B, G, S, D), (B, G, S, E or D)]
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes
    ]


def gradients(output, inputs):
    direction = torch.randn(
        output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )
    grads = torch.autograd.grad(output, inputs, direction.to(output.dtype))
    return torch.cat([x.flatten() for x in grads])


def assert_agrees(naive_attention, assert_as_good_as_eager, inputs, mask=None, **options):
    """Output and all gradients as good as eager's; tensors among the options are differentiated."""
    names = [name for name, value in options.items() if isinstance(value, torch.Tensor)]
    runs = {}
    allowed = None
    if mask is not None:
        allowed = mask.materialize(inputs[0].shape[2], inputs[1].shape[2])
    for run in ("kernel", "eager", "exact"):
        # Fresh leaves; exact ones in float64.
        leaves = [x.detach().clone() for x in (*inputs, *(options[name] for name in names))]
        leaves = [(x.double() if run == "exact" else x).requires_grad_() for x in leaves]
        given = {**options, **dict(zip(names, leaves[3:], strict=True))}
        if run == "kernel":
            output = ph.attention(*leaves[:3], mask=mask, **given, backend=CPU)
        else:
            output = naive_attention(*leaves[:3], allowed=allowed, **given)
        runs[run] = output, gradients(output, leaves)
    for kernel, eager, exact in zip(*runs.values(), strict=True):
        if eager.dtype != kernel.dtype:  # a gradient beside 16-bit inputs, joined with theirs
            eager = eager.to(kernel.dtype)
        assert_as_good_as_eager(kernel, eager, exact)


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
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(naive_attention, assert_as_good_as_eager, isa, size, dtype):
    inputs = tensors(**size, dtype=dtype)
    assert_agrees(naive_attention, assert_as_good_as_eager, inputs, mask=ph.mask.causal())


def masks(T, S):
    causal, window = ph.mask.causal(), ph.mask.window
    documents = torch.arange(S) // 7
    scattered = torch.arange(2 * S).view(2, S) * 5 % 3
    by_head = torch.rand(2, 6, T, S, generator=torch.Generator().manual_seed(3)) < 0.5
    return {
        "causal": causal,
        "causal from the start": ph.mask.causal(align="start"),
        "window": window(before=3, after=5),
        "window from the start": window(before=3, after=5, align="start"),
        "causal window": causal & window(before=4),
        "lengths": ph.mask.lengths([S - 2, 0]),
        "two lengths": ph.mask.lengths([S - 2, 5]) & ph.mask.lengths(torch.tensor([3, S]).int()),
        "padding": causal & ph.mask.left_padding([0, 4]),
        "documents": causal & ph.mask.documents(documents),
        "scattered documents": causal & ph.mask.documents(scattered),
        "prefix": ph.mask.prefix(5),
        "causal or prefix": (causal | ph.mask.prefix(9)) & window(before=20, after=2),
        "rows": (causal & window(before=6)).for_queries(2, 2 + T, T + 3),
        "rows from the start": ph.mask.causal(align="start").for_queries(2, 2 + T, T + 3),
        "rows of rows": causal.for_queries(3, T + 4, T + 5).for_queries(1, T + 1, T + 1),
        "rows of documents": ph.mask.documents(documents).for_queries(0, T, S),
        "dense": ph.mask.dense(by_head[0, 0]),
        "dense by head": ph.mask.dense(by_head) & causal,
        "dense by key": ph.mask.dense(by_head[:, :1, :1]),
        "dense by query": ph.mask.dense(by_head[..., :1]),
        "not, or": ~window(before=3) | ph.mask.prefix(2),
    }


@pytest.mark.parametrize("T", [3, 37])
@pytest.mark.parametrize("kind", masks(1, 70))
def test_masks(naive_attention, assert_as_good_as_eager, isa, kind, T):
    S = 300 if T > 16 else 70
    inputs = tensors(T=T, S=S, D=8)
    mask = masks(T, S)[kind]
    assert_agrees(naive_attention, assert_as_good_as_eager, inputs, mask=mask)


def test_what_has_structure_is_not_written_out():
    written_out = {
        kind
        for kind, mask in masks(5, 70).items()
        if any(
            "written out" in note for note in cpu.notes(build_call(*tensors(T=5, S=70), mask=mask))
        )
    }
    expected = {"dense", "dense by head", "dense by key", "dense by query"}
    assert written_out == {*expected, "not, or", "rows of documents"}


def test_a_dense_mask_is_read_in_place(tensor_sizes):
    T, S = 64, 96
    inputs = tensors(B=2, H=8, G=2, T=T, S=S)
    mask, bias = ph.mask.dense(torch.ones(T, S, dtype=torch.bool)), torch.zeros(S)
    with tensor_sizes:
        cpu.run(build_call(*inputs, mask=mask, bias=bias))
    assert set(tensor_sizes.operations) <= {"alias", "attention_inference"}
    assert tensor_sizes.largest <= 2 * 8 * T * 24


@st.composite
def any_mask(draw):
    """An `&` of rules in any number, on sizes that divide nothing."""
    T, S = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    number = st.integers(0, 45)
    ends = st.sampled_from(["end", "start"])
    rules = st.one_of(
        st.builds(lambda align: ph.mask.causal(align=align), ends),
        st.builds(lambda b, a, e: ph.mask.window(before=b, after=a, align=e), number, number, ends),
        st.builds(ph.mask.prefix, number),
        st.builds(lambda a, b: ph.mask.lengths([a, b]), number, number),
        st.builds(lambda a, b: ph.mask.left_padding([a, b]), number, number),
        st.builds(lambda n, e: ph.mask.causal(align=e) | ph.mask.prefix(n), number, ends),
    )
    mask = draw(rules)
    for rule in draw(st.lists(rules, max_size=3)):
        mask = mask & rule
    return T, S, mask


@settings(deadline=None, max_examples=150)
@given(any_mask())
def test_any_conjunction_of_rules_is_its_written_out_self(case):
    T, S, mask = case
    inputs = tensors(H=2, G=1, T=T, S=S, D=8)
    allowed = mask.materialize(T, S).expand(2, 1, T, S)
    request = ph.AuxRequest(lse=True)
    output, aux = ph.attention(*inputs, mask=mask, backend=CPU, return_aux=request)
    want, want_aux = ph.attention(
        *inputs, mask=ph.mask.dense(allowed), backend="reference", return_aux=request
    )
    torch.testing.assert_close(output, want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(aux.lse, want_aux.lse, rtol=1e-5, atol=2e-6)


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
@pytest.mark.parametrize("T", [2, 53])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(naive_attention, assert_as_good_as_eager, variant, T, dtype):
    S = 210  # more than one block of keys in backward
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
    assert_agrees(naive_attention, assert_as_good_as_eager, inputs, mask=mask, **options)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_bias_on_all_scores_changes_nothing(shape):
    """Its gradient is 0 by cancellation: held to rounding in the terms that cancel."""
    inputs = tensors(T=53, S=210)
    bias = torch.full(shape, 0.7, requires_grad=True)
    output = ph.attention(*inputs, bias=bias, backend=CPU)
    torch.testing.assert_close(output, ph.attention(*inputs, backend=CPU), rtol=0, atol=1e-6)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    terms = torch.zeros(2, 6, 53, 210, dtype=torch.float64, requires_grad=True)
    exact = ph.attention(*(x.double() for x in inputs), bias=terms, backend="reference")
    (by_term,) = torch.autograd.grad(exact, terms, direction.double())
    (grad,) = torch.autograd.grad(output, bias, direction)
    assert grad.shape == shape
    assert grad.abs() <= 4 * torch.finfo(torch.float32).eps * by_term.abs().sum()


def test_alibi(naive_attention, assert_as_good_as_eager, isa):
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


@pytest.mark.parametrize("T", [3, 37])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": ph.mask.causal()},
        {"softcap": 2.0, "bias": torch.linspace(-1, 1, 70)},
        {"sinks": torch.linspace(-1, 1, 6)},
        {"mask": ph.mask.lengths([0, 40])},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_aux_is_that_of_the_definition(isa, options, T):
    inputs = tensors(T=T, S=70)
    request = ph.AuxRequest(weights=True, lse=True, stats=True, mean_weights=True)
    _, aux = ph.attention(*inputs, **options, backend=CPU, return_aux=request)
    exact_options = {
        name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    exact_call = build_call(*(x.double() for x in inputs), **exact_options, aux=request)
    exact = reference.compute_aux(exact_call)
    for name in ("weights", "mean_weights", "lse"):
        got, want = getattr(aux, name), getattr(exact, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6, msg=name)
    for name, want in vars(exact.stats).items():
        got = getattr(aux.stats, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=5e-6, msg=name)


def test_the_gradient_of_lse_and_of_stats():
    inputs = [x.requires_grad_() for x in tensors(T=20, S=30)]
    sinks = torch.zeros(6, requires_grad=True)
    request = ph.AuxRequest(lse=True, stats=True)
    got, want = (
        ph.attention(*inputs, sinks=sinks, backend=backend, return_aux=request)[1]
        for backend in (CPU, "reference")
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
def test_few_queries_have_the_weights_of_eager_in_their_gradient(T, naive_attention):
    """Scores summed in another order in backward made the gradient of values 4 times less exact."""
    inputs = [x.requires_grad_() for x in tensors(H=3, G=3, T=T, D=96)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    eager = [x.detach().requires_grad_() for x in inputs]
    outputs = [ph.attention(*inputs, backend=CPU), naive_attention(*eager), naive_attention(*exact)]
    ours, theirs, truth = (
        gradients(output, leaves[2:]).double()
        for output, leaves in zip(outputs, (inputs, eager, exact), strict=True)
    )
    rounding = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= (theirs - truth).abs().max() + rounding


def test_a_row_of_the_lowest_number_has_the_gradient_of_an_average():
    """lse alone would be too coarse there to tell how many keys share the weight."""
    inputs = [x.requires_grad_() for x in tensors(B=1, H=1, G=1, T=17, S=20)]
    bias = torch.full((17, 20), torch.finfo(torch.float32).min)
    output = ph.attention(*inputs, bias=bias, backend=CPU)
    grad = torch.autograd.grad(output.sum(), inputs[2])[0]
    torch.testing.assert_close(grad, torch.full_like(grad, 17 / 20))


@pytest.mark.parametrize("T", [3, 50])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_infinity_reach_who_attends_to_them(isa, poison, where, T):
    inputs = dict(zip(("query", "key", "value"), tensors(T=T, S=60), strict=True))
    inputs[where][0, 0, 1] = poison
    output = ph.attention(*inputs.values(), backend=CPU)
    want = ph.attention(*inputs.values(), backend="reference")
    assert torch.equal(output.isfinite(), want.isfinite())
    assert torch.equal(output.isnan(), want.isnan())


def test_nan_in_a_forbidden_key_is_not_heard_of(isa):
    query, key, value = tensors(T=50, S=60)
    clean = ph.attention(query, key, value, mask=ph.mask.lengths([50, 55]), backend=CPU)
    key[0, :, 50:] = math.nan
    key[1, :, 55:] = math.inf
    poisoned = ph.attention(query, key, value, mask=ph.mask.lengths([50, 55]), backend=CPU)
    assert torch.equal(clean, poisoned)


def test_dropout_drops_its_share_and_repeats_with_the_seed(isa):
    """Values are unit vectors, so that the output is the weights that were kept."""
    query, key, _ = tensors(B=20, H=4, G=2, T=50, S=64)
    value = torch.eye(64).expand(20, 2, 64, 64)
    whole = ph.attention(query, key, value, backend=CPU)

    def dropped(seed):
        torch.manual_seed(seed)
        return ph.attention(query, key, value, dropout=0.25, backend=CPU)

    kept = dropped(0)
    assert torch.equal(kept, dropped(0))
    assert not torch.equal(kept, dropped(1))
    is_dropped = kept == 0
    torch.testing.assert_close(kept, torch.where(is_dropped, 0.0, whole / 0.75))
    share = is_dropped.double()
    bound = 5 * math.sqrt(0.25 * 0.75)
    assert share.mean().item() == pytest.approx(0.25, abs=bound / math.sqrt(share.numel()))
    # No key, query or head is dropped more often than chance has it.
    for axes in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        mean = share.mean(dim=axes)
        assert (mean - 0.25).abs().max() < bound / math.sqrt(share.numel() / mean.numel())
    # Neighbours are dropped independently.
    pairs = share[..., 1:] * share[..., :-1]
    assert pairs.mean().item() == pytest.approx(0.0625, abs=5 / math.sqrt(pairs.numel()) / 4)


def test_dropout_drops_the_same_weights_in_backward():
    """The output is linear in values, so their gradient is the kept weights themselves."""
    query, key, _ = tensors(B=1, H=2, G=1, T=20, S=24)
    value = torch.eye(24).expand(1, 1, 24, 24).clone().requires_grad_()
    query.requires_grad_()
    torch.manual_seed(0)
    output = ph.attention(query, key, value, dropout=0.4, backend=CPU)
    grad = torch.autograd.grad(output[..., 3].sum(), value, retain_graph=True)[0]
    torch.testing.assert_close(grad[0, 0, :, 3], output.sum(dim=(1, 2))[0].detach())
    # d output / d query by hand, with the kept weights W: (W - P * (W . 1_column)) ...
    weights = torch.softmax(query @ key.mT * 24**-0.5, dim=-1)
    mask = (output.detach() != 0) / 0.6
    by_hand = torch.autograd.grad((weights * mask * torch.arange(24)).sum(), query)[0]
    got = torch.autograd.grad((output * torch.arange(24)).sum(), query)[0]
    torch.testing.assert_close(got, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [1 - 1e-9, 1 - 2**-50])
@pytest.mark.parametrize("T", [3, 100])
def test_a_dropout_that_float32_would_round_to_1_drops_and_divides_by_nothing(p, T):
    inputs = [x.requires_grad_() for x in tensors(T=T, S=400)]
    output = ph.attention(*inputs, dropout=p, backend=CPU)
    assert bool(output.isfinite().all())
    assert bool(gradients(output, inputs).isfinite().all())


def test_what_little_dropout_keeps_grows_by_the_share_it_keeps(isa):
    T = S = 1000
    query, key, value = (torch.zeros(1, 1, n, 8) for n in (T, S, S))
    kept = ph.attention(query, key, value + 1, dropout=1 - 2**-9, backend=CPU)[0, 0, :, 0]
    torch.testing.assert_close(kept.unique()[1].item(), 2**9 / S)
    # 2^20 / 2^9 are kept on average, each of them 2^9.
    assert kept.mean().item() == pytest.approx(1.0, abs=5 * 2**-5.5)


def test_the_operator_alone_has_no_second_derivative():
    """So that it cannot be wrong in silence; `attention` takes the definition's."""
    inputs = [x.requires_grad_() for x in tensors()]
    output, _ = cpu.run(build_call(*inputs))
    (grad,) = torch.autograd.grad(output.sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), inputs[0])


@pytest.mark.parametrize("T", [3, 100])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_each_time(threads, T):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    inputs = [x.requires_grad_() for x in tensors(B=1, H=3, G=1, T=T, S=400)]
    bias = torch.zeros(T, 400, requires_grad=True)

    def run():
        output = ph.attention(*inputs, bias=bias, mask=ph.mask.causal(), backend=CPU)
        return [output, gradients(output, [*inputs, bias])]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    torch.set_num_threads(before)


def test_memory_grows_with_tokens_and_not_with_their_square(tensor_sizes):
    inputs = [x.requires_grad_() for x in tensors(B=1, H=2, G=1, T=512, S=512)]
    with tensor_sizes:
        ph.attention(*inputs, mask=ph.mask.causal(), backend=CPU).sum().backward()
    assert "attention_backward" in tensor_sizes.operations
    assert tensor_sizes.largest < 512 * 512 / 4


AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-include", "tests/csrc/avx512_intrinsics.hpp"]
LOOPS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-DPOLYHEAD_EMULATE_BF16"],
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("isa", LOOPS)
def test_the_loops_agree_with_a_double_loop_and_keep_to_their_memory(isa, tmp_path):
    """Without torch, under sanitisers; AVX-512's intrinsics are emulated, on any processor."""
    if isa != "portable" and "avx2" not in ISAS:
        pytest.skip("needs a processor with AVX2")
    program = tmp_path / "test_loops"
    options = ["-std=c++20", "-O1", "-g1", "-fopenmp", "-ffp-contract=fast", "-Wno-psabi", "-Icsrc"]
    options += ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    options += [f"-DPOLYHEAD_ISA={isa}", f'-DPOLYHEAD_ISA_NAME="{isa}"', *LOOPS[isa]]
    subprocess.run(
        ["g++", *options, "tests/csrc/test_loops.cpp", "-o", program],
        cwd=Path(__file__).parents[2],
        check=True,
    )
    environment = {
        **os.environ,
        # NaN in memory that nothing has been written to.
        "ASAN_OPTIONS": "malloc_fill_byte=255:max_malloc_fill_size=1000000000",
        # Fewer threads than some of the cases ask for.
        "OMP_THREAD_LIMIT": "2",
    }
    result = subprocess.run(
        [program, "200"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def operator_arguments(**options):
    call = build_call(*tensors(B=1, H=2, G=1, T=4, S=5, D=8), **options)
    captured = []

    class Operators:
        def attention_inference(self, *arguments):
            captured.extend(arguments)
            return torch.ops.polyhead.attention_inference(*arguments)

    cpu_run_globals = cpu.run.__globals__
    real = cpu_run_globals["torch"]

    class Torch:
        ops = type("ops", (), {"polyhead": Operators()})

        def __getattr__(self, name):
            return getattr(real, name)

    cpu_run_globals["torch"] = Torch()
    try:
        cpu.run(call)
    finally:
        cpu_run_globals["torch"] = real
    return tuple(captured)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": ph.mask.causal() & ph.mask.lengths([4]), "bias": torch.zeros(2, 4, 5)},
        {
            "mask": ph.mask.dense(torch.ones(4, 5, dtype=torch.bool)),
            "sinks": torch.zeros(2),
            "dropout": 0.5,
        },
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_opcheck(options):
    arguments = operator_arguments(**options)
    torch.library.opcheck(torch.ops.polyhead.attention_inference, arguments)
    differentiable = [
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]
    torch.library.opcheck(torch.ops.polyhead.attention_forward, tuple(differentiable))
    query, key, _, *masks, _, slopes, _, band, scale, softcap, _, _ = arguments
    details = torch.ops.polyhead.attention_inference(*arguments)[2]
    for mean in (True, False):
        weights = (query, key, *masks, slopes, band, scale, softcap, details, mean)
        torch.library.opcheck(torch.ops.polyhead.attention_weights, weights)


@pytest.mark.parametrize(("T", "S"), [(5, 5), (20, 70), (1, 70)])
def test_compiles_with_its_gradient_in_one_graph(T, S):
    torch.compiler.reset()
    inputs = [x.requires_grad_() for x in tensors(T=T, S=S)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query, key, value):
        return ph.attention(query, key, value, mask=ph.mask.causal(), backend=CPU)

    output, want = (
        compiled(*inputs),
        ph.attention(*inputs, mask=ph.mask.causal(), backend=CPU),
    )
    assert torch.equal(output, want)
    assert torch.equal(gradients(output, inputs), gradients(want, inputs))


def test_exports():
    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            return ph.attention(query, key, value, mask=ph.mask.causal(), backend=CPU)

    inputs = tuple(tensors())
    program = torch.export.export(Attend(), inputs)
    assert "attention_inference" in str(program.graph)
    assert torch.equal(program.module()(*inputs), Attend()(*inputs))


@pytest.mark.parametrize(
    ("sizes", "reasons"),
    [
        ({"dtype": torch.float64}, ["runs float32, bfloat16 and float16; got float64"]),
        ({"D": 513, "E": 7}, ["has heads of up to 512; got D = 513, E = 7"]),
        ({"E": 600}, ["has heads of up to 512; got D = 24, E = 600"]),
    ],
)
def test_why_not_with_numbers(sizes, reasons):
    assert cpu.why_not(build_call(*tensors(**sizes))) == reasons


def test_why_not_on_another_device_and_without_the_kernels(monkeypatch):
    call = build_call(*(x.to("meta") for x in tensors()))
    assert cpu.why_not(call) == ["runs on the CPU; got device meta"]
    monkeypatch.setattr(cpu_operators, "missing", "was not built")
    assert cpu.why_not(build_call(*tensors())) == ["was not built"]


def test_kernels_that_cannot_be_loaded_are_a_reason_and_no_crash(monkeypatch, tmp_path):
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"no library")
    spec = importlib.util.spec_from_file_location("polyhead._kernels", broken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert cpu_operators._load().startswith("was built, and could not be loaded: ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "C++ compiler" in cpu_operators._load()


def test_auto_leaves_bfloat16_to_torch_where_only_it_uses_amx(monkeypatch):
    monkeypatch.setattr(cpu, "_has_amx", lambda: True)
    inputs = tensors(dtype=torch.bfloat16)
    explained = ph.explain(*inputs)
    assert explained.chosen == "sdpa"
    reason = "uses no AMX, and torch's own bfloat16 kernel does on this processor"
    assert explained.passed_over["cpu"] == (reason,)
    # What torch's kernel cannot do, or is asked for by name, stays here.
    assert ph.explain(*inputs, softcap=2.0).chosen == "cpu"
    assert ph.explain(*inputs, backend="cpu").chosen == "cpu"
    assert ph.explain(*tensors()).chosen == "cpu"


@pytest.mark.parametrize(("T", "way"), [(1, "read once, in place"), (17, "packed once a key head")])
@pytest.mark.usefixtures("two_threads")
def test_notes_name_the_instruction_set_the_threads_and_the_way(isa, T, way):
    first, second = cpu.notes(build_call(*tensors(T=T)))
    assert first == f"{isa} kernels, up to 2 threads"
    assert way in second


@pytest.mark.parametrize(("S", "is_decoding"), [(11, False), (12, True)])
def test_few_queries_with_few_keys_or_a_gradient_go_the_way_of_training(isa, S, is_decoding):
    query, key, value = tensors(T=3, S=S)
    way = "read once, in place" if is_decoding else "packed once a key head"
    assert way in cpu.notes(build_call(query, key, value))[1]
    learnt = query.clone().requires_grad_()
    assert "packed once a key head" in cpu.notes(build_call(learnt, key, value))[1]
    output, trained = CPU.run(build_call(query, key, value))[0], ph.attention(learnt, key, value)
    torch.testing.assert_close(output, trained)
    # The way of training is known by its bits.
    assert torch.equal(output, trained) != is_decoding


def test_the_environment_chooses_the_instruction_set():
    isa = ISAS[-1]
    code = "from polyhead.backends import cpu_operators; print(cpu_operators.isa())"
    chosen = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "POLYHEAD_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    assert chosen.stdout.strip() == isa


def test_an_unknown_instruction_set_in_the_environment_is_warned_of():
    imported = subprocess.run(
        [sys.executable, "-c", "import polyhead"],
        env={**os.environ, "POLYHEAD_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=True,
    )
    warning = "POLYHEAD_CPU_ISA must name kernels of this processor and build; got 'sse9'; "
    assert warning in imported.stderr


def test_an_unknown_instruction_set_is_refused_and_changes_nothing():
    before = cpu_operators.isa()
    with pytest.raises(RuntimeError, match="lacks instruction set sse9"):
        cpu_operators.choose_isa("sse9")
    assert cpu_operators.isa() == before


def test_auto_leaves_small_dropout_to_the_seed_everybody_knows():
    """The lecture's code, the definition and auto drop the same weights of a small example."""
    small, large = tensors(T=6, S=6), tensors(T=64, S=64)
    outputs = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        outputs.append(ph.attention(*small, dropout=0.5, backend=backend))
    assert torch.equal(*outputs)
    assert ph.explain(*large, dropout=0.5).chosen == "cpu"
    assert ph.explain(*small, dropout=0.5).passed_over["cpu"] == (
        "drops by its own generator; 432 weights are few enough to drop as F.dropout does for "
        "this seed",
    )
