"""Modes of laws: their own, restored afterwards."""

import contextlib

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.check import Outcome, check_module
from polyhead.check.law import Law
from polyhead.check.modes import own_modes


@contextlib.contextmanager
def switched(switch, on, off):
    switch(on)
    try:
        yield
    finally:
        switch(off)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "gradients off": lambda: switched(torch.set_grad_enabled, False, True),
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "meta": lambda: switched(torch.set_default_device, "meta", None),
}


class Usual(nn.Module):
    """Creates its mask in the default dtype, on the default device."""

    def __init__(self, embed_dim=24, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, embed_dim)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        T = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = torch.triu(torch.full((T, T), -torch.inf), diagonal=1)
        weights = (q @ k.mT / q.shape[-1] ** 0.5 + mask.to(q)).softmax(-1)
        return self.out((self.drop(weights) @ v).transpose(1, 2).flatten(2))


def ours():
    return ph.MultiHeadAttention(24, 24, context_length=16, dropout=0.1, num_heads=4)


LAWS = [
    "no_future_gradient",
    "past_is_used",
    "output_matches_reference",
    "gradients_match_reference",
    "autocast_agrees",
    "dtype_is_kept",
    "large_inputs_stay_finite",
    "gradient_reaches_every_parameter",
    "second_derivative_is_right_or_refused",
    "state_dict_round_trips",
    "dropout_is_unbiased",
]


@pytest.mark.parametrize("make", [Usual, ours])
@pytest.mark.parametrize("mode", MODES)
def test_check_is_independent_of_the_callers_mode(mode, make):
    torch.manual_seed(0)
    module = make().train()
    expected = check_module(module, only=LAWS)
    assert expected.ok, expected
    with MODES[mode]():
        report = check_module(module, only=LAWS)
        if mode == "no_grad":
            assert not torch.is_grad_enabled()
        if mode == "float64":
            assert torch.get_default_dtype() == torch.float64
        if mode == "deterministic":
            assert torch.are_deterministic_algorithms_enabled()
    outcomes, other = ([r.verdict.outcome for r in each.results] for each in (expected, report))
    assert outcomes == other, report
    assert module.training


def test_module_created_in_inference_mode_is_checked():
    with torch.inference_mode():
        module = Usual()
    report = check_module(module, only=LAWS)
    assert report.ok, report


def test_module_on_meta_is_refused_with_a_remedy():
    with torch.device("meta"):
        module = Usual()
    with pytest.raises(ph.errors.ArgumentError, match="must have values; got weights on meta"):
        check_module(module)


def test_law_that_changes_a_mode_does_not_leak_it():
    def law(subject):
        torch.set_grad_enabled(False)
        raise RuntimeError("stopped")

    assert Law("law", law).judge(None).outcome is Outcome.BROKEN
    assert torch.is_grad_enabled()


def test_own_modes_are_restored_after_an_exception():
    torch.set_default_dtype(torch.float64)
    try:
        seen = []
        with contextlib.suppress(ZeroDivisionError), own_modes():
            seen.append(torch.get_default_dtype())
            1 / 0  # noqa: B018
        assert seen == [torch.float32]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


class Inside(Usual):
    """Computes in another dtype internally."""

    def forward(self, x):
        T = x.shape[1]
        fused = self.qkv(x).to(self.dtype)
        q, k, v = fused.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2).to(x.dtype))


def test_internal_float32_breaks_no_law():
    module = type("Inside32", (Inside,), {"dtype": torch.float32})()
    assert check_module(module).ok


def test_internal_bfloat16_breaks_only_its_own_law():
    report = check_module(type("Inside16", (Inside,), {"dtype": torch.bfloat16})())
    assert [failure.law for failure in report.failures] == ["no_hidden_downcast"]


class OnlyFloat32(Usual):
    """Casts its input, so that it does not run in float64."""

    def forward(self, x):
        return super().forward(x.float())


def test_float32_only_module_agrees_under_autocast():
    report = check_module(OnlyFloat32(), only=["autocast_agrees"])
    assert report.ok, report
    assert report.facts["dtype"] == "float32: it does not run in float64"


class Refuses(Usual):
    def forward(self, x):
        if x.shape[0] == 3:
            raise ph.errors.ArgumentError("rows", "must be even", 3, "pass 2")
        return super().forward(x)


def test_call_that_polyhead_refuses_is_not_applicable():
    report = check_module(Refuses(), only=["batch_rows_are_independent"])
    verdict = report.results[0].verdict
    assert verdict.outcome is Outcome.NOT_APPLICABLE
    assert verdict.message == "polyhead refuses the call: rows must be even; got 3; pass 2"


def test_law_over_its_time_limit_is_not_judged(monkeypatch):
    monkeypatch.setattr("polyhead.check.law.SECONDS", 0.0)
    report = check_module(Usual(), only=["no_future_leak_in_long_texts", "batch_of_one_agrees"])
    assert {r.verdict.outcome for r in report.results} == {Outcome.NOT_APPLICABLE}
    assert "too slow for the time limit" in report.results[0].verdict.message
    assert report.exit_code == 0
