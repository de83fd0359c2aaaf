"""Head kinds: thresholds, and heads with planted weights."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph

V, T = 23, 120


@pytest.mark.parametrize(
    ("stats", "name"),
    [
        ({"mass_induction": 0.4, "mass_previous": 0.9}, "induction"),
        ({"mass_induction": 0.39, "mass_previous": 0.4, "mass_first": 0.5}, "previous token"),
        ({"mass_previous": 0.39, "mass_first": 0.5, "mass_recent": 0.9}, "sink"),
        ({"mass_first": 0.49, "mass_recent": 0.5}, "local"),
        ({"mass_first": 0.49, "mass_recent": 0.49}, "other"),
    ],
)
def test_name_head_returns_the_first_rule_that_holds(stats, name):
    nothing = {"mass_first": 0.0, "mass_previous": 0.0, "mass_recent": 0.0}
    assert ph.look.name_head(nothing | stats) == name


class Reader(torch.nn.Module):
    """Features of each token for planted heads: its id, the previous id, its position."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, ids):
        here = torch.nn.functional.one_hot(ids, V).float()
        before = torch.nn.functional.pad(here, (0, 0, 1, 0))[:, :-1]
        places = torch.eye(T)[: ids.shape[1]].expand(ids.shape[0], -1, -1)
        return self.attend(torch.cat([here, before, places], dim=-1))


def planted():
    """Queries and keys of four planted heads, one per kind."""
    D = max(V, T)
    mha = ph.MultiHeadAttention(
        2 * V + T, 8, T, 0.0, num_heads=5, head_dim=D, value_head_dim=2, scale=1.0
    )
    here, before, place = slice(0, V), slice(V, 2 * V), slice(2 * V, 2 * V + T)
    W_query, W_key = torch.zeros(2, 5, D, 2 * V + T)
    sharp = 12.0
    W_query[0, :T, place] = sharp * torch.eye(T)  # the previous position
    W_key[0, :T, place] = torch.eye(T).roll(1, dims=0)
    W_query[1, :V, here] = sharp * torch.eye(V)  # the token after the same one
    W_key[1, :V, before] = torch.eye(V)
    W_query[2, 0, place] = sharp  # the first place
    W_key[2, 0, 2 * V] = 1.0
    W_query[3, :T, place] = sharp * torch.eye(T)  # the last eight positions evenly
    for back in range(8):
        W_key[3, :T, place] += torch.eye(T).roll(back, dims=0).tril()
    with torch.no_grad():  # head 4 is uniform
        mha.W_query.weight.copy_(W_query.flatten(0, 1))
        mha.W_key.weight.copy_(W_key.flatten(0, 1))
    return Reader(mha)


def test_name_head_recognizes_planted_heads():
    generator = torch.Generator().manual_seed(1)
    once = torch.randperm(V, generator=generator)
    ids = once.repeat(5)
    (layer,) = ph.look.capture(planted(), ids).layers
    names = [ph.look.name_head(layer.of_head(head)) for head in layer.heads]
    assert names == ["previous token", "induction", "sink", "local", "other"]
    assert layer.of_head(1)["mass_induction"] > 0.99
    assert layer.of_head(0)["mass_previous"] > 0.95  # the first token has none before it
