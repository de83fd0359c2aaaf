"""flex peer: its block mask, built without T x S cells, equals the mask."""

import pytest
import torch

from polyhead.bench.gate import gate
from polyhead.bench.peers.flex import FLEX, _block_mask


@pytest.mark.parametrize("tokens", [17, 257, 1024])
@pytest.mark.parametrize("window", [None, 0, 100, 127, 128, 129, 300])
def test_flex_block_mask_matches_the_mask(small, tokens, window):
    case = small(B=1, T=tokens, S=tokens, window=window)
    blocks = _block_mask(case)
    size, count = 128, -(-tokens // 128)
    allowed = torch.zeros(count * size, count * size, dtype=torch.bool)
    position = torch.arange(count * size)
    rule = blocks.mask_mod(0, 0, position[:, None], position)
    for row in range(count):
        queries = slice(row * size, (row + 1) * size)
        for some, number, indices in (
            (True, blocks.kv_num_blocks, blocks.kv_indices),
            (False, blocks.full_kv_num_blocks, blocks.full_kv_indices),
        ):
            for column in indices[0, 0, row, : number[0, 0, row]].tolist():
                keys = slice(column * size, (column + 1) * size)
                allowed[queries, keys] = rule[queries, keys] if some else True
    expected = case.mask.materialize(tokens, tokens)
    assert torch.equal(allowed[:tokens, :tokens], expected)


def test_flex_refuses_training_and_no_compiler(small, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert FLEX.why_not(small(train=True)) == [
        "torch.compile needs a C++ compiler; none was found",
        "flex_attention has no backward pass on CPU",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"T": 257, "S": 257, "window": 100}, {"T": 1, "S": 257}])
def test_flex_compiled_matches_float64(small, changes):
    case = small(D=16, **changes)
    inputs = case.inputs(seed=0)
    with torch.no_grad():
        verdict = gate(case, {FLEX: FLEX.prepare(case, inputs)}, inputs)
    assert verdict.faults("flex") == ()
