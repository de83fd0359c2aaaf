"""Uninitialized parameters are found, named, and filled the same for the same seed."""

import pytest
import torch
from torch import nn

from polyhead.check import check_module
from polyhead.check.probe.filled import filled, unfilled

MAKES = {
    "torch.empty": lambda: torch.empty(6, 6),
    "torch.Tensor": lambda: torch.Tensor(6, 6),
    "FloatTensor": lambda: torch.FloatTensor(6, 6),
    "empty_like": lambda: torch.empty_like(torch.zeros(6, 6)),
    "new_empty": lambda: torch.zeros(1).new_empty(6, 6),
}


class Mixed(nn.Module):
    def __init__(self, make, fill=False):
        super().__init__()
        self.mix = nn.Parameter(make())
        self.in_proj = nn.Linear(6, 6)
        if fill:
            nn.init.xavier_uniform_(self.mix)

    def forward(self, x):
        return self.in_proj(x) @ self.mix


@pytest.mark.parametrize("name", MAKES)
def test_unfilled_names_uninitialized_parameters(name):
    assert list(unfilled(lambda: Mixed(MAKES[name]), 0)) == ["mix"]
    assert list(unfilled(lambda: Mixed(MAKES[name], fill=True), 0)) == []
    assert not torch.are_deterministic_algorithms_enabled()


def test_filled_is_the_same_for_the_same_seed():
    module = Mixed(MAKES["torch.empty"])
    one, same, other = (filled(module, ["mix"], seed).mix for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.isfinite().all()


def test_check_names_uninitialized_parameters_and_repeats():
    make = lambda: Mixed(MAKES["torch.empty"])  # noqa: E731
    torch.manual_seed(0)
    module = make()
    reports = [check_module(module, make=make, seed=3) for _ in range(2)]
    for report in reports:
        failed = {failure.law: failure.verdict.message for failure in report.failures}
        assert failed["parameters_are_filled"].startswith("mix: created by torch.empty")
        assert report.diagnosis[0] == "uninitialized parameters: mix"
        assert report.facts["unfilled"] == "mix (the check fills them from its seed)"
    messages = [
        [(r.verdict.outcome, r.verdict.message) for r in report.results] for report in reports
    ]
    assert messages[0] == messages[1]


def test_unfilled_of_a_raising_constructor_is_empty():
    def make():
        raise RuntimeError("no")

    assert list(unfilled(make, 0)) == []
