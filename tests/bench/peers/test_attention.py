"""Attention peers: results and reasons for refusal."""

import pytest
import torch

from polyhead.bench.gate import gate
from polyhead.bench.peers import attention as peers
from polyhead.bench.peers.attention import EAGER, OUTPUT_ONLY, POLYHEAD, SDPA


def prepared(case, *asked):
    inputs = case.inputs(seed=0)
    return {peer: peer.prepare(case, inputs) for peer in asked}, inputs


def test_eager_attention_matches_a_loop_over_heads(small, naive_attention):
    case = small(dtype=torch.float64, window=4)
    inputs = case.inputs(seed=0)
    run = EAGER.prepare(case, inputs)
    allowed = case.mask.materialize(17, 17)
    expected = naive_attention(*inputs.values(), allowed=allowed)
    torch.testing.assert_close(run()["output"], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "changes",
    [{}, {"causal": False}, {"window": 4}, {"train": True}, {"T": 1}, {"train": True, "window": 4}],
)
def test_attention_peers_match_float64(small, dtype, changes):
    case = small(dtype=dtype, **changes)
    runs, inputs = prepared(case, POLYHEAD, SDPA, EAGER)
    verdict = gate(case, runs, inputs)
    assert [str(fault) for peer in runs for fault in verdict.faults(peer.name)] == []


def test_attention_peers_have_gradients_in_training_only(small):
    runs, _ = prepared(small(), POLYHEAD, SDPA, EAGER)
    assert all(list(run()) == ["output"] for run in runs.values())
    runs, _ = prepared(small(train=True), POLYHEAD, SDPA, EAGER)
    names = ["output", "dquery", "dkey", "dvalue"]
    assert all(list(run()) == names for run in runs.values())
    assert not any(tensor.requires_grad for run in runs.values() for tensor in run().values())


def test_output_only_peer_computes_no_statistics(small):
    runs, _ = prepared(small(statistics=True), POLYHEAD, OUTPUT_ONLY)
    assert list(runs[POLYHEAD]()) == ["output", "entropy"]
    assert list(runs[OUTPUT_ONLY]()) == ["output"]


def test_scores_beyond_memory_refuse_with_both_sizes(small, monkeypatch):
    monkeypatch.setattr(peers, "available_bytes", lambda: 2 * 2**30)
    long = small(B=1, H=2, G=2, T=16384, S=16384)
    said = "would hold 6 GiB of T x S scores; 2 GiB are free"
    assert EAGER.why_not(long) == [said]
    assert SDPA.why_not(long) == []
    assert SDPA.why_not(small(**vars_of(long), dropout=0.1, train=True)) != []
    assert EAGER.why_not(small()) == []
    monkeypatch.setattr(peers, "available_bytes", lambda: None)
    assert EAGER.why_not(long) == []


def vars_of(case):
    return {name: getattr(case, name) for name in "BHGTS"}


def test_polyhead_peer_reports_backend_and_memory_limit(small, monkeypatch):
    monkeypatch.setattr(peers, "chosen_backend", lambda case: "reference")
    monkeypatch.setattr(peers, "available_bytes", lambda: 2**30)
    long = small(B=1, H=2, G=2, T=16384, S=16384)
    assert POLYHEAD.why_not(long) == ["would hold 16 GiB of T x S scores; 1 GiB are free"]
    assert POLYHEAD.backend(long) == "reference"
