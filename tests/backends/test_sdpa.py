"""torch's kernel: what it accepts, which kernel runs, chunks of queries instead of T x S."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import polyhead as ph
from polyhead.backends import REFERENCE, sdpa
from polyhead.errors import BackendError
from polyhead.validate import build_call

FALL = "torch then holds T x S scores and repeats key heads (its math path on CPU)"
FUSED = "_scaled_dot_product_flash_attention_for_cpu"


def ones(B=2, H=6, G=2, T=5, S=7, D=8, E=None, dtype=torch.float32, device="cpu"):
    shapes = [(B, H, T, D), (B, G, S, D), (B, G, S, D if E is None else E)]
    return [torch.ones(shape, dtype=dtype, device=device) for shape in shapes]


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
    assert len(sdpa._chunks(call)) > 1
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


LINEAR = {
    "causal": ({}, {"mask": ph.mask.causal()}),
    "window": ({}, {"mask": ph.mask.causal() & ph.mask.window(before=255)}),
    "lengths": ({"B": 2}, {"mask": lambda T: ph.mask.lengths([T - 5, T - 5])}),
    "causal lengths": (
        {"B": 2},
        {"mask": lambda T: ph.mask.causal() & ph.mask.lengths([T - 5, 9])},
    ),
    "S > T": ({"S": 1.25}, {"mask": ph.mask.causal()}),
    "ALiBi": ({}, {"mask": ph.mask.causal(), "alibi_slopes": torch.tensor([0.5, 0.01])}),
}


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
@pytest.mark.parametrize(("sizes", "options"), LINEAR.values(), ids=LINEAR)
def test_memory_is_linear_in_the_number_of_tokens(tensor_sizes, sizes, options, backward, T):
    small = peak(type(tensor_sizes)(), T // 2, sizes, options, backward)
    large = peak(tensor_sizes, T, sizes, options, backward)
    assert large < 2.2 * small
    assert tensor_sizes.largest < T * T


def test_memory_of_a_mask_written_out_whole_is_seen(tensor_sizes, monkeypatch):
    """The test above, broken on purpose."""
    monkeypatch.setattr(sdpa, "_WHOLE", 2**62)
    sizes, options = LINEAR["window"]
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


@pytest.mark.usefixtures("kernels")
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


def odd(batch, head, query, key):
    return key % 2 == 1


REASONS = [
    ({"dtype": torch.float64}, {}, ["runs float32, bfloat16 and float16; got float64"]),
    (
        {"T": 0},
        {},
        ["needs at least one batch row, query and key; got B = 2, T = 0, S = 7"],
    ),
    (
        {"S": 0},
        {},
        ["needs at least one batch row, query and key; got B = 2, T = 5, S = 0"],
    ),
    (
        {"B": 0},
        {},
        ["needs at least one batch row, query and key; got B = 0, T = 5, S = 7"],
    ),
    ({}, {"scale": 0.0}, ["needs a scale above 0; got scale = 0.0"]),
    ({}, {"scale": -0.5}, ["needs a scale above 0; got scale = -0.5"]),
    ({}, {"softcap": 30.0}, ["has no softcap; got softcap = 30.0"]),
    ({}, {"sinks": torch.zeros(6)}, ["has no sinks; got sinks for 6 heads"]),
    (
        {"dtype": torch.bfloat16, "device": "meta"},
        {
            "bias": torch.zeros(5, 7, device="meta"),
            "alibi_slopes": torch.zeros(6, device="meta"),
        },
        [
            "takes a bias of the query's dtype bfloat16; got float32",
            "would round ALiBi to bfloat16; got alibi_slopes",
        ],
    ),
    ({}, {"dropout": 0.25}, [f"has no dropout in its CPU kernel; got dropout = 0.25; {FALL}"]),
    ({"E": 3}, {}, [f"needs E = D; got D = 8, E = 3; {FALL}"]),
    (
        {},
        {"bias": torch.zeros(5, 7, requires_grad=True)},
        [f"gives no gradient to bias; {FALL}"],
    ),
    (
        {},
        {"alibi_slopes": torch.zeros(6, requires_grad=True)},
        [f"gives no gradient to alibi_slopes; {FALL}"],
    ),
    (
        {},
        {"mask": ph.mask.causal() & ~ph.mask.custom(odd)},
        ["runs masks of known structure, no custom(odd)"],
    ),
    (
        {"E": 3, "dtype": torch.float64},
        {"softcap": 2.0, "dropout": 0.5},
        [
            "runs float32, bfloat16 and float16; got float64",
            "has no softcap; got softcap = 2.0",
            f"has no dropout in its CPU kernel; got dropout = 0.5; {FALL}",
            f"needs E = D; got D = 8, E = 3; {FALL}",
        ],
    ),
]


@pytest.mark.parametrize(("sizes", "options", "reasons"), REASONS)
def test_sdpa_says_why_not_with_numbers(sizes, options, reasons):
    call = build_call(*ones(**sizes), **options)
    assert sdpa.why_not(call) == reasons
    with pytest.raises(BackendError) as caught:
        ph.attention(*ones(**sizes), **options, backend="sdpa")
    assert caught.value.reasons == {"sdpa": tuple(reasons)}
    assert REFERENCE.why_not(call) == []


def test_a_bias_that_needs_no_gradient_now_is_accepted():
    bias = torch.zeros(5, 7, requires_grad=True)
    with torch.no_grad():
        assert sdpa.why_not(build_call(*ones(), bias=bias)) == []


@pytest.mark.parametrize(
    ("sizes", "options", "note"),
    [
        ({}, {}, "no mask"),
        ({"T": 7}, {"mask": ph.mask.causal()}, "is_causal: no T x S tensor"),
        ({}, {"mask": ph.mask.causal(align="start")}, "is_causal: no T x S tensor"),
        ({"T": 1}, {"mask": ph.mask.causal()}, "no mask"),
        (
            {"T": 1},
            {"mask": ph.mask.causal() & ph.mask.window(before=3)},
            "window(before=3) written out, T = 1 by S = 7",
        ),
        ({}, {"mask": ph.mask.causal()}, "causal() written out, T = 5 by S = 7"),
        (
            {},
            {"mask": ph.mask.lengths([1, 2]), "bias": torch.zeros(5, 7)},
            "lengths([1, 2]) and bias written out, T = 5 by S = 7",
        ),
        ({}, {"bias": torch.zeros(7)}, "bias written out, T = 5 by S = 7"),
        ({}, {"alibi_slopes": torch.zeros(6)}, "ALiBi written out, T = 5 by S = 7"),
    ],
)
def test_sdpa_names_its_kernel_and_what_it_writes_out(sizes, options, note):
    explained = ph.explain(*ones(**sizes), **options, backend="sdpa")
    assert explained.notes == (f"torch's flash kernel, {note}",)


@st.composite
def calls(draw):
    """Arguments that break no rule, in any layout: what `why_not` has to judge."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    B, G, group = pick(1, 2), pick(1, 3), pick(1, 2)
    H, T, S, D = G * group, pick(1, 2, 5, 40), pick(1, 3, 5, 40), pick(1, 8, 24)
    E = pick(D, D, D, 3)
    dtype = pick(torch.float32, torch.bfloat16, torch.float16)

    def laid_out(*shape):
        order = draw(st.permutations(range(len(shape))))
        step = pick(1, 2)
        made = torch.randn([shape[axis] * step for axis in order]).to(dtype)
        made = made.permute([order.index(axis) for axis in range(len(shape))])
        return made[tuple(slice(None, None, step) for _ in shape)]

    def broadcast(shape):
        return [pick(1, size) for size in shape]

    masks = [
        None,
        ph.mask.causal(),
        ph.mask.causal(align="start"),
        ph.mask.causal() & ph.mask.window(before=2),
        ph.mask.lengths([S // 2] * B),
        ph.mask.dense(laid_out(*broadcast((B, H, T, S))) > 0),
        ph.mask.dense(laid_out(*broadcast((T, S))) > 0),
    ]
    bias = None
    if draw(st.booleans()):
        shape = broadcast((B, H, T, S))[draw(st.integers(0, 4)) :]
        bias = laid_out(*shape)
        if draw(st.booleans()):
            bias = bias.expand((B, H, T, S)[4 - len(shape) :])
        bias = bias.detach().requires_grad_(pick(False, False, True))
    inputs = [laid_out(B, H, T, D), laid_out(B, G, S, D), laid_out(B, G, S, E)]
    inputs = [x.detach().requires_grad_(draw(st.booleans())) for x in inputs]
    return inputs, {"mask": pick(*masks), "bias": bias, "dropout": pick(0.0, 0.0, 0.5)}


@given(calls())
@settings(max_examples=300, deadline=None)
def test_what_sdpa_accepts_runs_on_the_fused_kernel(case):
    """With the math path forbidden torch raises where it would have taken it."""
    inputs, options = case
    if sdpa.why_not(build_call(*inputs, **options)):
        return
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = ph.attention(*inputs, **options, backend="sdpa")
        if output.requires_grad:
            output.float().sum().backward()
    want = ph.attention(*inputs, **options, backend="reference")
    eps = torch.finfo(output.dtype).eps
    torch.testing.assert_close(output, want, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": ph.mask.causal()},
        {"mask": ph.mask.lengths([3, 0])},
        {"mask": ph.mask.causal(), "bias": torch.zeros(6, 5, 7)},
        {"bias": torch.zeros(7)},
        {"bias": torch.zeros(())},
        {"bias": torch.zeros(7, 5).T},
    ],
    ids=str,
)
def test_the_fused_kernel_is_what_is_called(tensor_sizes, options):
    with tensor_sizes:
        ph.attention(*ones(), **options, backend="sdpa")
    assert tensor_sizes.operations.count(FUSED) == 1
    assert not {"bmm", "_softmax", "_safe_softmax", "mm", "baddbmm"} & set(tensor_sizes.operations)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {"dropout": 0.25}),
        ({"E": 3}, {}),
        ({}, {"bias": torch.zeros(5, 7, requires_grad=True)}),
    ],
    ids=str,
)
def test_what_sdpa_refuses_on_the_cpu_the_kernel_would_refuse(sizes, options):
    """So that a reason goes when torch learns the case."""
    call = build_call(*ones(**sizes), **options)
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.warns(UserWarning, match="."),
        pytest.raises(RuntimeError, match="No available kernel"),
    ):
        sdpa.run(call)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive_would_lift_what_is_forbidden(scale):
    """So that the reason goes when torch scales before it forbids."""
    call = build_call(*ones(T=7), scale=scale, mask=ph.mask.causal())
    assert not torch.isfinite(sdpa.run(call)[0]).all()


def test_simplify_drops_what_forbids_nothing():
    causal, window = ph.mask.causal(), ph.mask.window(before=3)
    start = ph.mask.causal(align="start")

    def simplified(mask, T=1, query_offset=None):
        query, key, value = ones(T=T, S=7)
        return sdpa.simplify(build_call(query, key, value, mask, query_offset=query_offset)).mask

    assert simplified(None) is None
    assert simplified(causal) is None
    assert simplified(causal & window) == window
    assert simplified(causal & window & start) == window & start
    assert simplified(causal & window, T=2) == causal & window
    assert simplified(start) == start
    assert simplified(causal | window) == causal | window
    assert simplified(causal, query_offset=3) == causal


def test_sdpa_says_when_its_fused_kernel_is_switched_off():
    query = torch.randn(1, 2, 3, 8)
    with sdpa_kernel(SDPBackend.MATH):
        explanation = ph.explain(query, query, query, backend=["sdpa", "reference"])
    assert explanation.chosen == "reference"
    assert "switched off" in explanation.reasons["sdpa"][0]
    assert ph.explain(query, query, query, backend=["sdpa", "reference"]).chosen == "sdpa"
