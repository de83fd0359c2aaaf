"""Light and dark, and scales that all can read, in a browser."""

from __future__ import annotations

import pytest
import torch


def brightness(opened):
    paper = opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    canvas = opened.page.locator('.tile[data-place="1"] canvas[data-drawn]')
    canvas.wait_for(state="attached")
    pixels = opened.pixels(canvas)[..., :3].float().mean(dim=-1)
    sheet, sink = pixels[0, -1].item(), pixels[-1, 0].item()
    return sum(map(int, paper[4:-1].split(", "))) / 3, sheet, sink


def test_light_and_dark(open_page, planted):
    opened = open_page(planted(), color_scheme="dark")
    paper, sheet, sink = brightness(opened)
    assert paper < 40
    assert sheet < 40
    assert sink > 150
    opened.page.get_by_role("button", name="Light colors").click()
    paper, sheet, sink = brightness(opened)
    assert paper > 240
    assert sheet > 240
    assert sink < 90
    opened.page.reload()
    assert brightness(opened)[0] > 240  # remembered
    assert brightness(open_page(planted()))[0] > 240


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_scales_that_need_no_hue(open_page, planted, scheme):
    """From nothing to all, lightness goes one way, in steps that can be seen."""
    page = open_page(planted(), color_scheme=scheme).page
    ramp = torch.tensor(page.evaluate("Array.from(polyhead.page.ramp())")).view(256, 3) / 255
    linear = torch.where(ramp <= 0.04045, ramp / 12.92, ((ramp + 0.055) / 1.055) ** 2.4)
    luminance = linear @ torch.tensor([0.2126, 0.7152, 0.0722])
    lightness = 116 * luminance.clamp(min=0.009).pow(1 / 3) - 16
    steps = lightness[::32].diff() * (1 if scheme == "dark" else -1)
    assert (steps > 4).all()
