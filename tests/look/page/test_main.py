"""The whole page in a browser: its first view, hostile texts, narrow, in a notebook, long."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from polyhead.look.page import payload, render


def test_the_first_view_says_something(opened):
    assert opened.state()["layer"] == 1
    assert opened.state()["head"] == 0
    assert opened.page.inner_text("#head-title") == "Layer 1, head 0"
    assert "induction" in opened.page.inner_text("#about")
    assert opened.state()["token"] is not None
    assert opened.page.locator(".token.current").count() == 1


def test_first_view_of_induction_is_a_token_that_repeats(open_page, planted):
    """Not the strongest look of all: " slept" looks at " cat", and neither came before."""
    report = planted()
    layer = report.layers[1]
    weights = layer.map.clone()
    weights[0, 9] = 0.0
    weights[0, 9, 1] = 1.0
    report = replace(report, layers=(report.layers[0], replace(layer, map=weights)))
    opened = open_page(report)
    opened.until("polyhead.selection().token !== null")
    assert "induction" in opened.page.inner_text("#about")
    token = opened.state()["token"]
    before = report.tokens[:token]
    assert report.tokens[token] in before
    follows = report.tokens[before.index(report.tokens[token]) + 1]
    assert f"looks at {follows.strip()} " in opened.page.inner_text("#reading")


def test_another_report_in_the_same_page(opened, planted):
    page = opened.page
    opened.tile(2).click()
    page.evaluate("(data) => polyhead.show(data)", payload(planted(repeats=2)))
    assert page.locator(".token").count() == 24
    state = opened.state()
    assert [state["layer"], state["head"]] == [0, 2]
    assert page.inner_text("#lead").startswith("Planted read 24 tokens with 6 attention heads.")
    assert opened.drawn(0).shape == (24, 24, 3)


def test_a_hostile_text_runs_nothing(open_page, planted, hostile):
    """`open_page` fails on any complaint or request."""
    report = planted(hostile * 2)
    opened = open_page(report, "#layer=0&head=0&token=3&with=</script><script>")
    page = opened.page
    for at in range(len(hostile)):
        page.locator(f'.token[data-token="{at}"]').hover()
        page.locator("#reading", has_text=f"({at})").wait_for()
    for place in range(6):
        page.locator(f'.tile[data-place="{place}"]').click()
    page.get_by_label("Zoom in").click()
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('#text *:not(span):not(div)').length") == 0
    texts = page.evaluate("[...document.querySelectorAll('.token')].map((e) => e.textContent)")
    assert texts[:4] == hostile[:4]
    assert texts[6:10] == hostile[6:10]


def test_what_the_policy_forbids(open_page, planted):
    """A script or a request that got in all the same is stopped."""
    opened = open_page(planted())
    opened.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked=2'>");
            return fetch("https://example.com").catch(() => null);
        }"""
    )
    opened.page.wait_for_timeout(50)
    assert opened.page.evaluate("window.hacked") is None
    assert len(opened.complaints) >= 3
    assert all("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.complaints.clear()
    opened.requests.clear()


def test_a_narrow_screen(open_page, planted):
    opened = open_page(planted(), viewport={"width": 360, "height": 740})
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator('.tile[data-place="1"]').click()
    opened.until("Math.abs(document.getElementById('head').getBoundingClientRect().top) < 60")
    assert page.locator("canvas.map").bounding_box()["width"] > 250
    page.get_by_role("button", name="Compare").click()
    page.locator('.tile[data-place="2"]').click()
    opened.until("document.querySelectorAll('canvas.map').length == 2")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.get_by_role("button", name="All heads").click()
    assert page.evaluate("Number(document.activeElement.dataset.place)") == 2


def test_in_a_notebook(browser, planted, tmp_path):
    """A frame without an origin has no storage and no address; the page does without."""
    (tmp_path / "notebook.html").write_text(
        f"<!doctype html><meta charset=utf-8>{planted()._repr_html_()}", encoding="utf-8"
    )
    context = browser.new_context(viewport={"width": 1100, "height": 950})
    page = context.new_page()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "notebook.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("canvas.map").wait_for()
    frame.locator('.tile[data-place="1"]').click()
    frame.get_by_text("Layer 0, head 1").first.wait_for()
    context.close()
    assert complaints == []


def test_under_five_megabytes_for_270_heads(open_page, large):
    document = render(large(600))  # more than fits
    assert 3_500_000 < len(document.encode()) < 5_000_000
    page = open_page(document).page
    page.locator(".tile canvas[data-drawn]").first.wait_for(state="attached")
    assert page.locator(".tile").count() == 270


@pytest.mark.slow
def test_eight_thousand_tokens(open_page, large):
    report = large(8000)
    document = render(report)
    assert len(document.encode()) < 5_000_000
    data = payload(report)
    opened = open_page(document)
    page = opened.page
    assert page.locator(".token").count() == 8000
    assert json.dumps(data["keys"]["least"]) != "0.0"
    page.get_by_text("What the names and numbers mean").click()
    assert "Weaker ones had no room" in page.inner_text("#held")
    # Hovering makes no element; what is tinted is in sight.
    count = page.evaluate("document.querySelectorAll('*').length")
    page.locator('.token[data-token="5"]').scroll_into_view_if_needed()
    page.locator('.token[data-token="0"]').hover()
    page.locator("#reading", has_text="(0)").wait_for()
    grown = page.evaluate("document.querySelectorAll('*').length") - count
    assert grown < 50
    tinted = page.evaluate(
        "[...document.querySelectorAll('.token')].filter((e) => e.style.background).length"
    )
    assert 0 < tinted < 2000
    # A link into the middle brings that token in sight.
    page.evaluate("location.hash = '#layer=3&head=1&token=4000'")
    opened.until("polyhead.selection().token == 4000")
    page.locator('.token[data-token="4000"]').focus()
    page.keyboard.press("ArrowRight")
    box = page.locator('.token[data-token="4001"]').bounding_box()
    text = page.locator("#text").bounding_box()
    assert text["y"] <= box["y"] <= text["y"] + text["height"]


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (320, "light"),
        (1280, "dark"),
        pytest.param(320, "dark", marks=pytest.mark.slow),
        pytest.param(1280, "light", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing(open_page, planted, axe, scheme, width):
    opened = open_page(planted(), color_scheme=scheme, viewport={"width": width, "height": 900})
    page = opened.page
    assert axe(page) == []
    for mode in ("to", "from", "both"):
        page.locator(f'#modes input[value="{mode}"]').check()
        opened.token(7).click()
        assert axe(page) == [], mode
    page.select_option("#color", index=3)
    assert axe(page) == []
    page.click("#compare")
    opened.tile(2).click()
    page.locator("details").evaluate("(element) => { element.open = true }")
    assert axe(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_token_can_be_read_on_its_strongest_tint(open_page, planted, scheme):
    opened = open_page(planted(), color_scheme=scheme)
    script = """() => {
        const probe = document.querySelector("#text .token");
        return [0, 1].map((which) => {
            probe.style.background = polyhead.page.tint(which, 1);
            return [getComputedStyle(probe).backgroundColor, getComputedStyle(document.body).color,
                    getComputedStyle(document.querySelector("#text")).backgroundColor];
        });
    }"""

    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colors in opened.page.evaluate(script):
        tint, ink, sheet = ([float(n) for n in re.findall(r"[\d.]+", c)] for c in colors)
        shown = [(t * tint[3] + s * (1 - tint[3])) / 255 for t, s in zip(tint, sheet, strict=False)]
        pair = sorted([luminance(shown), luminance([c / 255 for c in ink[:3]])])
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5


def test_on_a_touch_screen_the_hint_is_of_touch(open_page, planted):
    opened = open_page(planted(), has_touch=True, is_mobile=True)
    opened.page.evaluate("polyhead.page.choose({ token: null })")
    opened.until("document.getElementById('reading').textContent.startsWith('Touch a token')")


def test_maps_that_were_never_scrolled_to_are_drawn(open_page, large):
    opened = open_page(large(20, layers=40, bins=20), viewport={"width": 900, "height": 300})
    opened.until("document.querySelectorAll('.tile canvas[data-drawn]').length === 360")
    assert opened.page.evaluate("scrollY") == 0


@pytest.mark.parametrize(("tokens", "short"), [(16, True), (17, False)])
def test_a_short_text_is_said_to_be_local(open_page, planted, tokens, short):
    lead = open_page(planted(["a"] * tokens)).page.inner_text("#lead")
    assert ("“local” is true of every head" in lead) == short
