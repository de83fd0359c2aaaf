"""A hundred thousand tokens: numbers of twelve heads, and the memory that they take."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

import polyhead as ph

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for peak memory"),
]

H, T, D = 12, 100_000, 64


class PeakMemory:
    """Mebibytes by which a block raises the most memory that this process ever held."""

    def __enter__(self):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._kibibytes("VmRSS")
        return self

    def __exit__(self, *_):
        self.mebibytes = (self._kibibytes("VmHWM") - self.before) / 1024

    def _kibibytes(self, name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1])


@pytest.fixture(scope="module")
def query_and_key():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, H, T, D, generator=generator) for _ in "qk")
    small = slice(0, 300)
    ph.look.stats(query[:, :, small], key[:, :, small])  # what is set up once is not counted
    return query, key


def weights_of(query, key, head, queries):
    """Weights of some queries of one head, by the definition in float64, (queries, T)."""
    scores = query[0, head, queries].double() @ key[0, head].double().T / D**0.5
    later = torch.arange(T) > torch.arange(T)[queries][:, None]
    return scores.masked_fill_(later, -torch.inf).softmax(dim=-1)


def test_statistics(query_and_key):
    query, key = query_and_key
    with PeakMemory() as memory:
        stats = ph.look.stats(query, key, mask=ph.mask.causal())
    assert memory.mebibytes < 200
    queries = torch.tensor([0, 1, 17, 49_999, 99_999])
    for head in (0, 7, 11):
        weights = weights_of(query, key, head, queries)
        apart = (torch.arange(T) - queries[:, None]).abs()
        want = {
            "entropy": torch.special.entr(weights).sum(-1),
            "mean_distance": (weights * apart).sum(-1),
            "mass_first": weights[:, 0],
            "mass_self": weights.gather(1, queries[:, None])[:, 0],
            "mass_recent": (weights * (apart < 16)).sum(-1),
        }
        for name, values in want.items():
            got = getattr(stats, name)[0, head, queries].double()
            torch.testing.assert_close(got, values, rtol=1e-4, atol=1e-7, msg=name)


def test_a_map_of_256_bins(query_and_key):
    query, key = query_and_key
    with PeakMemory() as memory:
        found = ph.look.attention_map(query, key, bins=256, mask=ph.mask.causal())
    assert memory.mebibytes < 200
    edges = ph.look.bin_edges(T, 256)
    shares = (found * edges.diff()).sum(dim=-1)
    torch.testing.assert_close(shares, torch.ones(1, H, 256), rtol=1e-4, atol=0)
    for head, row in ((3, 255), (8, 100)):
        weights = weights_of(query, key, head, slice(edges[row], edges[row + 1]))
        want = torch.stack([part.mean() for part in weights.split(edges.diff().tolist(), dim=1)])
        torch.testing.assert_close(found[0, head, row].double(), want, rtol=1e-4, atol=1e-12)
