"""Sizes at which torch's function has the call."""

from __future__ import annotations

import pytest
import torch

from polyhead.drop_in import explain_sdpa

pytestmark = pytest.mark.usefixtures("kernels")


def _by(T, S, H=2, G=2, E=8, train=False, **kwargs):
    query = torch.randn(1, H, T, 8, requires_grad=train)
    key, value = torch.randn(1, G, S, 8), torch.randn(1, G, S, E)
    return explain_sdpa(query, key, value, enable_gqa=H != G, **kwargs)


LEAST = {
    "no mask": ({}, 256, 256, 512),
    "causal": ({"is_causal": True}, 128, 128, 256),
    "float mask": ({"attn_mask": torch.randn(1, 1)}, 256, 256, 512),
    "grouped heads": ({"H": 4}, 1, 2048, 131072),
    "other values": ({"E": 16}, 2, 1024, 8192),
    "dropout": ({"dropout_p": 0.1}, 256, 64, 64),
}


@pytest.mark.parametrize("kind", LEAST)
def test_size_reason_begins_below_the_measured_size(kind):
    kwargs, T, inference, training = LEAST[kind]
    for S, train in ((inference, False), (training, True)):
        assert _by(T, S, train=train, **kwargs).by == "polyhead"
        if kind == "dropout":
            continue
        explained = _by(T, S - 1, train=train, **kwargs)
        assert explained.by == "torch"
        mode = "training" if train else "inference"
        assert explained.why.startswith(f"T = {T} queries by S = {S - 1} keys: torch is as fast")
        assert f"in {mode} below {T * S} pairs" in explained.why


def test_size_reason_of_a_learned_mask_is_its_own():
    mask = torch.zeros(128, 256, requires_grad=True)
    assert _by(128, 256, attn_mask=mask).by == "polyhead"
    assert _by(128, 255, attn_mask=torch.zeros(128, 255, requires_grad=True)).by == "torch"


def test_size_reason_without_grad_mode_is_inference():
    with torch.no_grad():
        assert _by(256, 256, train=True).by == "polyhead"
    assert _by(256, 256, train=True).by == "torch"
