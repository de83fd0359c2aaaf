"""The maps of the chosen heads, in a browser."""

from __future__ import annotations

import torch


def test_the_large_map(opened, planted):
    page = opened.page
    opened.tile(0).click()
    page.wait_for_selector('canvas.map[aria-label*="Layer 0, head 0"]')
    shown = opened.pixels(page.locator("canvas.map"))[..., :3].float().sum(dim=-1)
    assert shown.unique().numel() > 20
    canvas = page.locator("canvas.map")
    before = opened.pixels(canvas)
    page.get_by_label("Zoom in").click()
    assert not torch.equal(opened.pixels(canvas), before)
    page.get_by_label("All of the map").click()
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


def test_two_heads_side_by_side(opened):
    page = opened.page
    page.get_by_role("button", name="Compare").click()
    opened.tile(1).click()
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
