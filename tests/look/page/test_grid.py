"""The grid of heads, in a browser."""

from __future__ import annotations

import itertools
import re

import torch.nn.functional as F


def frame(opened, place):
    return opened.tile(place).evaluate("(e) => getComputedStyle(e).backgroundColor")


def test_each_tile_shows_its_map(opened, planted):
    """Where a planted head has its weight, its thumbnail is darkest, and nothing above."""
    weights = [w for layer in planted().layers for w in layer.weights]
    for place, head in enumerate(weights):
        shown = 255 * 3 - opened.drawn(place).sum(dim=-1)
        # A pixel for two tokens either way, as strong as the strongest of its four weights.
        strongest = F.max_pool2d(head[None, None], 2)[0, 0]
        assert shown.shape == strongest.shape
        assert shown.triu(1).max() == 0
        assert shown.max() > 600
        order = strongest.flatten().sort(descending=True).indices
        assert (shown.flatten()[order].diff() <= 0).all()


def test_a_click_chooses(opened, planted):
    page = opened.page
    page.evaluate(
        "addEventListener('polyhead:select', (e) => (window.told = e.detail), true);"
        "document.addEventListener('polyhead:select', (e) => (window.told = e.detail))"
    )
    opened.tile(1).click()
    assert page.inner_text("#head-title") == "Layer 0, head 1"
    assert page.evaluate("window.told.layer === 0 && window.told.head === 1")
    assert opened.tile(1).get_attribute("aria-selected") == "true"
    assert page.locator('.tile[aria-selected="true"]').count() == 1
    share = planted().layers[0].stats["mass_first"][1].item()
    row = page.locator("#numbers tr", has=page.get_by_text("first token", exact=True))
    assert f"{100 * share:.0f} %" in row.inner_text()
    assert f"{100 * share:.0f} %" in page.inner_text("#about")


def test_frames_in_the_colors_of_a_number(opened):
    page = opened.page
    kinds = [frame(opened, place) for place in range(6)]
    assert kinds[1] == kinds[5]  # both sinks
    assert len(set(kinds)) == 5
    page.select_option("#color", "mass_first")
    opened.until(
        f"getComputedStyle(document.querySelector('.tile')).backgroundColor != '{kinds[0]}'"
    )
    light = {place: sum(map(int, frame(opened, place)[4:-1].split(","))) for place in range(6)}
    numbers = page.evaluate("polyhead.data.numbers.mass_first")
    for one, other in itertools.permutations(range(6), 2):
        assert numbers[one] <= numbers[other] or light[one] <= light[other]
    assert max(light.values()) > 2 * min(light.values())
    assert page.inner_text("#scale-says") == "Weight on the first token of the text."
    page.get_by_role("button", name="Color by entropy").click()
    assert page.input_value("#color") == "entropy"


def test_sorted_and_filtered(opened):
    page = opened.page
    places = "[...document.querySelectorAll('.tile')].map((tile) => Number(tile.dataset.place))"
    page.select_option("#order", "mass_first")
    numbers = page.evaluate("polyhead.data.numbers.mass_first")
    assert page.evaluate(places) == sorted(range(6), key=lambda place: -numbers[place])
    page.get_by_role("checkbox", name=re.compile("^sink")).uncheck()
    assert page.evaluate(places) == sorted([0, 2, 3, 4], key=lambda place: -numbers[place])
    assert page.inner_text("#found") == "4 of 6 heads"
    page.select_option("#order", "layer")
    assert page.evaluate(places) == list(range(6))
    dim = "[...document.querySelectorAll('.tile.dim')].map((tile) => Number(tile.dataset.place))"
    assert page.evaluate(dim) == [1, 5]
    page.get_by_role("checkbox", name=re.compile("^sink")).check()
    assert page.evaluate(dim) == []


def test_arrow_keys(opened):
    page = opened.page
    assert page.locator('.tile[tabindex="0"]').count() == 1
    opened.tile(3).focus()
    for key, head in [
        ("ArrowRight", [1, 1]),
        ("ArrowUp", [0, 1]),
        ("ArrowUp", [0, 1]),
        ("End", [0, 2]),
        ("ArrowRight", [0, 2]),
        ("Home", [0, 0]),
        ("PageDown", [1, 0]),
    ]:
        page.keyboard.press(key)
        state = opened.state()
        assert [state["layer"], state["head"]] == head, key
        focused = page.evaluate("Number(document.activeElement.dataset.place)")
        assert focused == 3 * head[0] + head[1]
    assert page.locator('.tile[tabindex="0"]').count() == 1
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.classList.contains('token')")
    page.keyboard.press("Escape")  # no token
    assert opened.state()["token"] is None
    page.keyboard.press("Escape")  # back
    assert page.evaluate("Number(document.activeElement.dataset.place)") == 3


def test_names_for_those_who_hear_the_page(opened, planted):
    page = opened.page
    grid = page.get_by_role("grid")
    assert grid.get_by_role("row").count() == 3
    assert grid.get_by_role("columnheader").count() == 4
    share = planted().layers[0].stats["mass_first"][1].item()
    label = opened.tile(1).get_attribute("aria-label")
    assert label.startswith("Layer 0, head 1, sink. ")
    assert f"{100 * share:.0f} %" in label
    assert page.locator("#reading").get_attribute("aria-live") == "polite"
    unnamed = page.evaluate(
        """[...document.querySelectorAll(
            "button, select, input, [role=img], [role=grid], [role=listbox]")]
        .filter((e) => !(e.textContent.trim() || e.getAttribute("aria-label") || e.closest("label")
            || e.getAttribute("aria-labelledby"))).length"""
    )
    assert unnamed == 0
