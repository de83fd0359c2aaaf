"""The choice among backends, what it says, and that sdpa accepts only what its kernel runs."""

from __future__ import annotations

import re
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import polyhead as ph
from polyhead.backends import BACKENDS, REFERENCE, candidates, choose, sdpa
from polyhead.errors import ArgumentError, BackendError, DtypeError
from polyhead.functional import build_call

FALL = "torch then holds T x S scores and repeats key heads (its math path on CPU)"
FUSED = "_scaled_dot_product_flash_attention_for_cpu"


def tensors(B=2, H=6, G=2, T=5, S=7, D=8, E=None, dtype=torch.float32, device="cpu"):
    shapes = [(B, H, T, D), (B, G, S, D), (B, G, S, D if E is None else E)]
    return [torch.ones(shape, dtype=dtype, device=device) for shape in shapes]


def refusing(name, *reasons):
    return ph.Backend(name, lambda call: list(reasons), lambda call: pytest.fail("must not run"))


def test_the_table_is_in_order_of_preference():
    assert [backend.name for backend in BACKENDS] == ["cpu", "sdpa", "flex", "reference"]
    assert candidates("auto") == BACKENDS
    assert REFERENCE is BACKENDS[-1]


def test_auto_takes_the_first_that_can():
    assert choose(build_call(*tensors())).name == "cpu"
    assert choose(build_call(*tensors(), softcap=2.0)).name == "cpu"
    assert choose(build_call(*tensors(dtype=torch.float64))).name == "reference"
    assert choose(build_call(*tensors(device="meta"))).name == "sdpa"


def test_a_name_a_backend_or_several():
    call = build_call(*tensors())
    own = ph.Backend("own", lambda call: [], lambda call: (call.query + 1, ph.Aux()))
    assert choose(call, "reference") is REFERENCE
    assert choose(call, own) is own
    assert choose(call, [own, "sdpa"]) is own
    assert choose(call, ("reference", "sdpa")) is REFERENCE
    assert choose(call, [refusing("never", "no"), "reference"]) is REFERENCE
    assert candidates([own, "auto"]) == (own, *BACKENDS)


def test_the_callers_own_backend_runs_and_the_definition_gives_its_aux():
    query, key, value = tensors()
    own = ph.Backend("own", lambda call: [], lambda call: (call.query + 1, ph.Aux()))
    output, aux = ph.attention(
        query, key, value, backend=own, return_aux=ph.AuxRequest(weights=True)
    )
    assert torch.equal(output, query + 1)
    torch.testing.assert_close(aux.weights, torch.full((2, 6, 5, 7), 1 / 7))


def test_the_aux_a_backend_gives_is_not_computed_again():
    mine = torch.zeros(1)
    own = ph.Backend(
        "own",
        lambda call: [],
        lambda call: (call.query, ph.Aux(lse=mine)),
        aux=frozenset({"lse"}),
    )
    _, aux = ph.attention(*tensors(), backend=own, return_aux=ph.AuxRequest(lse=True, weights=True))
    assert aux.lse is mine
    assert aux.weights.shape == (2, 6, 5, 7)
    assert aux.stats is None


@pytest.mark.parametrize("backend", ["flashy", ["sdpa", "flashy"]])
def test_an_unknown_name_lists_the_known(backend):
    message = (
        "backend must be one of auto, cpu, sdpa, flex, reference; got 'flashy'; choose one of these"
    )
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        ph.attention(*tensors(), backend=backend)


@pytest.mark.parametrize(("backend", "got"), [(None, "None"), ([], "[]"), (7, "7")])
def test_a_backend_of_another_type_is_refused(backend, got):
    message = (
        f"backend must be a name, a Backend, or a non-empty sequence of these; got {got}; "
        'pass "auto" to let polyhead choose'
    )
    with pytest.raises(DtypeError, match=f"^{re.escape(message)}$"):
        ph.attention(*tensors(), backend=backend)


