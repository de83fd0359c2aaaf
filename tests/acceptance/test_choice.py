"""Choosing a backend costs one question, and asking for aux changes nothing."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import pytest
import torch

import polyhead as ph


@contextmanager
def asked():
    """The modules of the backends whose `why_not` is called, in order."""
    modules = []

    def look(frame, event, arg):
        name = frame.f_globals.get("__name__", "")
        if event == "call" and frame.f_code.co_name == "why_not":
            modules.append(name.removeprefix("polyhead.backends."))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield modules
    finally:
        sys.setprofile(before)


def tensors(**options):
    return [torch.randn(2, 6, 5, 8, **options) for _ in range(3)]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": ph.mask.causal() & ph.mask.window(before=2)},
        {"return_aux": ph.AuxRequest(weights=True, lse=True, stats=True)},
        {"backend": "sdpa"},
    ],
    ids=str,
)
def test_a_call_asks_no_further_than_the_first_that_accepts(options, requires_grad):
    inputs = tensors(requires_grad=requires_grad)
    with asked() as modules:
        ph.attention(*inputs, **options)
    assert modules == [options.get("backend", ph.backends()[0].name)]


def test_a_call_asks_each_that_refuses_once():
    inputs, names = tensors(), [backend.name for backend in ph.backends()]
    inputs = [x.double() for x in inputs]  # which none but the definition computes in
    with asked() as modules:
        ph.attention(*inputs)
    assert modules == names[: names.index("reference") + 1]


@pytest.mark.parametrize("variant", ["split", "stacked"], indirect=True)
def test_a_module_asks_once_for_each_call(variant):
    module, inputs = variant.build(), variant.inputs(5)
    with asked() as modules:
        module(**inputs)
    assert modules == [ph.backends()[0].name] * len(getattr(module, "heads", [module]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_aux_changes_no_output_whatever_the_mode(variant, mode):
    module, inputs = variant.build(), variant.inputs(7)
    if variant.lengths:
        inputs = {"x": inputs["x"], "mask": ph.mask.lengths(inputs["lengths"])}
        module = module.inner
    request = ph.AuxRequest(weights=True, lse=True, stats=True, mean_weights=True)
    with mode():
        y, aux = module(**inputs, return_aux=request)
        assert torch.equal(module(**inputs), y)
    want = module(**inputs, return_aux=request)[1]
    # Without gradients the kernel writes them, with them the definition.
    torch.testing.assert_close(aux.weights, want.weights)
    torch.testing.assert_close(aux.mean_weights, want.weights.mean(dim=1))
    assert torch.equal(aux.lse, want.lse)
    assert aux.weights.requires_grad == (mode is torch.enable_grad)
