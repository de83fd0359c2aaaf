"""flex_attention: what it refuses, and that what it runs is the definition.

Uncompiled, it computes the formula with the very rules that the kernel is made of: that is quick,
and tests the lowering in every combination. The compiled kernel takes seconds for each new call:
a few are here, the grid is slow.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex

import polyhead as ph
from polyhead.backends import flex
from polyhead.errors import BackendError
from polyhead.validate import build_call

FLEX = ph.Backend("flex", flex.why_not, flex.run, flex.notes, auto_skip=flex.auto_skip)


def tensors(B=2, H=6, G=2, T=5, S=7, D=16, E=None, dtype=torch.float32, device="cpu"):
    shapes = [(B, H, T, D), (B, G, S, D), (B, G, S, D if E is None else E)]
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


@pytest.fixture
def uncompiled(monkeypatch):
    """flex_attention as torch computes it without a compiler, from the same rules."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_compiled", lambda device_type: torch_flex.flex_attention)


# --- what it refuses, and what it says


class Diagonal(ph.mask.Mask):
    pass


LEAF = torch.zeros(5, 7, requires_grad=True)
REASONS = [
    ({"dtype": torch.float64}, {}, ["runs float32, bfloat16 and float16; got float64"]),
    ({"T": 0}, {}, ["needs B, T, S and E of at least 1; got B = 2, T = 0, S = 7, E = 16"]),
    ({"E": 0}, {}, ["needs B, T, S and E of at least 1; got B = 2, T = 5, S = 7, E = 0"]),
    ({}, {"dropout": 0.25}, ["has no dropout; got dropout = 0.25"]),
    ({}, {"mask": ~Diagonal()}, ["lowers the masks of polyhead.mask; got Diagonal"]),
    (
        {},
        {"sinks": torch.zeros(6)},
        ["gives no lse on cpu, which sinks need; got sinks for 6 heads"],
    ),
    (
        {"S": 40},
        {},
        ["is wrong for some multiples of 8 keys below 128 on cpu; got S = 40"],
    ),
    ({}, {"bias": LEAF}, ["has no backward on cpu; got requires_grad of bias"]),
    (
        {"dtype": torch.float64, "S": 0},
        {"dropout": 0.5},
        [
            "runs float32, bfloat16 and float16; got float64",
            "needs B, T, S and E of at least 1; got B = 2, T = 5, S = 0, E = 16",
            "has no dropout; got dropout = 0.5",
        ],
    ),
    ({"device": "meta"}, {}, ["runs on cpu and cuda; got meta"]),
]


@pytest.mark.parametrize(("sizes", "options", "reasons"), REASONS)
def test_it_says_why_not_with_numbers(sizes, options, reasons):
    assert flex.why_not(build_call(*tensors(**sizes), **options)) == reasons
    with pytest.raises(BackendError) as caught:
        ph.attention(*tensors(**sizes), **options, backend=FLEX)
    assert caught.value.reasons == {"flex": tuple(reasons)}


def test_every_input_that_wants_a_gradient_is_named():
    query, key, value = tensors()
    query.requires_grad_()
    value.requires_grad_()
    slopes = torch.ones(6, requires_grad=True)
    call = build_call(query, key, value, alibi_slopes=slopes)
    assert flex.why_not(call) == [
        "has no backward on cpu; got requires_grad of query, value, alibi_slopes"
    ]
    with torch.no_grad():
        assert flex.why_not(call) == []


def test_a_cpu_without_avx2_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    assert flex.why_not(build_call(*tensors())) == ["needs a cpu with AVX2"]


def test_derivatives_that_its_kernels_do_not_know_are_refused():
    reason = "flex: has no forward-mode derivative and no torch.func transform; one is active"
    query = tensors(H=2)[0]

    def attend(query):
        return ph.attention(query, query, query, backend=FLEX)

    with pytest.raises(BackendError, match=reason):
        torch.func.vmap(attend)(query[None])
    with pytest.raises(BackendError, match=reason), torch.autograd.forward_ad.dual_level():
        attend(torch.autograd.forward_ad.make_dual(query, query))


