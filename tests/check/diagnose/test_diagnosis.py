"""Diagnosis: every law has broken twins, caught by that law with the right cause."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from polyhead.check import check_module
from polyhead.check.laws import MODULE_LAWS
from polyhead.check.probe.target import load

BROKEN = Path(__file__).parents[1] / "broken"
FILES = (
    "masks",
    "positions",
    "softmax",
    "heads",
    "modes",
    "numbers",
    "caches",
    "learned",
    "teaching",
)


def classes(file):
    """Modules defined in one of the files of broken attentions."""
    module = load(f"{BROKEN / file}.py:__dict__")
    kinds = [kind for name, kind in module.items() if inspect.isclass(kind) and name[0] != "_"]
    own = [kind for kind in kinds if kind.__module__ == module["__name__"]]
    return [kind for kind in own if issubclass(kind, nn.Module)]


ALL = [kind for file in FILES for kind in classes(file)]
WRONG = [kind for kind in ALL if "law" in vars(kind)]
SOUND = [kind for kind in ALL if not hasattr(kind, "law")]


# Laws that the diagnosis reads.
PATTERNS = {
    "cache_in_chunks_agrees",
    "cache_token_by_token_agrees",
    "causal_in_every_mode",
    "contexts_are_weighted_means",
    "dropout_drops_weights",
    "dropout_is_unbiased",
    "evaluation_repeats",
    "heads_are_independent",
    "half_precision_is_close_to_float64",
    "hidden_tokens_have_no_influence",
    "identical_tokens_agree",
    "inputs_are_not_modified",
    "kv_heads_are_shared_in_order",
    "mask_survives_large_scores",
    "no_future_leak",
    "output_matches_reference",
    "permutation_equivariant",
    "parameters_are_filled",
    "past_is_used",
    "positions_tell_order",
    "relative_positions_are_relative",
    "shown_tokens_keep_their_influence",
    "window_counts_its_tokens",
}


def check(kind, **options):
    torch.manual_seed(0)
    return check_module(kind(), make=kind, **getattr(kind, "flags", {}), **options)


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_broken_twin_breaks_its_law_with_its_cause(kind):
    report = check(kind, only={kind.law} | PATTERNS)
    assert kind.law in [failure.law for failure in report.failures], report
    assert any(kind.cause in cause for cause in report.diagnosis) or not kind.cause, report


@pytest.mark.parametrize("kind", SOUND, ids=lambda kind: kind.__name__)
def test_base_of_broken_twins_breaks_no_law(kind):
    report = check(kind)
    assert report.ok, report


def test_every_module_law_has_a_broken_twin():
    judged = MODULE_LAWS.keys() - {"memory_growth", "compiled_agrees"}
    assert judged - {kind.law for kind in WRONG} == set()
    assert len(WRONG) >= 30
