"""Dropout by the C++ kernels' own generator: its share, its seed, its gradient."""

from __future__ import annotations

import math

import pytest
import torch

import polyhead as ph

pytestmark = pytest.mark.usefixtures("kernels")


def test_dropout_drops_its_share_and_repeats_with_the_seed(tensors, isa):
    """Values are unit vectors, so that the output is the weights that were kept."""
    query, key, _ = tensors(B=20, H=4, G=2, T=50, S=64)
    value = torch.eye(64).expand(20, 2, 64, 64)
    whole = ph.attention(query, key, value, backend="cpu")

    def dropped(seed):
        torch.manual_seed(seed)
        return ph.attention(query, key, value, dropout=0.25, backend="cpu")

    kept = dropped(0)
    assert torch.equal(kept, dropped(0))
    assert not torch.equal(kept, dropped(1))
    is_dropped = kept == 0
    torch.testing.assert_close(kept, torch.where(is_dropped, 0.0, whole / 0.75))
    share = is_dropped.double()
    bound = 5 * math.sqrt(0.25 * 0.75)
    assert share.mean().item() == pytest.approx(0.25, abs=bound / math.sqrt(share.numel()))
    # No key, query or head is dropped more often than chance has it.
    for axes in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        mean = share.mean(dim=axes)
        assert (mean - 0.25).abs().max() < bound / math.sqrt(share.numel() / mean.numel())
    # Neighbours are dropped independently.
    pairs = share[..., 1:] * share[..., :-1]
    assert pairs.mean().item() == pytest.approx(0.0625, abs=5 / math.sqrt(pairs.numel()) / 4)


def test_dropout_drops_the_same_weights_in_backward(tensors):
    """The output is linear in values, so their gradient is the kept weights themselves."""
    query, key, _ = tensors(B=1, H=2, G=1, T=20, S=24)
    value = torch.eye(24).expand(1, 1, 24, 24).clone().requires_grad_()
    query.requires_grad_()
    torch.manual_seed(0)
    output = ph.attention(query, key, value, dropout=0.4, backend="cpu")
    grad = torch.autograd.grad(output[..., 3].sum(), value, retain_graph=True)[0]
    torch.testing.assert_close(grad[0, 0, :, 3], output.sum(dim=(1, 2))[0].detach())
    # d output / d query by hand, with the kept weights W: (W - P * (W . 1_column)) ...
    weights = torch.softmax(query @ key.mT * 24**-0.5, dim=-1)
    mask = (output.detach() != 0) / 0.6
    by_hand = torch.autograd.grad((weights * mask * torch.arange(24)).sum(), query)[0]
    got = torch.autograd.grad((output * torch.arange(24)).sum(), query)[0]
    torch.testing.assert_close(got, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [1 - 1e-9, 1 - 2**-50])
@pytest.mark.parametrize("T", [3, 100])
def test_a_dropout_that_float32_would_round_to_1_drops_and_divides_by_nothing(
    tensors, gradient, p, T
):
    inputs = [x.requires_grad_() for x in tensors(T=T, S=400)]
    output = ph.attention(*inputs, dropout=p, backend="cpu")
    assert bool(output.isfinite().all())
    assert bool(gradient(output, inputs).isfinite().all())


def test_what_little_dropout_keeps_grows_by_the_share_it_keeps(isa):
    T = S = 1000
    query, key, value = (torch.zeros(1, 1, n, 8) for n in (T, S, S))
    kept = ph.attention(query, key, value + 1, dropout=1 - 2**-9, backend="cpu")[0, 0, :, 0]
    torch.testing.assert_close(kept.unique()[1].item(), 2**9 / S)
    # 2^20 / 2^9 are kept on average, each of them 2^9.
    assert kept.mean().item() == pytest.approx(1.0, abs=5 * 2**-5.5)


def test_auto_leaves_small_dropout_to_the_seed_everybody_knows(tensors):
    """The lecture's code, the definition and auto drop the same weights of a small example."""
    small, large = tensors(T=6, S=6), tensors(T=64, S=64)
    outputs = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        outputs.append(ph.attention(*small, dropout=0.5, backend=backend))
    assert torch.equal(*outputs)
    assert ph.explain(*large, dropout=0.5).chosen == "cpu"
    assert ph.explain(*small, dropout=0.5).auto_skip["cpu"] == (
        "drops by its own generator; 432 weights are few enough to drop as F.dropout does for "
        "this seed",
    )
