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
        ({"mass_recent": 0.5, "mass_sinks": 0.9}, "local"),
        ({"mass_first": 0.29, "mass_recent": 0.49, "mass_sinks": 0.5}, "multiple sinks"),
        ({"mass_first": 0.31, "mass_recent": 0.49, "mass_sinks": 0.5}, "other"),
        ({"mass_first": 0.2, "mass_recent": 0.49, "mass_sinks": 0.49}, "other"),
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
    """Queries and keys of planted heads: one per kind, and one "other" that retrieves a token."""
    D = max(V, T)
    mha = ph.MultiHeadAttention(
        2 * V + T, 8, T, 0.0, num_heads=7, head_dim=D, value_head_dim=2, scale=1.0
    )
    here, before, place = slice(0, V), slice(V, 2 * V), slice(2 * V, 2 * V + T)
    W_query, W_key = torch.zeros(2, 7, D, 2 * V + T)
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
    W_query[5, 0, place] = sharp  # three places of the text, from all others
    W_key[5, 0, 2 * V + torch.tensor([0, 9, 30])] = 1.0
    W_query[6, :T, place] = sharp * torch.eye(T)  # the token 40 before: one key, never the same
    W_key[6, :T, place] = torch.eye(T).roll(40, dims=0).tril()
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
    kinds = ["previous token", "induction", "sink", "local", "other", "multiple sinks", "other"]
    assert names == kinds
    assert layer.of_head(5)["mass_sinks"] > 0.95
    assert layer.of_head(5)["mass_first"] < 0.5
    assert layer.of_head(1)["mass_induction"] > 0.99
    assert layer.of_head(0)["mass_previous"] > 0.95  # the first token has none before it


@pytest.mark.parametrize("n_keys", [1, 8, 100])
def test_mass_sinks_is_exact_where_few_keys_matter(n_keys):
    """Against the weights written out; the number of kept keys changes nothing."""
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(1)).repeat(5)
    (layer,) = ph.look.capture(planted(), ids, weights=True, n_keys=n_keys).layers
    assert layer.weights is not None
    columns = layer.weights.sum(dim=1).topk(4, dim=-1).values.sum(dim=-1) / len(ids)
    for head in (2, 5):  # of few keys each
        assert layer.of_head(head)["mass_sinks"] == pytest.approx(columns[head].item(), abs=0.01)
    for head in (0, 1, 3, 4, 6):  # of more than eight keys at times: a lower bound
        assert layer.of_head(head)["mass_sinks"] <= columns[head].item() + 1e-6


@pytest.mark.parametrize("T", [2, 8, 16, 17, 24, 48, 100, 120])
def test_name_head_even_weights_are_never_sinks(T):
    """Derived: of even weights half is on four tokens only where the last 16 have all the rest."""
    even = ph.MultiHeadAttention(8, 8, T, 0.0, num_heads=1)
    (layer,) = ph.look.capture(even, torch.zeros(1, T, 8)).layers
    stats = layer.of_head(0)
    assert ph.look.name_head(stats) in ("sink", "previous token", "local", "other")
    assert T > 16 or stats["mass_recent"] == pytest.approx(1.0)
    assert stats["mass_sinks"] < 0.5 or stats["mass_recent"] > 0.9
