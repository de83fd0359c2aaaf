"""YaRN scaling against its formula in float64, and its errors."""

from __future__ import annotations

import math
import re

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, DtypeError
from polyhead.positions import YarnScaling


@pytest.mark.parametrize("theta", [10_000.0, 1e6])
@pytest.mark.parametrize("R", [24, 128])
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_angles_match_the_formula(truncate, R, theta):
    scaling = YarnScaling(3.7, 4096, beta_fast=29.0, beta_slow=1.5, truncate=truncate)
    exponents = torch.arange(0, R, 2, dtype=torch.float64) / R
    got, factor = scaling.frequencies(theta, exponents, torch.arange(3))

    def pair(beta):
        return R * math.log(4096 / (2 * math.pi * beta)) / (2 * math.log(theta))

    first, last = pair(29.0), pair(1.5)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    assert 0 < first < last < R // 2  # all three regions exist
    want = []
    for i in range(R // 2):
        ramp = min(max((i - first) / (last - first), 0.0), 1.0)
        want.append((1 - ramp + ramp / 3.7) * theta ** (-2 * i / R))
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=0)
    assert factor == pytest.approx(0.1 * math.log(3.7) + 1)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, 0.1 * math.log(4.0) + 1),
        ({"attention_factor": 1.0}, 1.0),
        ({"attention_factor": 0.7}, 0.7),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        (
            {"mscale": 0.7, "mscale_all_dim": 1.3},
            (0.07 * math.log(4.0) + 1) / (0.13 * math.log(4.0) + 1),
        ),
    ],
)
def test_yarn_scores_grow_by_the_square_of_the_factor(options, want):
    query, key = torch.randn(2, 1, 1, 1, 24, dtype=torch.float64)
    sharpened = ph.Rope(scaling=YarnScaling(4.0, 64, **options))
    as_is = ph.Rope(scaling=YarnScaling(4.0, 64, attention_factor=1.0))
    at_query, at_key = torch.tensor([100]), torch.tensor([37])
    scores = [(rope(query, at_query) * rope(key, at_key)).sum() for rope in (sharpened, as_is)]
    assert (scores[0] / scores[1]).item() == pytest.approx(want**2, rel=1e-12)


def test_yarn_factor_1_equals_plain_rope():
    x, positions = torch.randn(1, 2, 5, 24, dtype=torch.float64), torch.arange(5) + 1000
    got = ph.Rope(scaling=YarnScaling(1.0, 64))(x, positions)
    torch.testing.assert_close(got, ph.Rope()(x, positions), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    ["factor", "original_context", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"],
)
def test_yarn_nonpositive_argument_raises(name):
    options = {"factor": 4.0, "original_context": 64, name: -3.0}
    message = f"{name} must be positive and finite; got -3.0; change the scaling"
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        YarnScaling(**options)


@pytest.mark.parametrize("name", ["factor", "original_context", "beta_fast", "beta_slow"])
def test_yarn_argument_of_another_type_raises(name):
    with pytest.raises(DtypeError, match=f"^{name} must be a number; got None; "):
        YarnScaling(**{"factor": 4.0, "original_context": 64, name: None})


@pytest.mark.parametrize("beta_fast", [1.5, 1.0, math.inf, math.nan])
def test_yarn_betas_out_of_order_raise(beta_fast):
    message = f"beta_fast must be finite and above beta_slow = 1.5; got {beta_fast}; 32.0"
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}"):
        YarnScaling(4.0, 64, beta_fast=beta_fast, beta_slow=1.5)


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"mscale": 0.7}, "mscale = 0.7, mscale_all_dim = None"),
        ({"mscale_all_dim": 0.7}, "mscale = None, mscale_all_dim = 0.7"),
    ],
)
def test_yarn_one_mscale_without_the_other_raises(options, got):
    message = f"mscale must come with mscale_all_dim; got {got}; pass both or neither"
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        YarnScaling(4.0, 64, **options)


def test_yarn_attention_factor_with_mscales_raises():
    message = "attention_factor must be None if the mscales are given; got 1.2; pass one of them"
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        YarnScaling(4.0, 64, attention_factor=1.2, mscale=1.0, mscale_all_dim=1.0)


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_yarn_theta_of_at_most_1_raises(theta):
    message = f"theta must be above 1 for YaRN; got {theta}; 10000.0 is usual"
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        ph.Rope(theta=theta, scaling=YarnScaling(4.0, 64))(torch.ones(1, 1, 2, 4), torch.arange(2))