def test_a_refusal_lists_every_reason_of_every_backend_asked():
    with pytest.raises(BackendError) as caught:
        ph.attention(
            *tensors(dtype=torch.float64),
            softcap=30.0,
            backend=["sdpa", refusing("mine", "needs D = 64; got D = 8")],
        )
    assert str(caught.value) == (
        "no backend asked for can run this call:\n"
        "  sdpa: runs float32, bfloat16 and float16; got float64\n"
        "  sdpa: has no softcap; got softcap = 30.0\n"
        "  mine: needs D = 64; got D = 8\n"
        '  pass backend="auto" to let polyhead choose one that can'
    )
    assert caught.value.reasons == {
        "sdpa": (
            "runs float32, bfloat16 and float16; got float64",
            "has no softcap; got softcap = 30.0",
        ),
        "mine": ("needs D = 64; got D = 8",),
    }


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
        [f"gives no gradient to a bias; {FALL}"],
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
    call = build_call(*tensors(**sizes), **options)
    assert sdpa.why_not(call) == reasons
    with pytest.raises(BackendError) as caught:
        ph.attention(*tensors(**sizes), **options, backend="sdpa")
    assert caught.value.reasons == {"sdpa": tuple(reasons)}
    assert REFERENCE.why_not(call) == []


def test_a_bias_that_needs_no_gradient_now_is_accepted():
    bias = torch.zeros(5, 7, requires_grad=True)
    with torch.no_grad():
        assert sdpa.why_not(build_call(*tensors(), bias=bias)) == []


@pytest.mark.parametrize(
    "mask",
    [
        None,
        ph.mask.causal(),
        ph.mask.lengths(torch.ones(2, dtype=torch.long, device="meta")),
        ~ph.mask.dense(torch.ones(5, 7, dtype=torch.bool, device="meta")),
    ],
    ids=repr,
)
def test_no_backend_reads_values_to_choose(mask):
    """Meta tensors have no values to read."""
    arguments = tensors(device="meta")
    bias = torch.ones(5, 7, device="meta")
    call = build_call(*arguments, mask=mask, bias=bias)
    for backend in BACKENDS:
        # Some know no such device; none may look into a tensor.
        assert backend.why_not(call) == [] or "meta" in backend.why_not(call)[0]
    explained = ph.explain(*arguments, mask=mask, bias=bias)
    assert explained.chosen == "sdpa"
    assert str(explained)


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
    explained = ph.explain(*tensors(**sizes), **options, backend="sdpa")
    assert explained.notes == (f"torch's flash kernel, {note}",)


def test_the_definition_says_what_it_holds():
    explained = ph.explain(*tensors(B=1, H=4, T=512, S=1024), backend="reference")
    note = "plain PyTorch, holds the T x S scores of every head: 8.0 MiB each copy"
    assert explained.notes == (note,)


def taking(name, note):
    return ph.Backend(name, lambda call: [], lambda call: (call.query, ph.Aux()), lambda c: [note])


ABLE, LATER = taking("able", "as it can"), taking("later", "never seen")
SHY = ph.Backend(
    "shy", lambda c: [], lambda c: pytest.fail("not asked"), passed_over=lambda c: ["is slow"]
)


@pytest.mark.parametrize(
    ("backend", "options", "text"),
    [
        (
            [refusing("no", "needs D = 64; got D = 8", "has no bias"), ABLE, LATER],
            {},
            "runs: able\n  as it can\n"
            "no: cannot run\n  needs D = 64; got D = 8\n  has no bias\n"
            "later: could run\n"
            "shy: could run, if asked for by name\n  is slow",
        ),
        (
            refusing("no", "has no bias"),
            {},
            "runs: nothing, every backend asked for refuses\n"
            "no: cannot run\n  has no bias\n"
            "able: could run\n"
            "shy: could run, if asked for by name\n  is slow",
        ),
        (
            ABLE,
            {"return_aux": ph.AuxRequest(weights=True, lse=True)},
            "runs: able\n  as it can\n"
            "  weights, lse computed apart, by reference: holds T x S scores\n"
            "shy: could run, if asked for by name\n  is slow",
        ),
    ],
)
def test_explain_prints_the_choice_and_every_reason(monkeypatch, backend, options, text):
    monkeypatch.setattr(ph.functional, "BACKENDS", (ABLE, SHY))
    assert str(ph.explain(*tensors(), **options, backend=backend)) == text


