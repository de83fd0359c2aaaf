"""Module peers: one function and one set of weights, in every layout."""

import pytest
import torch

from polyhead.bench.gate import gate
from polyhead.bench.peers.modules import MODULES, OWN_CLASS

RUN_HERE = [peer for peer in MODULES if not peer.compiles]


@pytest.mark.parametrize("train", [False, True])
def test_module_peers_are_one_function_with_equal_gradients(small, train):
    case = small(G=6, kind="module", train=train)
    inputs = case.inputs(seed=0)
    with torch.set_grad_enabled(train):
        runs = {peer: peer.prepare(case, inputs) for peer in RUN_HERE}
        verdict = gate(case, runs, inputs)
    assert len(verdict.checks) == 11
    assert [str(fault) for peer in runs for fault in verdict.faults(peer.name)] == []
    names = ["output", "dx", "dout_weight", "dout_bias", "dqkv_weight"]
    assert [check.what for check in verdict.checks["polyhead"]] == (names if train else names[:1])


def test_module_peers_use_the_given_weights(small, naive_attention):
    case = small(G=6, kind="module", dtype=torch.float64)
    inputs = case.inputs(seed=0)
    qkv = (inputs["x"] @ inputs["qkv_weight"].T).unflatten(2, (3, case.H, case.D))
    allowed = case.mask.materialize(case.T, case.S)
    context = naive_attention(*qkv.permute(2, 0, 3, 1, 4), allowed=allowed)
    expected = context.transpose(1, 2).flatten(2) @ inputs["out_weight"].T + inputs["out_bias"]
    with torch.no_grad():
        output = OWN_CLASS.prepare(case, inputs)()["output"]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)


def test_module_peer_reports_its_backend(small):
    assert MODULES[0].name == "polyhead"
    assert MODULES[0].backend(small(G=6, kind="module")) in {"cpu", "sdpa", "reference"}
