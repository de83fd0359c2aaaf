"""Correctness gate: passes correct peers and catches each of these wrong ones."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from polyhead.bench import gate as gate_module
from polyhead.bench.gate import gate
from polyhead.bench.peers.attention import EAGER, POLYHEAD, SDPA, Peer, attention_run


def spoiled(change, peer=SDPA):
    """A peer with results modified by `change`."""

    def prepare(case, inputs):
        run = peer.prepare(case, inputs)
        return lambda: change(run())

    return Peer("spoiled", peer.why_not, prepare)


def faults(case, peer):
    inputs = case.inputs(seed=0)
    verdict = gate(case, {peer: peer.prepare(case, inputs)}, inputs)
    return [check.what for check in verdict.faults(peer.name)]


def with_output(change):
    return lambda results: {**results, "output": change(results["output"])}


def last_query_wrong(output):
    output = output.clone()
    output[-1, -1, -1] *= 1.001
    return output


def last_is_nan(output):
    output = output.clone()
    output[-1, -1, -1, -1] = float("nan")
    return output


@pytest.mark.parametrize(
    "change",
    [
        lambda output: output * 1.0001,
        lambda output: output[:, :, :, :-1],
        lambda output: output.flip(1),
        last_query_wrong,
        last_is_nan,
    ],
)
def test_gate_catches_a_wrong_output(small, change):
    assert faults(small(), SDPA) == []
    assert faults(small(), spoiled(with_output(change))) == ["output"]


def test_gate_tolerance_grows_with_summed_magnitudes(small):
    """Outputs near 0.03, sums of values near 1: another order of summation rounds differently."""
    case = small(B=1, T=1, S=8192, D=64)
    assert faults(case, spoiled(with_output(lambda output: output + 2.4e-7))) == []
    assert faults(case, spoiled(with_output(lambda output: output + 2e-6))) == ["output"]


@pytest.mark.parametrize("name", ["output", "dquery", "dkey", "dvalue"])
def test_gate_checks_each_gradient(small, name):
    case = small(train=True)
    assert faults(case, SDPA) == []
    assert faults(case, spoiled(lambda r: {**r, name: r[name] * 1.001})) == [name]
    assert faults(case, spoiled(lambda r: {n: t for n, t in r.items() if n != name})) == [name]


def test_gate_catches_another_dtype(small):
    case = small(dtype=torch.bfloat16)
    wide = Peer(
        "wide",
        lambda case: [],
        lambda case, inputs: EAGER.prepare(
            case, {name: tensor.float() for name, tensor in inputs.items()}
        ),
    )
    assert faults(case, wide) == ["output's dtype torch.float32"]


def test_gate_catches_upper_left_causal(small):
    def upper_left(case, inputs):
        return attention_run(
            case,
            inputs,
            lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
        )

    case = small(T=7)
    assert faults(case, POLYHEAD) == []
    assert faults(case, Peer("upper left", lambda case: [], upper_left)) == ["output"]


def test_gate_catches_wrong_statistics(small):
    case = small(statistics=True)
    assert faults(case, POLYHEAD) == []
    wrong = spoiled(lambda r: {**r, "entropy": r["entropy"] + 1e-3}, POLYHEAD)
    assert faults(case, dataclasses.replace(wrong, ours=True)) == ["entropy"]


def test_gate_long_pass_checks_first_and_last_queries(small, monkeypatch):
    monkeypatch.setattr(gate_module, "_CELLS", 3 * 6 * 257 * 10)
    case = small(T=257, S=257)
    inputs = case.inputs(seed=0)
    assert gate(case, {SDPA: SDPA.prepare(case, inputs)}, inputs).scope == "10 of 257 queries"
    assert faults(case, SDPA) == []
    assert faults(case, spoiled(with_output(last_query_wrong))) == ["output"]


def test_gate_checks_that_dropout_drops_and_scales(small):
    case = small(T=64, S=64, dropout=0.5, train=True)

    def peer(dropped):
        def prepare(case, inputs):
            mask = ~case.mask.materialize(case.T, case.S)

            def attend(query, key, value):
                scores = query @ key.repeat_interleave(3, 1).mT * case.D**-0.5
                weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
                return dropped(weights, case.dropout) @ value.repeat_interleave(3, 1)

            return attention_run(case, inputs, attend)

        return Peer("dropout", lambda case: [], prepare)

    assert faults(case, EAGER) == []
    assert faults(case, peer(F.dropout)) == []
    assert faults(case, peer(lambda w, p: w)) == ["that dropout drops"]
    assert faults(case, peer(lambda w, p: w * (torch.rand_like(w) > p))) == [
        "the mean of what dropout keeps"
    ]


def test_gate_check_reports_the_error(small):
    inputs = small().inputs(seed=0)
    wrong = spoiled(with_output(lambda output: output + 0.25))
    verdict = gate(small(), {wrong: wrong.prepare(small(), inputs)}, inputs)
    assert verdict.scope == "all of it"
    (fault,) = verdict.faults("spoiled")
    assert str(fault).startswith("output is off by 0.25, allowed are ")
    assert 0 < fault.allowed < 1e-5
