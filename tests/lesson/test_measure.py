"""Gradients, products and times of the two."""

import torch

import polyhead as ph
from polyhead.lesson.measure import gradient_difference, products_and_times


def test_gradients_of_both_agree_and_a_changed_weight_shows():
    lesson = ph.lesson()
    stacked, split = lesson.stacked.requires_grad_(), lesson.split.requires_grad_()
    assert gradient_difference(stacked, split, lesson.x[None]) < 1e-12
    with torch.no_grad():
        split.W_key.weight[0, 0] += 0.1
    assert gradient_difference(stacked, split, lesson.x[None]) > 1e-6


def test_products_are_five_per_head_and_five_for_all():
    state = torch.get_rng_state()
    measured = products_and_times()
    assert measured["products"] == {"stacked": 5 * measured["heads"], "split": 5}
    assert all(took > 0.0 for took in measured["milliseconds"].values())
    assert torch.equal(torch.get_rng_state(), state)
