"""Exercises: right answers are taken, wrong ones get their reason."""

from __future__ import annotations

import pytest

import polyhead as ph


def answer(opened, step, **given):
    opened.go(step)
    form = opened.page.locator(f'[data-exercise="{step}"]')
    for name, value in given.items():
        field = form.locator(f'[name="{name}"]')
        if isinstance(value, list):
            for box in field.all():
                box.set_checked(int(box.get_attribute("value")) in value)
        elif field.first.get_attribute("type") == "radio":
            form.locator(f'[name="{name}"][value="{value}"]').check()
        else:
            field.fill(value)
    form.get_by_role("button", name="Check").click()
    return form.locator(".answer").inner_text()


WEIGHT = ph.lesson().traces[0]
RIGHT = [
    (1, {"answer": "1"}),
    (3, {"answer": "transpose"}),
    (5, {"answer": "scale,mask,softmax"}),
    (5, {"answer": "mask,scale,softmax"}),
    (6, {"answer": f"{WEIGHT.weights[0, 0, 1, 0].item():.3f}"}),
    (9, {"without": [0, 1], "with": [0, 1, 2, 3]}),
    (10, {"twelve": "2,360,064", "one": "2360064"}),
]
WRONG = [
    (1, {"answer": "2"}, "2 heads of d_out = 2 give 2 × 2 = 4 numbers"),
    (1, {"answer": ""}, "whole number"),
    (3, {"answer": "view"}, "20 of 24 numbers are in the wrong place: it cuts the strip"),
    (3, {"answer": "permute"}, "deals the features out"),
    (3, {}, "Choose one"),
    (5, {"answer": "scale,softmax,mask"}, "a row sums to 0."),
    (5, {"answer": "softmax,scale,mask"}, "a row sums to"),
    (6, {"answer": "0.9"}, "Not within 0.0005"),
    (6, {"answer": f"{WEIGHT.scores[0, 0, 1, 0].item():.3f}"}, "That is the score"),
    (6, {"answer": f"{WEIGHT.masked[0, 0, 1, 0].item():.3f}"}, "the softmax of its row is missing"),
    (6, {"answer": "0"}, "rows are queries"),
    (6, {"answer": f"{WEIGHT.weights[0, 0, 1, 1].item():.3f}"}, "weight on itself"),
    (6, {"answer": "a"}, "A number"),
    (9, {"without": [2, 3], "with": [0, 1, 2, 3]}, "column 0 belongs to head 0, and changes"),
    (9, {"without": [0, 1], "with": [0, 1]}, "column 2 has a part of every head, and changes"),
    (10, {"twelve": "1769472", "one": "1"}, "out_proj has weights, too"),
    (10, {"twelve": "2359296", "one": "1"}, "out_proj has a bias"),
    (10, {"twelve": "2360064", "one": "196672"}, "nowhere in the shapes"),
    (10, {"twelve": "", "one": ""}, "Two whole numbers"),
]


@pytest.mark.parametrize(("step", "given"), RIGHT)
def test_a_right_answer_is_taken(opened, step, given):
    assert answer(opened, step, **given).startswith("Yes. ")


@pytest.mark.parametrize(("step", "given", "reason"), WRONG)
def test_a_wrong_answer_gets_its_reason(opened, step, given, reason):
    said = answer(opened, step, **given)
    assert not said.startswith("Yes")
    assert reason in said


def test_parameters_are_those_of_the_modules():
    for heads in (1, 12):
        mha = ph.MultiHeadAttention(768, 768, 1024, 0.0, num_heads=heads, device="meta")
        assert sum(p.numel() for p in mha.parameters()) == 2_360_064


def test_answers_follow_the_numbers_that_were_typed(opened):
    opened.page.locator('[data-edit="x,0,0"]').fill("3")
    assert not answer(opened, 6, **RIGHT[4][1]).startswith("Yes")
    weight = opened.now()["left"]["weights"][0][1][0]
    assert answer(opened, 6, answer=f"{weight:.3f}").startswith("Yes")


def test_no_answer_is_stored(opened):
    answer(opened, 1, answer="1")
    stored = (
        "[document.cookie, Object.keys(localStorage).length, Object.keys(sessionStorage).length]"
    )
    assert opened.page.evaluate(stored) == ["", 0, 0]
