"""The grid and the chosen head, in a browser."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def opened(open_page, planted):
    """Six heads of two layers; the induction head is chosen, as nothing else is asked for."""
    return open_page(planted())


def tile(page, place):
    return page.locator(f'.tile[data-place="{place}"]')


def frame(page, place):
    return tile(page, place).evaluate("(e) => getComputedStyle(e).backgroundColor")


def drawn(opened, place):
    canvas = tile(opened.page, place).locator("canvas[data-drawn]")
    canvas.wait_for(state="attached")
    return opened.pixels(canvas)[..., :3].float()


def test_each_tile_shows_its_map(opened, planted):
    """Where a planted head has its weight, its thumbnail is darkest, and nothing above."""
    weights = [w for layer in planted().layers for w in layer.weights]
    for place, head in enumerate(weights):
        shown = 255 * 3 - drawn(opened, place).sum(dim=-1)
        # A pixel for two tokens either way, as strong as the strongest of its four weights.
        strongest = F.max_pool2d(head[None, None], 2)[0, 0]
        assert shown.shape == strongest.shape
        assert shown.triu(1).max() == 0
        assert shown.max() > 600
        order = strongest.flatten().sort(descending=True).indices
        assert (shown.flatten()[order].diff() <= 0).all()


def test_the_first_view_says_something(opened):
    assert opened.state()["layer"] == 1
    assert opened.state()["head"] == 0
    assert opened.page.inner_text("#head-title") == "Layer 1, head 0"
    assert "induction" in opened.page.inner_text("#about")
    assert opened.state()["token"] is not None
    assert opened.page.locator(".token.current").count() == 1


def test_a_click_chooses(opened, planted):
    page = opened.page
    page.evaluate(
        "addEventListener('polyhead:select', (e) => (window.told = e.detail), true);"
        "document.addEventListener('polyhead:select', (e) => (window.told = e.detail))"
    )
    tile(page, 1).click()
    assert page.inner_text("#head-title") == "Layer 0, head 1"
    assert page.evaluate("window.told.layer === 0 && window.told.head === 1")
    assert tile(page, 1).get_attribute("aria-selected") == "true"
    assert page.locator('.tile[aria-selected="true"]').count() == 1
    share = planted().layers[0].stats["mass_first"][1].item()
    row = page.locator("#numbers tr", has=page.get_by_text("first token", exact=True))
    assert f"{100 * share:.0f} %" in row.inner_text()
    assert f"{100 * share:.0f} %" in page.inner_text("#about")


def test_the_large_map(opened, planted):
    page = opened.page
    tile(page, 0).click()
    page.wait_for_selector('canvas.map[aria-label*="Layer 0, head 0"]')
    shown = opened.pixels(page.locator("canvas.map"))[..., :3].float().sum(dim=-1)
    assert shown.unique().numel() > 20
    canvas = page.locator("canvas.map")
    before = opened.pixels(canvas)
    page.get_by_label("Zoom in").click()
    assert not torch.equal(opened.pixels(canvas), before)
    page.get_by_label("The whole map").click()
    assert torch.equal(opened.pixels(canvas), before)
    canvas.focus()
    page.keyboard.press("+")
    zoomed = opened.pixels(canvas)
    page.keyboard.press("ArrowRight")
    assert not torch.equal(opened.pixels(canvas), zoomed)
    page.keyboard.press("0")
    assert torch.equal(opened.pixels(canvas), before)
    # Under the pointer: the weight of the previous token, 0.9 and its part of the rest.
    box = canvas.bounding_box()
    side = box["width"] - 72 - 2
    at = [box["x"] + 72 + 29.5 / 96 * side, box["y"] + 58 + 30.5 / 96 * side]
    page.mouse.move(*at)
    weight = planted().layers[0].weights[0, 30, 29].item()
    caption = page.locator("#maps figcaption")
    caption.get_by_text("(30) → ").wait_for()
    assert caption.inner_text().endswith(f"(29): {100 * weight:.0f} %")
    page.mouse.click(*at)
    assert opened.state()["token"] == 30


def test_frames_in_the_colours_of_a_number(opened):
    page = opened.page
    kinds = [frame(page, place) for place in range(6)]
    assert kinds[1] == kinds[5]  # both sinks
    assert len(set(kinds)) == 5
    page.select_option("#colour", "mass_first")
    opened.until(
        f"getComputedStyle(document.querySelector('.tile')).backgroundColor != '{kinds[0]}'"
    )
    light = {place: sum(map(int, frame(page, place)[4:-1].split(","))) for place in range(6)}
    numbers = page.evaluate("polyhead.data.numbers.mass_first")
    for one, other in itertools.permutations(range(6), 2):
        assert numbers[one] <= numbers[other] or light[one] <= light[other]
    assert max(light.values()) > 2 * min(light.values())
    assert page.inner_text("#scale-says") == "Weight on the first token of the text."
    page.get_by_role("button", name="Colour by entropy").click()
    assert page.input_value("#colour") == "entropy"


def test_sorted_and_filtered(opened):
    page = opened.page
    places = "[...document.querySelectorAll('.tile')].map((tile) => Number(tile.dataset.place))"
    page.select_option("#order", "mass_first")
    numbers = page.evaluate("polyhead.data.numbers.mass_first")
    assert page.evaluate(places) == sorted(range(6), key=lambda place: -numbers[place])
    page.get_by_role("checkbox", name="sink").uncheck()
    assert page.evaluate(places) == sorted([0, 2, 3, 4], key=lambda place: -numbers[place])
    assert page.inner_text("#found") == "4 of 6 heads"
    page.select_option("#order", "layer")
    assert page.evaluate(places) == list(range(6))
    dim = "[...document.querySelectorAll('.tile.dim')].map((tile) => Number(tile.dataset.place))"
    assert page.evaluate(dim) == [1, 5]
    page.get_by_role("checkbox", name="sink").check()
    assert page.evaluate(dim) == []


def test_arrow_keys(opened):
    page = opened.page
    assert page.locator('.tile[tabindex="0"]').count() == 1
    tile(page, 3).focus()
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


def test_two_heads_side_by_side(opened):
    page = opened.page
    page.get_by_role("button", name="Compare").click()
    tile(page, 1).click()
    opened.until("document.querySelectorAll('canvas.map').length == 2")
    assert opened.state()["other"] == {"layer": 0, "head": 1}
    assert page.inner_text("#head-title") == "1.0 beside 0.1"
    left, right = (opened.pixels(canvas) for canvas in page.locator("canvas.map").all())
    assert left.shape == right.shape
    assert not torch.equal(left, right)
    row = page.locator("#numbers tr", has=page.get_by_text("first token", exact=True))
    assert row.locator("td.value").count() == 2
    assert page.locator("#modes input").count() == 2
    page.get_by_role("button", name="Stop comparing").click()
    opened.until("document.querySelectorAll('canvas.map').length == 1")
    assert opened.state()["other"] is None


def test_names_for_those_who_hear_the_page(opened, planted):
    page = opened.page
    grid = page.get_by_role("grid")
    assert grid.get_by_role("row").count() == 3
    assert grid.get_by_role("columnheader").count() == 4
    share = planted().layers[0].stats["mass_first"][1].item()
    label = tile(page, 1).get_attribute("aria-label")
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


def test_another_report_in_the_same_page(opened, planted):
    from polyhead.look.page import payload

    page = opened.page
    tile(page, 2).click()
    page.evaluate("(data) => polyhead.show(data)", payload(planted(repeats=2)))
    assert page.locator(".token").count() == 24
    state = opened.state()
    assert [state["layer"], state["head"]] == [0, 2]
    assert page.inner_text("#lead").startswith("Planted read 24 tokens with 6 attention heads.")
    assert drawn(opened, 0).shape == (24, 24, 3)
