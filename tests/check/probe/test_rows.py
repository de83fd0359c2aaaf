"""Row order of a fused weight: learned, without hiding mistakes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from polyhead.check import Outcome, check_module
from polyhead.check.law import NotApplicable
from polyhead.check.module import find_subject
from polyhead.check.probe.core import core_of
from polyhead.check.probe.rows import learned_rows
from polyhead.check.probe.target import load

ORDERS = load(f"{Path(__file__).parents[1] / 'right/row_orders'}.py:CLASSES")
AROUND = load(f"{Path(__file__).parents[1] / 'right/around'}.py:__dict__")
CLAIMS = ("d_in", "window", "positions", "num_heads", "max_tokens", "scale")


def subject_of(module):
    return find_subject(module, dict.fromkeys(CLAIMS))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ORDERS)
def test_rows_of_any_order_are_learned(name, causal):
    torch.manual_seed(0)
    module = ORDERS[name]()
    module.causal = causal
    rows = learned_rows(subject_of(module))
    assert rows.scale == pytest.approx(6**-0.5, rel=1e-9)
    # The learned rows are those that the module reads.
    numbers = torch.arange(float(module.qkv_proj.out_features))
    query, key, value = (t[0, :, 0] for t in module.cut(numbers[None, None]))
    group = len(query) // len(key)
    key, value = (t.repeat_interleave(group, dim=0) for t in (key, value))
    pairs = set(zip(rows.query.flatten().tolist(), rows.key.flatten().tolist(), strict=True))
    assert pairs == set(zip(query.flatten().tolist(), key.flatten().tolist(), strict=True))
    assert rows.value.tolist() == value.tolist()


LAWS = [
    "output_matches_reference",
    "gradients_match_reference",
    "heads_are_independent",
    "kv_heads_are_shared_in_order",
    "contexts_are_weighted_means",
]


@pytest.mark.parametrize("name", ORDERS)
def test_rows_of_any_order_break_no_law(name):
    torch.manual_seed(0)
    report = check_module(ORDERS[name](), only=LAWS)
    assert report.ok, report
    assert {r.law: r.verdict.outcome for r in report.results}[LAWS[0]] is Outcome.HOLDS
    assert {r.law: r.verdict.outcome for r in report.results}[LAWS[1]] is Outcome.HOLDS


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDERS)
def test_rows_of_any_order_pass_all_laws(name):
    for seed in range(2):
        torch.manual_seed(seed)
        report = check_module(ORDERS[name](), make=ORDERS[name], seed=seed)
        assert report.ok, report


def test_row_order_is_reported():
    torch.manual_seed(0)
    report = check_module(ORDERS["GroupsKVQ"](), only=LAWS[:1])
    assert report.results[0].verdict.message == "rows: k0 v0 q0 q1 k1 v1 q2 q3"


@pytest.mark.parametrize("name", ["RolesKVQ", "HeadsFeaturesRoles", "GroupsQKV"])
@pytest.mark.parametrize(("factor", "cause"), [(6**0.5, "missing scale"), (0.9, "wrong scale")])
def test_rows_of_another_order_with_wrong_scale_are_caught(name, factor, cause):
    class Scaled(ORDERS[name]):
        def __init__(self):
            super().__init__()
            cut = self.cut
            self.cut = lambda fused: [
                t * f for t, f in zip(cut(fused), (factor, 1, 1), strict=True)
            ]

    torch.manual_seed(0)
    report = check_module(Scaled(), only=LAWS[:1])
    assert cause in report.diagnosis[0]


def test_rows_split_by_a_view_are_not_learned():
    class View(ORDERS["RolesKVQ"]):
        def __init__(self):
            super().__init__()
            self.cut = lambda fused: [
                t.reshape(t.shape[0], 4, t.shape[1], -1) for t in fused.chunk(3, dim=-1)
            ]

    torch.manual_seed(0)
    report = check_module(View())
    assert "no_future_leak" in [failure.law for failure in report.failures]
    with pytest.raises(NotApplicable):
        learned_rows(subject_of(View()))


WRAPPED = {name: kind for name, kind in AROUND.items() if "words" in getattr(kind, "__dict__", {})}


@pytest.mark.parametrize("name", WRAPPED)
def test_operations_without_weights_are_reported(name):
    torch.manual_seed(0)
    report = check_module(WRAPPED[name](), only=LAWS)
    assert report.ok, report
    assert WRAPPED[name].words in report.results[0].verdict.message


@pytest.mark.parametrize("name", ["UnitQueriesAndKeys", "StandardQueriesAndKeys"])
def test_normalized_queries_and_keys_are_not_judged(name):
    torch.manual_seed(0)
    report = check_module(AROUND[name](), only=LAWS[:1])
    assert report.results[0].verdict.outcome is Outcome.NOT_APPLICABLE
    assert "not products of the projected queries and keys" in report.results[0].verdict.message


def test_position_bias_in_scores_is_not_applicable():
    class Biased(AROUND["HalfResidual"]):
        def between(self, heads):
            place = torch.arange(heads.shape[2], dtype=heads.dtype)[:, None]
            return torch.cat([heads, 0 * heads[..., :1] + place], dim=-1)

    torch.manual_seed(0)
    with pytest.raises(NotApplicable, match="a part that depends on no query and key"):
        learned_rows(subject_of(Biased()))


def test_unnamed_positions_break_no_law():
    torch.manual_seed(0)
    report = check_module(AROUND["TurnedElsewhere"](), only=["permutation_equivariant", *LAWS])
    assert report.ok, report


def test_core_of_a_linear_layer_is_not_applicable():
    with pytest.raises(NotApplicable, match="no product of weights and values"):
        core_of(subject_of(nn.Linear(8, 8)))
