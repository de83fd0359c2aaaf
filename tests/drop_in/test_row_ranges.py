"""Ranges of keys as rules: never another mask than the given one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.drop_in.row_ranges import EVERYTHING, rule_of_ranges

mask = ph.mask


def _ranges(allowed: torch.Tensor) -> torch.Tensor | None:
    """(B, T, 2) of a bool (B, T, S), by counting: it shares no code with the kernel."""
    S = allowed.shape[-1]
    rows = []
    for row in allowed.flatten(0, 1).tolist():
        keys = [s for s in range(S) if row[s]]
        if keys and keys != list(range(keys[0], keys[-1] + 1)):
            return None
        rows.append([keys[0], keys[-1] + 1] if keys else [0, 0])
    return torch.tensor(rows).view(*allowed.shape[:2], 2)


def _materialized(rule: ph.mask.Mask | str, B: int, T: int, S: int) -> torch.Tensor:
    if rule is EVERYTHING:
        return torch.ones(B, T, S, dtype=torch.bool)
    full = rule.materialize(T, S)
    return (full[:, 0] if full.ndim == 4 else full).expand(B, T, S)


KNOWN = {
    "causal()": (3, 5, lambda: mask.causal()),
    'causal(align="start")': (3, 5, lambda: mask.causal(align="start")),
    "causal() & window(before=2)": (7, 7, lambda: mask.causal() & mask.window(before=2)),
    "window(before=1, after=2)": (7, 7, lambda: mask.window(before=1, after=2)),
    "window(after=2)": (7, 7, lambda: mask.window(after=2)),
    "lengths([3, 5])": (4, 7, lambda: mask.lengths([3, 5])),
    "left_padding([2, 0])": (4, 7, lambda: mask.left_padding([2, 0])),
    "causal() & lengths([3, 7])": (7, 7, lambda: mask.causal() & mask.lengths([3, 7])),
    "causal() & left_padding([2, 0])": (7, 7, lambda: mask.causal() & mask.left_padding([2, 0])),
    "prefix(3)": (4, 7, lambda: mask.prefix(3)),
    "causal() | prefix(3)": (7, 7, lambda: mask.causal() | mask.prefix(3)),
    "documents([0, 0, 1, 1, 1, 2])": (6, 6, lambda: mask.documents([4, 4, 2, 2, 2, 3])),
    "causal() & documents([0, 0, 0, 1, 1, 2])": (
        6,
        6,
        lambda: mask.causal() & mask.documents([0, 0, 0, 1, 1, 2]),
    ),
    "(causal() | prefix(3)) & lengths([7, 5])": (
        7,
        7,
        lambda: (mask.causal() | mask.prefix(3)) & mask.lengths([7, 5]),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_rule_of_ranges_names_the_rules_of_people(name):
    T, S, build = KNOWN[name]
    full = build().materialize(T, S)
    allowed = full[:, 0].expand(-1, T, S) if full.ndim == 4 else full[None]
    rule = rule_of_ranges(_ranges(allowed), T, S, len(allowed))
    assert repr(rule) == name


def test_rule_of_ranges_of_all_keys_is_everything():
    assert rule_of_ranges(torch.tensor([[[0, 5]]]), 3, 5, 2) is EVERYTHING


def test_rule_of_ranges_of_one_batch_row_serves_all():
    rule = rule_of_ranges(torch.tensor([[[2, 5]]]), 3, 5, 4)
    assert repr(rule) == "left_padding([2, 2, 2, 2])"


@pytest.mark.parametrize(
    "rows", [[[0, 3], [1, 2], [0, 3]], [[1, 2], [0, 1], [2, 3]], [[0, 1], [0, 3], [0, 2]]]
)
def test_rule_of_ranges_without_a_rule_is_none(rows):
    assert rule_of_ranges(torch.tensor([rows]), 3, 3, 1) is None


_SIZES = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))


@st.composite
def _structured(draw):
    """A mask of the algebra, of random sizes, and where it has ranges some rows changed."""
    B, T, S = draw(_SIZES)
    if draw(st.booleans()):
        S = T
    align = draw(st.sampled_from(["end", "start"]))
    length = st.lists(st.integers(0, S), min_size=B, max_size=B)
    rules = {
        "causal": lambda: mask.causal(align),
        "window": lambda: mask.window(
            draw(st.integers(0, 4)), draw(st.integers(0, 4)), align=align
        ),
        "before": lambda: mask.window(before=draw(st.integers(0, 4)), align=align),
        "lengths": lambda: mask.lengths(draw(length)),
        "padding": lambda: mask.left_padding(draw(length)),
        "prefix": lambda: mask.prefix(draw(st.integers(0, S))),
        "joined": lambda: mask.causal(align) | mask.prefix(draw(st.integers(0, S))),
        "documents": lambda: mask.documents(
            torch.tensor(draw(st.lists(st.integers(0, 2), min_size=S, max_size=S))).cumsum(0)
        ),
    }
    names = [name for name in rules if name != "documents" or T <= S]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    allowed = torch.ones(B, T, S, dtype=torch.bool)
    for name in chosen:
        allowed = allowed & _materialized(rules[name](), B, T, S)
    if draw(st.booleans()):
        at = draw(st.tuples(*(st.integers(0, size - 1) for size in (B, T, S))))
        allowed = allowed.clone()
        allowed[at] = ~allowed[at]
    return allowed


@settings(max_examples=200, deadline=None)
@given(_structured())
def test_rule_of_ranges_is_the_very_mask(allowed):
    B, T, S = allowed.shape
    ranges = _ranges(allowed)
    if ranges is None:
        return
    rule = rule_of_ranges(ranges, T, S, B)
    if rule is not None:
        assert torch.equal(_materialized(rule, B, T, S), allowed)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rule_of_ranges_of_random_ranges_is_exact(data):
    B, T, S = data.draw(_SIZES)
    ends = st.tuples(st.integers(0, S), st.integers(0, S)).map(sorted)
    rows = data.draw(st.lists(ends, min_size=B * T, max_size=B * T))
    ranges = torch.tensor([row if row[0] < row[1] else [0, 0] for row in rows]).view(B, T, 2)
    rule = rule_of_ranges(ranges, T, S, B)
    if rule is not None:
        keys = torch.arange(S)
        allowed = (keys >= ranges[..., :1]) & (keys < ranges[..., 1:])
        assert torch.equal(_materialized(rule, B, T, S), allowed)
