"""Whole runs of shrunk, tiny cases. No times are tested."""

import dataclasses

import pytest
import torch

from polyhead.bench import run as run_module
from polyhead.bench.machine.system_load import DisturbedError
from polyhead.bench.peers.attention import SDPA, Peer
from polyhead.bench.peers.registry import peers_of
from polyhead.bench.run import Settings, judge, run_bench, too_slow
from polyhead.bench.suites import CASES, find_cases

TRIAL = Settings(rounds=5, seconds=0.0, anyway=True, shrink=64, without=("flex", "book: flex"))


@pytest.mark.parametrize("id", ["P3", "P7/bf16", "W1", "D1", "D4", "T1", "T4", "S1", "M2"])
def test_run_case_times_correct_peers_of_every_kind(id):
    (case,) = run_bench(find_cases((id,))[:1], TRIAL).cases
    assert case.id == id
    assert case.ours is not None, case.variants
    assert not any(variant.wrong for variant in case.variants)
    assert {v.samples for v in case.variants if v.milliseconds} == {5}
    for variant in case.variants:
        if variant.milliseconds:
            assert variant.lower <= variant.milliseconds <= variant.upper
            assert variant.rate > 0
        else:
            assert variant.refused
    assert case.targets == ()  # trials have no targets


def test_run_case_does_not_measure_a_wrong_peer(monkeypatch):
    calls = []

    def prepare(case, inputs):
        right = SDPA.prepare(case, inputs)

        def run():
            calls.append(1)
            return {"output": right()["output"] * 1.01}

        return run

    wrong = Peer("polyhead", lambda case: [], prepare, ours=True)
    monkeypatch.setattr(run_module, "peers_of", lambda case: (wrong, SDPA))
    result = run_bench(find_cases(("P2",)), TRIAL)
    (case,) = result.cases
    assert result.wrong
    assert len(calls) == 1  # by the gate
    assert (case.ours, case.variants[0].milliseconds) == (None, None)
    assert case.variants[0].refused[0].startswith("output is off by")
    assert case.variants[1].milliseconds is not None


def test_run_case_without_any_peer_keeps_the_reasons(monkeypatch):
    """Nor is the exact result computed, which may need what is missing."""

    def prepare(case, inputs):
        raise AssertionError("was prepared")

    missing = [Peer(name, lambda case: ["timm is not installed"], prepare) for name in "ab"]
    monkeypatch.setattr(run_module, "peers_of", lambda case: missing)
    monkeypatch.setattr(run_module, "gate", prepare)
    result = run_bench(find_cases(("N1/vit",)), TRIAL)
    (case,) = result.cases
    assert [v.refused for v in case.variants] == [("timm is not installed",)] * 2
    assert not result.wrong


def test_too_slow_exempts_peers_named_in_targets():
    def peer(name, **more):
        return Peer(name, lambda case: [], lambda case, inputs: dict, **more)

    peers = [peer("polyhead", ours=True), peer("sdpa"), peer("eager"), peer("engine")]
    peers.append(peer("flex", compiles=True))
    seconds = {"polyhead": 99.0, "sdpa": 0.1, "eager": 2.1, "engine": 1.9, "flex": 40.0}
    plain, named = find_cases(("P2", "D1"))  # of which the second has a target over sdpa
    slow = too_slow(plain, peers, seconds)
    assert {peer.name: said for peer, said in slow.items()} == {
        "eager": "its first call took 2.1 s, over 20 times the fastest"
    }
    assert too_slow(named, peers, {**seconds, "sdpa": 99.0, "eager": 0.1, "engine": 0.1}) == {}
    # Slow, but over within a second.
    assert too_slow(plain, peers, {**seconds, "sdpa": 0.01, "eager": 0.9, "engine": 0.9}) == {}


def test_run_case_reports_a_too_slow_peer(monkeypatch):
    monkeypatch.setattr(run_module, "_HOPELESS", -1)
    monkeypatch.setattr(run_module, "_HOPELESS_SECONDS", 0.0)
    calls = []

    def prepare(case, inputs):
        run = SDPA.prepare(case, inputs)
        return lambda: (calls.append(1), run())[1]

    counted = dataclasses.replace(SDPA, prepare=prepare)
    ours = next(peer for peer in peers_of(find_cases(("P2",))[0]) if peer.ours)
    monkeypatch.setattr(run_module, "peers_of", lambda case: (ours, counted))
    (case,) = run_bench(find_cases(("P2",)), TRIAL).cases
    assert len(calls) == 1  # by the gate
    assert case.ours is not None
    assert case.best_peer is None
    sdpa = next(variant for variant in case.variants if variant.name == "sdpa")
    assert sdpa.refused[0].startswith("its first call took ")
    assert not sdpa.wrong


