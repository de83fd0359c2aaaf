"""parametrize_with_laws: one test per law, with declared failures."""

import pytest
from torch import nn

import polyhead as ph
from polyhead.check import parametrize_with_laws


def torch_module():
    return nn.MultiheadAttention(20, 4, batch_first=True)


LAWS = ["no_future_leak", "batch_rows_are_independent", "hidden_tokens_have_no_influence"]


@parametrize_with_laws(torch_module, only=LAWS, causal=True)
def test_laws_hold(law):
    law()


@parametrize_with_laws(
    torch_module,
    only=["past_is_used", "window_counts_its_tokens"],
    window=2,
    expected_failures={"window_counts_its_tokens": "it has none"},
)
def test_declared_failure_is_expected(law):
    law()


def test_broken_law_fails_with_its_counterexample():
    only = ["past_is_used", "window_counts_its_tokens"]
    mark = parametrize_with_laws(torch_module, only=only, window=2)
    past, window = (parameter.values[0] for parameter in mark.args[1])
    past()
    with pytest.raises(pytest.fail.Exception, match="the last token attends to"):
        window()


def test_declared_failure_of_unknown_law_raises():
    with pytest.raises(ph.errors.ArgumentError, match="got no_such_law"):
        parametrize_with_laws(torch_module, expected_failures={"no_such_law": "because"})
