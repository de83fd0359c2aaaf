"""A report with known heads, and a session of a tiny model."""

import asyncio

import pytest
import torch

from polyhead.look import HeadReport, LayerReport

#       0      1       2      3     4       5      6
WORDS = ("Sir", " Tom", " met", " a", " Sir", " Tom", " there")


def keys_of(pairs):
    """Keys and weights, (T, 2): each query's planted key, then the first token."""
    keys = torch.tensor([[0, -1]] * len(WORDS))
    weights = torch.tensor([[0.4, 0.0]] * len(WORDS))
    for query, key, weight in pairs:
        keys[query] = torch.tensor([key, 0])
        weights[query] = torch.tensor([weight, 1 - weight])
    return keys, weights


@pytest.fixture
def report():
    """Two layers of two heads: induction and previous token; sink and local."""
    shares = ("mass_first", "mass_previous", "mass_recent", "mass_induction", "effective_keys")
    heads = {
        (0, 0): (
            (0.2, 0.1, 1.0, 0.9, 1.4),
            [(0, 5, 0.98), (4, 1, 0.7), (5, 2, 0.93), (6, 0, 0.99)],
        ),
        (0, 1): ((0.1, 0.8, 1.0, 0.0, 1.6), [(1, 0, 0.99), (2, 1, 0.6), (3, 2, 0.8)]),
        (1, 0): ((0.9, 0.1, 1.0, 0.0, 1.1), [(2, 0, 0.97), (5, 0, 0.95), (6, 1, 0.99)]),
        (1, 1): ((0.1, 0.2, 1.0, 0.1, 3.2), [(3, 3, 0.9), (5, 3, 0.5), (6, 0, 0.6)]),
    }
    layers = []
    for layer in (0, 1):
        numbers, pairs = zip(*(heads[layer, head] for head in (0, 1)), strict=True)
        keys, weights = zip(*map(keys_of, pairs), strict=True)
        stats = dict(zip(shares, torch.tensor(numbers).unbind(1), strict=True))
        maps = torch.full((2, 7, 7), 1 / 7)
        layers.append(
            LayerReport(
                layer,
                f"layers.{layer}",
                (0, 1),
                stats,
                maps,
                torch.stack(keys),
                torch.stack(weights),
            )
        )
    ids = torch.tensor([1, 2, 3, 4, 1, 2, 5])
    return HeadReport("a model", WORDS, ids, tuple(layers))


@pytest.fixture
def session(tiny_model):
    """Session of a tiny model, limited to 20 tokens."""
    from polyhead.viewer.session import Session

    return Session(tiny_model, "the cat sat on a mat and the", most=20)


@pytest.fixture
def own_loop():
    """Playwright leaves its event loop running in the main thread."""
    theirs = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    yield
    asyncio._set_running_loop(theirs)