@pytest.mark.parametrize(
    ("D", "E", "triton", "reasons"),
    [
        (16, 16, True, []),
        (80, 96, True, []),
        (15, 64, True, ["needs D and E of at least 16 on cuda; got D = 15, E = 64"]),
        (64, 8, True, ["needs D and E of at least 16 on cuda; got D = 64, E = 8"]),
        (64, 64, False, ["needs the package triton on cuda; it is not installed"]),
    ],
)
def test_on_cuda_it_has_gradients_and_sinks_but_no_small_heads(D, E, triton, reasons, monkeypatch):
    found = {"triton": SimpleNamespace() if triton else None}
    monkeypatch.setattr(flex, "find_spec", found.__getitem__)
    with FakeTensorMode():
        query, key, value = tensors(D=D, E=E, device="cuda")
        call = build_call(query.requires_grad_(), key, value, sinks=torch.zeros(6, device="cuda"))
    assert flex.why_not(call) == reasons
    assert flex.auto_skip(call, lambda name: True) == []


def test_auto_leaves_a_cpu_to_others():
    call = build_call(*tensors())
    assert flex.auto_skip(call, lambda name: True) == [
        "compiles for seconds each new size and kind of mask on cpu"
    ]


def test_it_reads_no_values_to_choose():
    with FakeTensorMode():
        mask = ph.mask.lengths(torch.ones(2, dtype=torch.long)) & ph.mask.causal()
        call = build_call(*tensors(), mask=mask, bias=torch.ones(5, 7))
        assert flex.why_not(call) == []


@pytest.mark.parametrize(
    ("mask", "how"),
    [
        (None, "no mask, 3 x 5 blocks of 128 x 128"),
        (
            ph.mask.causal() & ph.mask.window(before=9),
            "causal() & window(before=9), skipping what it forbids of 3 x 5 blocks of 128 x 128",
        ),
        (
            ph.mask.dense(torch.ones(1, 513, dtype=torch.bool)),
            "dense(1x513) asked in all of 3 x 5 blocks of 128 x 128",
        ),
    ],
    ids=["none", "window", "dense"],
)
def test_notes_say_how_it_would_run(mask, how):
    call = build_call(*tensors(T=257, S=513), mask=mask)
    assert flex.notes(call) == [
        f"compiled kernel, {how}: no T x S tensor",
        "compiles for seconds each new kind of call: dtype, head sizes, mask, and on cpu each T "
        "and S",
    ]


def test_it_is_imported_when_chosen():
    code = "import polyhead.backends.flex, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "polyhead.backends.flex" in loaded
    assert {"torch._dynamo", "torch.nn.attention.flex_attention"} & set(loaded) == set()


def test_it_is_compiled_whole_for_many_kinds_of_call(monkeypatch):
    seen = []

    def compiled(*args, **options):
        seen.append((torch._dynamo.config.recompile_limit, torch._dynamo.config.specialize_float))
        return args[0]

    monkeypatch.setattr(flex, "_compiled", lambda device_type: compiled)
    before = torch._dynamo.config.recompile_limit
    ph.attention(*tensors(), backend=FLEX)
    assert seen == [(256, True)]
    assert torch._dynamo.config.recompile_limit == before


# --- agreement with the definition


def strided(batch, head, query, key):
    return (query + head) % 3 != key % 3


