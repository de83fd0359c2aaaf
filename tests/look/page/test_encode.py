"""Packed maps and keys, decoded here as documented."""

from __future__ import annotations

import base64
import zlib

import pytest
import torch

from polyhead.look import bin_edges
from polyhead.look.page import encode as pack
from polyhead.look.page.encode import pack_keys, pack_maps


def inflate(text):
    return torch.tensor(list(zlib.decompress(base64.b64decode(text))), dtype=torch.int64)


def read_map(packed, head):
    n = len(packed["edges"]) - 1
    codes = inflate(packed["data"][head]).view(n, n).cumsum(dim=0) % 256
    return packed["scales"][head] * (codes / packed["levels"]) ** 2


def read_keys(packed, head, T):
    """[[(key, weight), ...] of each token]"""
    raw = inflate(packed["data"][head])
    counts, rest = raw[:T], raw[T:]
    count = int(counts.sum())
    weights, places = rest[:count], rest[count:].view(packed["bytes"], count)
    distances = sum(plane << (8 * at) for at, plane in enumerate(places))
    queries = torch.arange(T).repeat_interleave(counts)
    keys = torch.where(distances == T, 0, (queries - distances) % T)
    pairs = list(zip(keys.tolist(), (weights / packed["levels"]).square().tolist(), strict=True))
    ends = counts.cumsum(0).tolist()
    return [pairs[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return [torch.rand(37, 37).tril() ** 3 * scale for scale in (1.0, 0.01)]


def test_pack_maps_cells_are_within_a_step(maps):
    packed = pack_maps(maps, bin_edges(37, 37).tolist(), 10**6)
    assert packed["levels"] == 255
    for head, cells in enumerate(maps):
        error = (read_map(packed, head) / cells.max()).sqrt() - (cells / cells.max()).sqrt()
        assert error.abs().max() <= 0.5001 / 255
        assert (read_map(packed, head)[cells == 0] == 0).all()


def test_pack_maps_gets_coarser_until_it_fits(maps):
    edges = bin_edges(100, 37).tolist()
    finest = sum(map(len, pack_maps(maps, edges, 10**6)["data"]))
    packed = pack_maps(maps, edges, finest // 6)
    assert sum(map(len, packed["data"])) <= finest // 6
    assert packed["levels"] < 255
    n = len(packed["edges"]) - 1
    assert n < 37
    assert packed["edges"] == [*edges[:-1:2], 100] if n == 19 else [*edges[:-1:4], 100]


def test_pack_maps_coarse_cell_is_the_mean_over_tokens(monkeypatch):
    """The mean is not over the merged cells, which have 2 or 3 tokens each."""
    monkeypatch.setattr(pack, "_MAPS", ((255, 1),))
    edges = bin_edges(100, 37).tolist()
    sizes = torch.tensor(edges).diff()
    stripes = (torch.arange(37) % 2 == 0).float().expand(37, 37)
    packed = pack_maps([stripes], edges, 10**6)
    assert packed["edges"] == [*edges[:-1:2], 100]
    even = torch.tensor([sizes[at] / sizes[at : at + 2].sum() for at in range(0, 37, 2)])
    assert len(even.unique()) >= 3
    assert torch.allclose(read_map(packed, 0), even.expand(19, 19), atol=0.01)


def test_pack_maps_fits_though_the_sample_does_not():
    """The sample is 20 of 41 heads, and these are empty."""
    torch.manual_seed(3)
    noise = torch.rand(32, 32)
    maps = [noise * (head % 2) for head in range(41)]
    budget = 20 * len(pack_maps([noise], range(33), 10**6)["data"][0])
    packed = pack_maps(maps, range(33), budget)
    assert sum(map(len, packed["data"])) <= budget
    assert packed["levels"] < 255


@pytest.mark.parametrize("T", [7, 300])
def test_pack_keys_keys_are_exact(T):
    torch.manual_seed(1)
    weights = torch.rand(T, T).tril() ** 8
    weights = weights / weights.sum(dim=1, keepdim=True)
    top = weights.topk(5)
    keys = top.indices.masked_fill(top.values == 0, -1)
    packed = pack_keys([keys], [top.values], 10**6)
    assert packed["least"] == 0.0
    for token, pairs in enumerate(read_keys(packed, 0, T)):
        kept = [k for k, w in zip(keys[token], top.values[token], strict=True) if w > 1e-5]
        assert [key for key, _ in pairs] == kept
        for (_, weight), exact in zip(pairs, top.values[token], strict=False):
            assert abs(weight**0.5 - exact.sqrt()) <= 0.5001 / 255


def test_pack_keys_keeps_later_keys():
    """A head without a causal mask attends to later keys."""
    keys = torch.tensor([[2, 0], [2, 1], [1, 2]])
    packed = pack_keys([keys], [torch.full((3, 2), 0.5)], 10**6)
    assert [[key for key, _ in pairs] for pairs in read_keys(packed, 0, 3)] == keys.tolist()


def test_pack_keys_drops_weak_keys_first():
    torch.manual_seed(2)
    weights = torch.rand(400, 8).sort(descending=True).values
    weights = weights / weights.sum(dim=1, keepdim=True)
    keys = torch.randint(400, (400, 8))
    everything = pack_keys([keys], [weights], 10**6)
    packed = pack_keys([keys], [weights], len(everything["data"][0]) // 3)
    assert len(packed["data"][0]) <= len(everything["data"][0]) // 3
    kept = [len(pairs) for pairs in read_keys(packed, 0, 400)]
    assert kept == (weights >= packed["least"]).sum(dim=1).tolist()
    assert packed["held"][0] == pytest.approx(
        weights[weights >= packed["least"]].sum().item() / 400, abs=1e-3
    )
    assert pack_keys([keys], [weights], 10) is None
