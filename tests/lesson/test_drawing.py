"""A step's numbers as a picture."""

from xml.etree import ElementTree

import pytest
import torch

from polyhead.lesson.drawing import draw


@pytest.mark.parametrize(
    ("shape", "heads", "colors"),
    [((2, 3, 4), 2, 2), ((3, 4), 2, 2), ((3, 4), 4, 4), ((3, 3), 2, 0), ((1, 1, 1), 1, 1)],
)
def test_cells_have_the_colors_of_their_heads(shape, heads, colors):
    numbers = torch.rand(shape) + 0.5
    root = ElementTree.fromstring(draw("title & all", numbers, ["a", "b", "c"], heads))
    fills = {rect.get("fill") for rect in root.iter("{http://www.w3.org/2000/svg}rect")}
    assert len(fills) == colors + 1
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "title & all"
    assert all(f"{number:.3f}" in texts for number in numbers.flatten().tolist())


def test_zeros_and_masked_scores_have_no_color():
    root = ElementTree.fromstring(draw("t", torch.tensor([[0.0, -torch.inf]]), ["a"], 1))
    assert len([*root.iter("{http://www.w3.org/2000/svg}rect")]) == 1
