"""ONNX Runtime and OpenVINO peers, where they are installed."""

import importlib.util

import pytest
import torch

from polyhead.bench.gate import gate
from polyhead.bench.peers.engines import ONNX_RUNTIME, OPENVINO


@pytest.mark.parametrize("peer", [ONNX_RUNTIME, OPENVINO], ids=lambda peer: peer.name)
@pytest.mark.parametrize("causal", [True, False])
def test_engines_match_float64(small, dtype, peer, causal):
    case = small(G=6, D=16, dtype=dtype, causal=causal)
    reasons = peer.why_not(case)
    if reasons:
        pytest.skip("; ".join(reasons))
    inputs = case.inputs(seed=0)
    verdict = gate(case, {peer: peer.prepare(case, inputs)}, inputs)
    assert verdict.faults(peer.name) == ()


def test_engines_list_every_reason(small, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    case = small(T=1, dtype=torch.bfloat16, train=True, dropout=0.1, window=3)
    shared = [
        "computes no gradients",
        "has no dropout",
        "has no window",
        "measured with one KV head per query head; got H = 6, G = 2",
        "measured on whole prompts; got T = 1, S = 17",
    ]
    assert OPENVINO.why_not(case) == ["openvino is not installed", *shared]
    assert ONNX_RUNTIME.why_not(case) == [
        "onnx is not installed",
        "onnxruntime is not installed",
        *shared,
        "its fused attention is float32 only on CPU; got bfloat16",
    ]