def test_run_bench_disturbed_keeps_results_and_stops(monkeypatch):
    honest, tries = run_module.quietly, []

    def disturbed_at_the_third(measure, *, anyway):
        tries.append(1)
        if len(tries) == 3:
            raise DisturbedError("others are busy")
        return honest(measure, anyway=anyway)

    monkeypatch.setattr(run_module, "quietly", disturbed_at_the_third)
    result = run_bench(find_cases(("P2", "P3", "P8")), TRIAL)
    assert [case.id for case in result.cases] == ["P2"]
    assert result.refusal == "P3: others are busy"


def test_run_bench_interrupted_keeps_results(monkeypatch):
    honest = run_module.run_case

    def interrupted_at_the_second(case, *arguments):
        if case.id == "P3":
            raise KeyboardInterrupt
        return honest(case, *arguments)

    monkeypatch.setattr(run_module, "run_case", interrupted_at_the_second)
    result = run_bench(find_cases(("P2", "P3", "P8")), TRIAL)
    assert [case.id for case in result.cases] == ["P2"]
    assert (result.refusal, result.interrupted) == ("P3: interrupted", True)


def test_run_bench_on_a_busy_machine_measures_nothing(monkeypatch):
    def busy():
        raise DisturbedError("others are busy")

    monkeypatch.setattr(run_module, "check_quiet", busy)
    monkeypatch.setattr(run_module, "measure_ceilings", None)
    with pytest.raises(DisturbedError, match="others are busy"):
        run_bench(find_cases(("P2",)), dataclasses.replace(TRIAL, anyway=False))


def test_run_bench_warns_of_unreliable_numbers():
    result = run_bench((), TRIAL)
    assert result.warnings[0].startswith("measured with --anyway")
    assert "sizes divided by 64: a trial, not a measurement" in result.warnings
    assert result.left_out == ("flex", "book: flex")


def test_run_bench_progress_is_monotonic():
    steps = []
    run_bench(find_cases(("P2", "T1")), TRIAL, lambda step, done: steps.append((step, done)))
    done = [share for _, share in steps]
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert next(step for step, _ in steps if step.startswith("T1")) == "T1: preparing"


def test_run_case_measures_memory_of_timed_peers(monkeypatch):
    asked = []
    monkeypatch.setattr(run_module, "peak_mebibytes", lambda *a: asked.append(a) or 1.5)
    settings = dataclasses.replace(TRIAL, memory=True)
    (case,) = run_bench(find_cases(("T1",)), settings).cases
    measured = [variant for variant in case.variants if variant.milliseconds]
    assert asked == [("T1", variant.name, 64) for variant in measured]
    assert {variant.memory_mib for variant in measured} == {1.5}


def test_run_bench_sets_threads_for_all_peers():
    before = torch.get_num_threads()
    try:
        assert run_bench((), dataclasses.replace(TRIAL, threads=3)).machine.threads == 3
    finally:
        torch.set_num_threads(before)


def test_judge_compares_with_best_named_and_ceiling(case_result):
    (case,) = find_cases(("P4",))
    met = judge(case, case_result())
    assert [(t.what, t.wanted, t.got, t.met) for t in met] == [
        ("times as fast as the best peer", 2.2, 1.5, False),
        ("times as fast as sdpa", 3.0, 1.5, False),
        ("of the ceiling (bfloat16)", 0.65, 0.5, False),
    ]
    call = judge(find_cases(("D4/call",))[0], case_result())
    assert [(t.what, t.wanted, t.got, t.met) for t in call] == [("us at most", 15, 2000.0, False)]
    nothing = judge(case, case_result(variants=()))
    assert {target.met for target in nothing} == {None}


def test_targets_name_existing_peers():
    for case in CASES:
        names = {"best", *(peer.name for peer in peers_of(case))}
        assert set(case.targets) <= names
