"""check_function: right functions pass, and every law has a broken twin."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.check import check_function
from polyhead.check.laws import FUNCTION_LAWS
from polyhead.check.probe.target import load

FUNCTIONS = load(f"{Path(__file__).parent / 'broken' / 'functions'}.py:__dict__")

# Laws without a function of their own are listed after a function that also breaks them.
TWINS = {
    "no_scale": "plain_calls_are_right",
    "off_by_one": "causal_calls_are_right",
    "between": "causal_alignment",
    "inverted": "boolean_masks_are_right",
    "numbers_as_booleans": "additive_masks_are_right",
    "nan_rows": "empty_rows_stay_finite",
    "tiled": "gqa_matches_reference",
    "cuts_values": "values_may_have_another_size",
    "drops_scale": "scale_is_obeyed",
    "wrong_softcap": "softcap_is_obeyed",
    "overflowing": "extreme_values_stay_right",
    "over_heads": "rows_and_heads_do_not_mix",
    "drops_causal": "every_argument_counts",
    "unscaled_dropout": "dropout_keeps_the_mean",
    "always_float32": "dtype_is_preserved",
    "in_place": "inputs_are_not_modified",
    "detached": "gradients_are_right",
}


@pytest.mark.parametrize(("name", "law"), TWINS.items())
def test_broken_function_breaks_its_law(name, law):
    report = check_function(FUNCTIONS[name])
    assert law in [failure.law for failure in report.failures], report


def test_every_function_law_has_a_broken_twin():
    assert set(TWINS.values()) == FUNCTION_LAWS.keys()


BACKENDS = [b.name for b in ph.backends() if b.name != "flex"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "function",
    [
        FUNCTIONS["right"],
        F.scaled_dot_product_attention,
        ph.attention,
        *(pytest.param(b, id=b) for b in BACKENDS),
    ],
)
def test_right_functions_break_no_law(function, seed):
    if isinstance(function, str):
        run = partial(ph.attention, backend=(function, "reference"))
        run.__module__ = "polyhead.functional"
        function = run
    report = check_function(function, seed=seed)
    assert report.ok, report


def test_counterexample_is_shrunk():
    report = check_function(FUNCTIONS["no_scale"], only=["plain_calls_are_right"])
    message = report.failures[0].verdict.message
    assert message.startswith("B=1 H=1 G=1 T=1 S=2 D=2 E=1") or "T=1" in message


def test_dropout_argument_may_be_a_layer():
    def annotated(query, key, value, dropout=None):
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        return (weights if dropout is None else dropout(weights)) @ value

    assert check_function(annotated).ok
    ignored = lambda query, key, value, dropout=None: annotated(query, key, value)  # noqa: E731
    assert not check_function(ignored, only=["dropout_keeps_the_mean"]).ok


def test_function_with_tokens_first_passes():
    def turned(query, key, value, is_causal=False):
        heads = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(*heads, is_causal=is_causal).transpose(1, 2)

    assert check_function(turned, layout="tokens first").ok
    assert not check_function(turned).ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_true": "keep"}, 'mask_true must be "attend" or "ignore"; got \'keep\''),
        ({"layout": "BTHD"}, 'layout must be "heads first" or "tokens first"; got \'BTHD\''),
        ({"only": ["no_such_law"]}, "got no_such_law; choose among these"),
    ],
)
def test_check_function_with_wrong_argument_raises(options, message):
    with pytest.raises(ph.errors.ArgumentError) as caught:
        check_function(torch.nn.functional.scaled_dot_product_attention, **options)
    assert message in str(caught.value)