MASKS = {
    "none": lambda B, H, T, S: None,
    "causal": lambda B, H, T, S: ph.mask.causal(),
    "upper left": lambda B, H, T, S: ph.mask.causal(align="start"),
    "window": lambda B, H, T, S: ph.mask.causal() & ph.mask.window(before=40),
    "both sides": lambda B, H, T, S: ph.mask.window(before=3, after=140),
    "lengths": lambda B, H, T, S: ph.mask.lengths([S // 2, 0]),
    "left padding": lambda B, H, T, S: ph.mask.causal() & ph.mask.left_padding([S // 3, S]),
    "prefix": lambda B, H, T, S: ph.mask.causal() | ph.mask.prefix(5),
    "documents": lambda B, H, T, S: ph.mask.causal() & ph.mask.documents(torch.arange(S) // 50),
    "documents by row": lambda B, H, T, S: ph.mask.documents(
        torch.stack([torch.arange(S) // 90, torch.arange(S) % 2])
    ),
    "dense": lambda B, H, T, S: ph.mask.dense(torch.rand(B, 1, T, S) > 0.5),
    "dense keys": lambda B, H, T, S: ~ph.mask.dense(torch.rand(1, H, 1, S) > 0.5),
    "dense scalar": lambda B, H, T, S: ph.mask.dense(torch.ones(1, 1, dtype=torch.bool)),
    "custom": lambda B, H, T, S: ph.mask.causal() & ph.mask.custom(strided, heads=H),
    "some queries": lambda B, H, T, S: (ph.mask.causal() & ph.mask.window(before=40)).for_queries(
        2, 2 + T, T + 5
    ),
    "fewer keys": lambda B, H, T, S: ph.mask.custom(strided, heads=H).for_keys(3, S + 3),
}
SIZES = [(1, 1), (1, 300), (17, 33), (33, 17), (257, 257), (130, 257)]
SCORES = ["plain", "softcap", "bias", "bias by key", "alibi", "everything"]
HEADS = [(1, 24, 24), (3, 80, 96), (7, 96, 80)]  # G, D, E


def scored(kind, H, T, S, dtype):
    options = {}
    if kind in ("softcap", "everything"):
        options["softcap"] = 2.5
    if kind in ("bias", "everything"):
        options["bias"] = torch.randn(H, T, S).to(dtype)
    if kind == "bias by key":
        bias = torch.randn(2, 1, 1, S)
        options["bias"] = bias.masked_fill(bias > 0.5, -torch.inf).to(dtype)
    if kind in ("alibi", "everything"):
        options["alibi_slopes"] = torch.rand(H) / 4
    return options


@pytest.fixture
def assert_is_the_definition(naive_attention, assert_as_good_as_eager):
    def check(actual, query, key, value, mask=None, alibi_slopes=None, bias=None, **options):
        T, S = query.shape[2], key.shape[2]
        allowed = None if mask is None else mask.materialize(T, S)
        bias = torch.zeros(()) if bias is None else bias
        if alibi_slopes is not None:
            distance = (torch.arange(T)[:, None] + S - T - torch.arange(S)).abs()
            bias = bias.double() - alibi_slopes.double()[:, None, None] * distance

        def naive(dtype):
            inputs = [tensor.to(dtype) for tensor in (query, key, value)]
            return naive_attention(*inputs, allowed=allowed, bias=bias.to(dtype), **options)

        assert_as_good_as_eager(actual, naive(query.dtype), naive(torch.float64))

    return check


CASES = [
    pytest.param(*case, id="-".join(map(str, case)))
    for case in [
        *((mask, *size, "everything", 3, 80, 96) for mask in MASKS for size in SIZES),
        *((mask, 17, 33, score, *heads) for mask in ("window", "lengths")
          for score, heads in itertools.product(SCORES, HEADS)),
    ]
    if not (case[0].startswith("documents") and case[1] > case[2])
]  # fmt: skip


@pytest.mark.parametrize(("mask", "T", "S", "score", "G", "D", "E"), CASES)
def test_uncompiled_it_is_the_definition(
    mask, T, S, score, G, D, E, uncompiled, assert_is_the_definition
):
    torch.manual_seed(T + S)
    options = scored(score, 2 * G, T, S, torch.float32)
    options["mask"] = MASKS[mask](2, 2 * G, T, S)
    inputs = tensors(H=2 * G, G=G, T=T, S=S, D=D, E=E)
    actual = ph.attention(*inputs, **options, backend=FLEX)
    assert_is_the_definition(actual, *inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_take_their_share_from_the_lse(dtype, uncompiled, assert_is_the_definition):
    torch.manual_seed(0)
    inputs = tensors(T=9, S=7, dtype=dtype)
    sinks = torch.tensor([-30.0, -1.0, 0.0, 1.0, 5.0, 30.0], dtype=dtype)
    call = build_call(*inputs, sinks=sinks, mask=ph.mask.causal())
    output, _ = flex.run(call)  # why_not refuses them on a CPU: there only uncompiled it has lse
    assert_is_the_definition(output, *inputs, sinks=sinks, mask=ph.mask.causal())
    assert bool((output[:, :, :2] == 0).all()), "queries that stand before every key"


def test_compiled_it_is_the_definition(assert_is_the_definition):
    """All at once, on memory in odd strides; other numbers then need no other kernel."""
    torch.manual_seed(1)
    G, T, S, D, E = 3, 257, 300, 24, 80
    query = torch.randn(2, T, 2 * G, D).transpose(1, 2)
    key = torch.randn(2, G, S, 2 * D)[..., ::2]
    value = torch.randn(1, G, S, E).expand(2, G, S, E)
    for before, recompiles in ((40, True), (140, False)):
        mask = ph.mask.causal() & ph.mask.window(before=before) & ph.mask.lengths([S, before])
        options = scored("everything", 2 * G, T, S, torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=not recompiles):
            actual = ph.attention(query, key, value, mask=mask, **options, backend=FLEX)
        assert_is_the_definition(actual, query, key, value, mask=mask, **options)


def test_compiled_one_query_is_kept_from_the_decoding_kernel(assert_is_the_definition):
    """What torch would take here on a CPU takes a block without allowed pairs for a score of 0,
    and where there is no block at all it reads memory that was never written."""
    torch.manual_seed(2)
    query, key, value = tensors(B=1, T=1, S=1024)
    # Scores near -144 without rounding: exp(-144 - 0) is 0.
    query, key = torch.full_like(query, 6.0), (key * 16).round() / 64 - 6.0
    for tensor in (query, key, value):
        tensor.requires_grad_()
    for length in (700, 0):
        mask = ph.mask.custom(lambda b, h, q, k: k < 300) & ph.mask.lengths([length])
        with torch.no_grad():  # tensors that require a gradient may be used where none is recorded
            actual = ph.attention(query, key, value, mask=mask, backend=FLEX)
            assert_is_the_definition(actual, query, key, value, mask=mask)
        assert bool((actual == 0).all()) == (length == 0)


@pytest.mark.slow
@pytest.mark.parametrize("S", [1, 4, 12, 20, 36, 41, 128, 136])
@pytest.mark.parametrize("D", [8, 16])
def test_compiled_small_heads_are_right_where_they_are_not_refused(D, S, assert_is_the_definition):
    """Of 8, 24, 40, 56 or 72 keys torch's kernel loses some (2.13, AVX2)."""
    torch.manual_seed(5)
    inputs = tensors(B=1, H=1, G=1, T=17, S=S, D=D)
    actual = ph.attention(*inputs, backend=FLEX)
    assert_is_the_definition(actual, *inputs)


def test_compiled_in_bfloat16_with_a_rule_of_ones_own(assert_is_the_definition):
    torch.manual_seed(3)
    mask = ~ph.mask.custom(strided, heads=7) | ph.mask.dense(torch.rand(17, 17) > 0.5)
    inputs = tensors(H=7, G=1, T=17, S=17, D=3, E=5, dtype=torch.bfloat16)
    actual = ph.attention(*inputs, mask=mask, backend=FLEX)
    assert_is_the_definition(actual, *inputs, mask=mask)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRID = [
    (mask, *size, score, *heads, dtype)
    for (mask, size), score, heads, dtype in zip(
        itertools.product(MASKS, ((1, 17), (17, 17), (257, 300))),
        itertools.cycle(SCORES[:4]),
        itertools.cycle([(1, 24, 96), (3, 80, 80), (7, 96, 24), (1, 1, 1), (2, 7, 33)]),
        itertools.cycle(DTYPES),
        strict=False,
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "T", "S", "score", "G", "D", "E", "dtype"), GRID)
def test_compiled_it_is_the_definition_everywhere(
    mask, T, S, score, G, D, E, dtype, assert_is_the_definition
):
    torch.manual_seed(T + S)
    options = scored(score, 2 * G, T, S, dtype)
    options["mask"] = MASKS[mask](2, 2 * G, T, S)
    inputs = tensors(H=2 * G, G=G, T=T, S=S, D=D, E=E, dtype=dtype)
    actual = ph.attention(*inputs, **options, backend=FLEX)
    assert_is_the_definition(actual, *inputs, **options)


def test_inside_torch_compile_it_refuses_the_same_key_counts():
    attend = torch.compile(lambda *inputs: ph.attention(*inputs, backend=FLEX), fullgraph=True)
    with pytest.raises(Exception, match="is wrong for some multiples of 8 keys below 128 on cpu"):
        attend(*tensors(S=40))


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["causal", "lengths", "documents", "custom"])
def test_inside_torch_compile(mask, assert_is_the_definition):
    torch.manual_seed(4)
    inputs = tensors(T=17, S=33)
    options = scored("everything", 6, 17, 33, torch.float32)
    options["mask"] = MASKS[mask](2, 6, 17, 33)

    @torch.compile(fullgraph=True)
    def attend(query, key, value):
        return ph.attention(query * 1.0, key, value, **options, backend=FLEX)

    assert_is_the_definition(attend(*inputs), *inputs, **options)
