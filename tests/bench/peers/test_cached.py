"""KV cache peers: decoding over a cache in place, and over equal contiguous tensors."""

import pytest
import torch

from polyhead.bench.gate import gate
from polyhead.bench.peers.cached import CACHES
from polyhead.bench.peers.registry import peers_of


@pytest.mark.parametrize(
    "changes",
    [{"codes": True}, {"blocks": 16}, {"codes": True, "blocks": 16}],
    ids=["int8", "blocks", "int8-blocks"],
)
def test_cached_peers_match_float64(small, dtype, changes, monkeypatch):
    case = small(dtype=dtype, T=1, S=70, D=24, **changes)
    assert peers_of(case) == CACHES
    inputs = case.inputs(seed=0)
    seen = []
    real = torch.ops.polyhead.attention_cached
    monkeypatch.setattr(
        torch.ops.polyhead, "attention_cached", lambda *a: seen.append(a) or real(*a)
    )
    runs = {peer: peer.prepare(case, inputs) for peer in CACHES}
    verdict = gate(case, runs, inputs)
    assert [str(fault) for peer in runs for fault in verdict.faults(peer.name)] == []
    ((_, data, _, scales, _, table, *_),) = seen  # by polyhead alone
    assert (data.dtype == torch.int8) == (scales is not None) == case.codes
    assert (table is not None) == (case.blocks is not None)