def test_auto_passes_over_what_a_name_gets(monkeypatch):
    table = (SHY, ABLE)
    monkeypatch.setattr("polyhead.functional.BACKENDS", table)
    monkeypatch.setattr(sys.modules["polyhead.backends"], "BACKENDS", table)
    automatic = tuple((backend, True) for backend in table)
    monkeypatch.setattr(sys.modules["polyhead.backends"], "_AUTOMATIC", automatic)
    call = build_call(*tensors())
    assert choose(call) is ABLE
    assert choose(call, ["auto", LATER]) is ABLE
    assert choose(call, "shy") is SHY
    assert choose(call, [SHY, "auto"]) is SHY
    assert ph.explain(*tensors()).passed_over == {"shy": ("is slow",)}


def test_use_backend_is_what_auto_means_within():
    inputs = tensors()
    call = build_call(*inputs)
    with ph.use_backend("reference"):
        assert choose(call) is REFERENCE
        assert ph.explain(*inputs).chosen == "reference"
        assert choose(call, "sdpa").name == "sdpa"
        with ph.use_backend([refusing("never", "no"), "auto"]):
            assert choose(call).name == BACKENDS[0].name
            assert candidates("auto")[0].name == "never"
        assert choose(call) is REFERENCE
    assert choose(call) is BACKENDS[0]


def test_use_backend_runs_or_raises_and_ends_with_an_error():
    with pytest.raises(BackendError, match="softcap"), ph.use_backend("sdpa"):
        ph.attention(*tensors(), softcap=2.0)
    assert choose(build_call(*tensors(), softcap=2.0)) is BACKENDS[0]
    with pytest.raises(ArgumentError, match="'flashy'"), ph.use_backend("flashy"):
        pytest.fail("entered")


def test_use_backend_is_of_its_own_thread():
    seen = []
    with ph.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose(build_call(*tensors()))))
        thread.start()
        thread.join()
    assert seen == [BACKENDS[0]]


def test_backends_are_listed_in_order_with_a_line_each():
    assert ph.backends() == BACKENDS
    assert all(str(backend).startswith(f"{backend.name}: ") for backend in ph.backends())
    assert str(ph.Backend("own", lambda call: [], lambda call: None)) == "own"


def test_explain_lists_the_callers_own_backend_first():
    explained = ph.explain(*tensors(), backend=[refusing("own", "not today"), "reference"])
    assert explained.chosen == "reference"
    assert list(explained.reasons)[:2] == ["own", "reference"]
    assert explained.reasons["own"] == ("not today",)
    assert set(explained.reasons) == {"own", *(backend.name for backend in BACKENDS)}


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
        ph.attention(*tensors(), **options, backend="sdpa")
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
    call = build_call(*tensors(**sizes), **options)
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.warns(UserWarning, match="."),
        pytest.raises(RuntimeError, match="No available kernel"),
    ):
        sdpa.run(call)


def test_simplify_drops_what_forbids_nothing():
    causal, window = ph.mask.causal(), ph.mask.window(before=3)
    start = ph.mask.causal(align="start")
    assert sdpa.simplify(None, 1, 7) is None
    assert sdpa.simplify(causal, 1, 7) is None
    assert sdpa.simplify(causal & window, 1, 7) == window
    assert sdpa.simplify(causal & window & start, 1, 7) == window & start
    assert sdpa.simplify(causal & window, 2, 7) == causal & window
    assert sdpa.simplify(start, 1, 7) == start
    assert sdpa.simplify(causal | window, 1, 7) == causal | window


def test_sdpa_says_when_its_fused_kernel_is_switched_off():
    query = torch.randn(1, 2, 3, 8)
    with sdpa_kernel(SDPBackend.MATH):
        explanation = ph.explain(query, query, query, backend=["sdpa", "reference"])
    assert explanation.chosen == "reference"
    assert "switched off" in explanation.reasons["sdpa"][0]
    assert ph.explain(query, query, query, backend=["sdpa", "reference"]).chosen == "sdpa"
