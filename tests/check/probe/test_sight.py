"""Attention patterns, found from observed masks."""

from pathlib import Path

import pytest
import torch

from polyhead.check import check_module
from polyhead.check.probe.sight import band, fitting
from polyhead.check.probe.target import load

AROUND = load(f"{Path(__file__).parents[1] / 'right/around'}.py:__dict__")
SEEING = {name: kind for name, kind in AROUND.items() if "sees" in getattr(kind, "__dict__", {})}
LAWS = [
    "past_is_used",
    "permutation_equivariant",
    "output_matches_reference",
    "window_counts_its_tokens",
    "no_future_leak_in_long_texts",
]


@pytest.mark.parametrize("name", SEEING)
def test_attention_pattern_is_found_and_judged(name):
    torch.manual_seed(0)
    report = check_module(SEEING[name](), only=LAWS)
    assert report.ok, report
    how = "observed in sequences of"
    assert report.facts["window"].startswith(f"{SEEING[name].sees} ({how}"), report.facts


def test_fitting_requires_one_window_for_all_lengths():
    seen = {T: band(T, True, 4) for T in (7, 13)}
    pattern = fitting(seen, causal=True)
    assert pattern.window == 4
    assert pattern.words == "3 tokens back"
    assert fitting({7: band(7, True, 4), 13: band(13, True, 5)}, causal=True) is None


def test_fitting_of_a_full_mask_is_none():
    assert fitting({7: band(7, True, None), 13: band(13, True, None)}, causal=True) is None


@pytest.mark.parametrize(
    "shown",
    [
        lambda t, s: t == s,
        lambda t, s: s < t,
        lambda t, s: (s <= t) & ((s > 0) | (t == 0)),
        lambda t, s: (s <= t) & (t - s != 1),
        lambda t, s: (s <= t) & (t - s < t.max()),
    ],
    ids=["itself alone", "not itself", "not the first", "not the one before", "not the very first"],
)
def test_fitting_of_a_wrong_mask_is_none(shown):
    seen = {T: shown(torch.arange(T)[:, None], torch.arange(T)) for T in (7, 13, 67)}
    assert fitting(seen, causal=True) is None


def test_layer_window_of_none_overrides_its_configuration():
    class Layer(AROUND["Divided"]):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"sliding_window": 4})()
            self.sliding_window = None

    torch.manual_seed(0)
    report = check_module(Layer(), only=LAWS)
    assert report.ok, report
    assert "window" not in report.facts


def test_window_longer_than_tried_sequences_is_not_judged():
    class Long(AROUND["Divided"]):
        sliding_window = 4096

    torch.manual_seed(0)
    report = check_module(Long(), only=LAWS)
    law = next(r for r in report.results if r.law == "window_counts_its_tokens")
    assert law.verdict.message == "its window of 4096 is long: make one of 8"
    assert law.seconds < 5
