"""The choice among backends, and what it says."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import polyhead as ph
from polyhead.backends import BACKENDS, REFERENCE, candidates, choose
from polyhead.errors import ArgumentError, BackendError, DtypeError
from polyhead.functional import build_call


def tensors(B=2, H=6, G=2, T=5, S=7, D=8, E=None, dtype=torch.float32, device="cpu"):
    shapes = [(B, H, T, D), (B, G, S, D), (B, G, S, D if E is None else E)]
    return [torch.ones(shape, dtype=dtype, device=device) for shape in shapes]


def refusing(name, *reasons):
    return ph.Backend(name, lambda call: list(reasons), lambda call: pytest.fail("must not run"))


def test_the_table_is_in_order_of_preference():
    assert [backend.name for backend in BACKENDS] == ["cpu", "sdpa", "flex", "reference"]
    assert candidates("auto") == BACKENDS
    assert REFERENCE is BACKENDS[-1]


@pytest.mark.usefixtures("kernels")
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
        "no requested backend can run this call:\n"
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


@pytest.mark.usefixtures("kernels")
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


def test_the_definition_says_what_it_holds():
    explained = ph.explain(*tensors(B=1, H=4, T=512, S=1024), backend="reference")
    note = "plain PyTorch, holds the T x S scores of every head: 8.0 MiB each copy"
    assert explained.notes == (note,)


def taking(name, note):
    return ph.Backend(name, lambda call: [], lambda call: (call.query, ph.Aux()), lambda c: [note])


ABLE, LATER = taking("able", "as it can"), taking("later", "never seen")
SHY = ph.Backend(
    "shy",
    lambda c: [],
    lambda c: pytest.fail("not asked"),
    auto_skip=lambda c, can_run: ["is slow"],
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


def test_explain_says_that_a_gradient_of_statistics_comes_from_the_definition():
    kernel = replace(ABLE, aux=frozenset({"lse", "stats"}), first_order_only=True)
    query, key, value = tensors()
    asked = {"return_aux": ph.AuxRequest(lse=True, stats=True), "backend": kernel}
    assert ph.explain(query, key, value, **asked).notes == ("as it can",)
    assert ph.explain(query.requires_grad_(), key, value, **asked).notes == (
        "as it can",
        "second derivatives through the definition: they hold T x S scores",
        "gradients of stats through the definition: they hold T x S scores",
    )
    asked["return_aux"] = ph.AuxRequest(lse=True, stats=True, weights=True)
    assert ph.explain(query, key, value, **asked).notes[2:] == (
        "gradients of stats through the definition: they hold T x S scores",
        "weights computed apart, by reference: holds T x S scores",
    )


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
    assert ph.explain(*tensors()).auto_skip == {"shy": ("is slow",)}


@pytest.mark.usefixtures("kernels")
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


@pytest.mark.usefixtures("kernels")
def test_use_backend_runs_or_raises_and_ends_with_an_error():
    with pytest.raises(BackendError, match="softcap"), ph.use_backend("sdpa"):
        ph.attention(*tensors(), softcap=2.0)
    assert choose(build_call(*tensors(), softcap=2.0)) is BACKENDS[0]
    with pytest.raises(ArgumentError, match="'flashy'"), ph.use_backend("flashy"):
        pytest.fail("entered")


@pytest.mark.usefixtures("kernels")
def test_use_backend_is_of_its_own_task():
    chosen = {}

    async def within(name, backend, before, after):
        await asyncio.sleep(before)
        with ph.use_backend(backend):
            await asyncio.sleep(after)
            chosen[name] = ph.explain(*tensors()).chosen
        chosen[name, "left"] = ph.explain(*tensors()).chosen

    async def overlapping():  # the first to enter is the first to leave
        await asyncio.gather(within("a", "reference", 0, 0.02), within("b", "sdpa", 0.01, 0.03))

    traced = []

    def recorder(graph, inputs):
        traced.append(graph.code)
        return graph.forward

    def check():
        usual = ph.explain(*tensors()).chosen
        asyncio.run(overlapping())
        left = {("a", "left"): usual, ("b", "left"): usual}
        assert chosen == {"a": "reference", "b": "sdpa", **left}
        assert ph.explain(*tensors()).chosen == usual
        torch._dynamo.reset()
        torch.compile(ph.attention, fullgraph=True, backend=recorder)(*tensors())
        assert "polyhead" in traced[0]

    # In this thread a loop may run: the browser's, of another test.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(check).result()


@pytest.mark.usefixtures("kernels")
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
