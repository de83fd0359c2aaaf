"""JSON data of the page."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError
from polyhead.look.page import payload


def test_payload_has_heads_kinds_and_numbers(planted):
    report = planted()
    data = payload(report)
    rows = report.rows()
    assert data["heads"] == [[row["layer"], row["head"]] for row in rows]
    assert data["kinds"] == ["previous token", "sink", "other", "induction", "local", "sink"]
    assert data["numbers"]["entropy"] == [float(f"{row['entropy']:.4g}") for row in rows]
    assert set(data["kinds"]) <= set(data["legend"]["kinds"])
    assert data["numbers"].keys() == data["legend"]["numbers"].keys()
    assert data["tokens"] == list(report.tokens)


def test_legend_explains_every_statistic():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(7, 8), ph.MultiHeadAttention(8, 8, 16, 0.0, num_heads=2)
    )
    report = ph.look.capture(model, torch.tensor([1, 2, 3, 1, 2]))
    data = payload(report)
    assert data["numbers"].keys() == report.layers[0].stats.keys()
    assert data["tokens"] == [" #1", " #2", " #3", " #1", " #2"]


def test_payload_has_keys_only_if_maps_are_pooled(planted):
    assert payload(planted())["keys"] is None
    pooled = payload(planted(bins=8))
    assert len(pooled["maps"]["edges"]) == 9
    assert pooled["keys"]["given"] == 8


@pytest.mark.parametrize("budget", [20_000, 40_000, 100_000])
def test_payload_fits_the_budget(large, budget):
    report = large(300, layers=2, heads=5)
    length = len(json.dumps(payload(report, budget=budget)))
    assert 0.5 * budget < length <= budget + 500
    assert len(json.dumps(payload(report))) > 110_000


def test_payload_writes_nan_and_inf_as_null(planted):
    report = planted()
    layer = report.layers[0]
    stats = layer.stats | {"max_logit": torch.tensor([-torch.inf, torch.nan, 1.0])}
    broken = replace(layer, stats=stats, map=layer.map.masked_fill(layer.map > 0.5, torch.nan))
    data = payload(replace(report, layers=(broken,)))
    json.dumps(data, allow_nan=False)
    assert data["numbers"]["max_logit"] == [None, None, 1.0]


def test_payload_leaves_out_layers_of_other_tokens(planted):
    report = planted()
    crossed = replace(report.layers[1], name="cross", map=torch.rand(3, 96, 20))
    data = payload(replace(report, layers=(report.layers[0], crossed)))
    assert data["left_out"] == ["cross"]
    assert data["heads"] == [[0, 0], [0, 1], [0, 2]]
    message = "must have a layer that attends to the text itself; got 1 layers"
    with pytest.raises(ArgumentError, match=message):
        payload(replace(report, layers=(crossed,)))


def test_payload_refuses_tokens_of_another_text(planted):
    report = planted()
    with pytest.raises(ArgumentError, match=r"must be one for each of the 96 tokens .* got 2"):
        payload(replace(report, tokens=("a", "b")))
