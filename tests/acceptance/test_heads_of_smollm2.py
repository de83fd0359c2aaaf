"""The default model's own heads, by their statistics and by what is lost without them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import polyhead as ph

N = 64


@pytest.fixture(scope="module")
def seen(smollm2):
    """The model, random tokens that come twice, and what its heads do on them."""
    ph.integrations.transformers.register()
    once = torch.randint(1000, 20_000, (N,), generator=torch.Generator().manual_seed(5))
    ids = torch.cat([torch.tensor([1]), once, once])
    return smollm2.model, ids, ph.look.capture(smollm2.model, ids)


def heads_called(report, name):
    return [(row["layer"], row["head"]) for row in report.rows() if row["name"] == name]


def loss_of_the_repetition(model, ids):
    logits = model(ids, use_cache=False).logits[0, N + 1 : -1]
    return F.cross_entropy(logits, ids[0, N + 2 :])


@torch.no_grad()
def test_without_its_induction_heads_it_cannot_repeat(seen):
    model, ids, report = seen
    induction = heads_called(report, "induction")
    assert 4 <= len(induction) <= 16
    rows = [row for row in report.rows() if row["name"] != "induction"]
    others = []
    for layer, _ in induction:  # as many other heads of the same layers
        beside = [(row["layer"], row["head"]) for row in rows if row["layer"] == layer]
        others.append(next(head for head in beside if head not in others))

    def loss_without(heads):
        with ph.look.ablate(model, heads):
            return loss_of_the_repetition(model, ids[None]).item()

    # A guess among all tokens that could come is log(19000) = 9.9.
    assert loss_without([]) < 3.0
    assert loss_without(others) < 4.0
    assert loss_without(induction) > 9.0


@torch.no_grad()
def test_they_read_what_a_previous_token_head_wrote(seen):
    model, ids, report = seen
    first = max(report.rows(), key=lambda row: row["mass_previous"])
    assert first["name"] == "previous token"
    with ph.look.ablate(model, [(first["layer"], first["head"])]):
        assert loss_of_the_repetition(model, ids[None]) > 6.0
        without = ph.look.capture(model, ids)
    induction = heads_called(report, "induction")
    assert min(layer for layer, _ in induction) > first["layer"]
    assert not {*heads_called(without, "induction")} & {*induction}


@torch.no_grad()
def test_heads_that_rest_on_the_first_token_are_not_missed(seen):
    model, ids, report = seen
    rows = sorted(report.rows(), key=lambda row: -row["mass_first"])[:20]
    assert {row["name"] for row in rows} == {"sink"}
    whole = loss_of_the_repetition(model, ids[None])
    with ph.look.ablate(model, [(row["layer"], row["head"]) for row in rows], how="mean"):
        without = loss_of_the_repetition(model, ids[None])
    assert abs(without - whole) < 0.2
    induction = heads_called(report, "induction")
    with ph.look.ablate(model, induction, how="mean"):
        assert loss_of_the_repetition(model, ids[None]) > whole + 5.0


def test_a_head_that_is_missed_is_found(seen):
    model, ids, report = seen
    strongest = max(report.rows(), key=lambda row: row["mass_induction"])
    sink = max(report.rows(), key=lambda row: row["mass_first"])
    heads = [(row["layer"], row["head"]) for row in (sink, strongest)]
    found = ph.look.head_importance(model, ids, heads=heads, loss=loss_of_the_repetition)
    assert found.ranked == heads[::-1]


@torch.no_grad()
def test_pruned_it_says_what_it_says_ablated(smollm2, seen):
    _, ids, _ = seen
    model = copy.deepcopy(smollm2.model)
    group = {(18, head) for head in (6, 7, 8)}  # the three that share key head 2
    with ph.look.ablate(model, group):
        want = model(ids[None], use_cache=False).logits
    ph.look.prune(model, group)
    torch.testing.assert_close(model(ids[None], use_cache=False).logits, want, rtol=1e-3, atol=1e-3)
