"""Generation peers: one token of transformers' `generate`."""

import pytest
import torch

from polyhead.bench.gate import gate
from polyhead.bench.peers.generate import GENERATORS


@pytest.fixture(params=[1, 70], ids=["a token", "a prompt"])
def tiny(small, request):
    sizes = {"B": 1, "H": 4, "T": request.param, "S": 70, "D": 8}
    return small(**sizes, kind="generate", dtype=torch.bfloat16)


def test_generators_have_equal_next_token_logits(tiny):
    inputs = tiny.inputs(seed=0)
    runs = {peer: peer.prepare(tiny, inputs) for peer in GENERATORS}
    verdict = gate(tiny, runs, inputs)
    assert verdict.scope == "prompts of 64 tokens"
    assert [str(fault) for peer in runs for fault in verdict.faults(peer.name)] == []


def test_generators_start_each_run_from_the_prompt(tiny):
    run = GENERATORS[0].prepare(tiny, tiny.inputs(seed=0))
    assert torch.equal(run()["output"], run()["output"])


@pytest.mark.slow
def test_generators_run_smollm2(small):
    case = small(B=1, H=9, T=1, S=70, D=64, kind="generate", decoder="SmolLM2")
    inputs = case.inputs(seed=0)
    runs = {peer: peer.prepare(case, inputs) for peer in GENERATORS}
    verdict = gate(case, runs, inputs)
    assert [str(fault) for peer in runs for fault in verdict.faults(peer.name)] == []


def test_generators_keep_the_callers_seed(tiny):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    GENERATORS[0].prepare(tiny, tiny.inputs(seed=0))
    assert torch.equal(torch.random.get_rng_state(), state)
