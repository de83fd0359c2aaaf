"""Whole models as peers."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from polyhead.bench.gate import gate
from polyhead.bench.peers import models
from polyhead.bench.peers.registry import peers_of
from polyhead.bench.suites import SUITES, find_cases

SMALL = {
    "N1/window": {"T": 200, "S": 200},
    "N1/whisper-encoder": {"T": 160, "S": 160},
    "N1/whisper-decoder": {"T": 130, "S": 160},
}


@pytest.mark.parametrize("name", SMALL)
def test_model_peers_agree_with_float64(name):
    (case,) = find_cases((name,))
    case = replace(case, H=2, G=2, **SMALL[name])
    for peer in peers_of(case):
        if peer.why_not(case):
            pytest.skip(peer.why_not(case)[0])
    inputs = case.inputs(0)
    with torch.no_grad():
        runs = {peer: peer.prepare(case, inputs) for peer in peers_of(case)}
        verdict = gate(case, runs, inputs)
    assert not any(verdict.faults(peer.name) for peer in runs)


def test_model_peer_in_training_gives_gradients():
    (case,) = find_cases(("N1/window",))
    case = replace(case, H=2, G=2, T=200, S=200, train=True)
    inputs = case.inputs(0)
    runs = {peer: peer.prepare(case, inputs) for peer in peers_of(case)}
    verdict = gate(case, runs, inputs)
    assert {check.what for check in verdict.checks["polyhead"]} == {"output", "dx"}
    assert not any(verdict.faults(peer.name) for peer in runs)


def test_model_peer_without_its_package_has_a_reason(monkeypatch):
    (case,) = find_cases(("N1/vit",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert models._reasons(case) == ["timm is not installed"]


def test_model_peer_of_a_broken_package_has_a_reason(monkeypatch):
    (case,) = find_cases(("N1/vit",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", fail)
    (reason,) = models._reasons(case)
    assert reason.startswith("timm cannot be imported: RuntimeError: operator torchvision::nms")


def test_models_suite_has_a_recipe_for_each_case():
    cases = SUITES["models"].select()
    assert {case.model for case in cases} == set(models._RECIPES)
    assert all(case.work is None and case.ceiling is None for case in cases)
    assert str(cases[0]).startswith("timm ViT-S: 1, 6/6, 577, 577, 64")
