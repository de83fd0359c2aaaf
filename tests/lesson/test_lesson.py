"""`ph.lesson`: the lecture's numbers, other sizes, what it prints and refuses."""

from __future__ import annotations

import html
import re
from xml.etree import ElementTree

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, ShapeError


def test_the_stacked_lane_gives_the_lecture_s_digits():
    merged = ph.lesson().traces[0].merged[0]
    expected = torch.tensor([-0.451920, 0.221605, 0.477196, 0.106348], dtype=torch.float64)
    torch.testing.assert_close(merged[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4])
@pytest.mark.parametrize("d_out", [1, 4])
@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_both_lanes_are_one_function_at_every_size(num_heads, d_out, tokens):
    lesson = ph.lesson(torch.randn(tokens, 3), num_heads=num_heads, d_out=d_out, seed=5)
    assert 0.0 <= lesson.difference < 1e-12
    assert lesson.steps[5].stacked.shape == (1, num_heads, tokens, tokens)
    assert [step.number for step in lesson.steps] == list(range(1, 11))
    torch.testing.assert_close(lesson.traces[0].output, lesson.stacked(lesson.x[None]))
    torch.testing.assert_close(lesson.traces[1].output, lesson.split(lesson.x[None]))


def test_a_difference_would_be_seen():
    lesson = ph.lesson()
    with torch.no_grad():
        lesson.split.W_value.weight[0, 0] += 0.5
    assert lesson.difference > 0.01
    assert [step.difference > 0.0 for step in lesson.steps] == 6 * [False] + 4 * [True]


def test_printing_shows_ten_steps_and_their_shapes():
    lines = str(ph.lesson()).splitlines()
    assert lines[0] == "Lesson(6 tokens of 3 features, 2 heads of 2, seed 123)" == repr(ph.lesson())
    assert len(lines) == 13
    assert re.match(r" 6 Softmax +\(1, 2, 6, 6\) +\(1, 2, 6, 6\) +\d\.\de", lines[7])
    assert lines[-1].startswith("largest difference of the two: ")


def test_torch_s_random_state_is_left_alone():
    before = torch.get_rng_state()
    ph.lesson(seed=9)._repr_html_()
    assert torch.equal(torch.get_rng_state(), before)


def test_where_frames_are_not_trusted_the_text_is_left():
    shown = ph.lesson()._repr_html_()
    cleaned = re.sub(r"<style>.*?</style>|<iframe.*</iframe>", "", shown, flags=re.S)
    assert html.unescape(re.sub(r"<[^>]*>", "", cleaned)) == str(ph.lesson())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must be an integer from 1 to 4; got 5"),
        ({"num_heads": True}, "num_heads must be an integer from 1 to 4; got True"),
        ({"d_out": 0}, "d_out must be an integer from 1 to 4; got 0"),
        ({"seed": -1}, r"seed must be an integer from 0 to 2\*\*32 - 1; got -1"),
        ({"seed": 2**32}, "seed must be an integer from 0"),
        ({"x": torch.zeros(13, 3)}, "x must have 1 to 12 tokens; got 13"),
        ({"x": torch.zeros(2, 5)}, "x must have 1 to 4 features; got 5"),
    ],
)
def test_what_a_page_cannot_show_is_refused(options, message):
    with pytest.raises((ShapeError, ArgumentError), match=message):
        ph.lesson(**options)


def test_to_html_writes_the_page(tmp_path):
    ph.lesson().to_html(tmp_path / "lesson.html")
    text = (tmp_path / "lesson.html").read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert '<meta name="generator" content="polyhead">' in text


@pytest.mark.parametrize("number", range(1, 11))
def test_step_without_its_picture_is_tables_of_all_numbers(number):
    """JupyterLab shows no SVG of a notebook that is not trusted, but its text."""
    step = ph.lesson().steps[number - 1]
    shown = step._repr_mimebundle_(include=None, exclude=None)
    assert shown["image/svg+xml"] == step._repr_svg_()
    text = shown["text/plain"]
    assert text == str(step)
    assert text.splitlines()[0].startswith(f"{number} {step.title} (largest difference ")
    printed = [float(value) for value in re.findall(r"-?(?:\d+\.\d{3}|inf)\b", text)]
    expected = step.split.flatten().tolist()
    assert printed == pytest.approx(expected, abs=6e-4)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("\njourney ") == (step.num_heads if step.split.ndim == 4 else 1)


def test_a_step_is_a_picture_and_a_line():
    step = ph.lesson(tokens=["<b>", "a", "b", "c", "d", "a long token"], x=ph.lesson().x).steps[4]
    assert repr(step) == "LessonStep(5, 'Scale, mask', (1, 2, 6, 6))"
    root = ElementTree.fromstring(step._repr_svg_())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("-inf") == 30
    assert f"{step.split[0, 1, 5, 0].item():.3f}" in texts
    assert "<b>" in texts
    assert "a long …" in texts
    cells = [*root.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(cells) == 1 + 2 * 21  # the paper, and what may be attended to
