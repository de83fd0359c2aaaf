"""The page on paper: printed to a PDF, and with what its scripts do before that."""

from __future__ import annotations

import pytest


@pytest.fixture
def on_paper():
    """`on_paper(opened)`: as while it is printed; the screen is back after the test."""
    printed = []

    def show(opened):
        printed.append(opened.page)
        opened.page.emulate_media(media="print")
        opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")

    yield show
    for page in printed:
        page.emulate_media(media="screen")


def printing(opened, inside):
    """Evaluate JavaScript while the page is being printed."""
    script = f"""new Promise((resolve) => {{
        const look = () => resolve({inside});
        addEventListener("beforeprint", look, {{ once: true }});
    }})"""
    opened.page.evaluate(f"window.found = {script}; null")
    opened.page.pdf()
    return opened.page.evaluate("window.found")


def test_print_draws_maps_that_were_never_scrolled_to(open_page, large):
    """Idle time draws them one by one; a print draws the rest at once."""
    opened = open_page(large(20, layers=40, bins=20), viewport={"width": 900, "height": 300})
    opened.page.evaluate("Promise.all(polyhead.data.heads.map((_, at) => polyhead.page.mapOf(at)))")
    opened.page.evaluate("""() => {
        polyhead.page.thumbs([...document.querySelectorAll(".tile canvas")]);
        dispatchEvent(new Event("beforeprint"));
    }""")
    drawn = "document.querySelectorAll('.tile canvas[data-drawn]').length"
    assert opened.page.evaluate(drawn) == 360
    assert opened.page.inner_text("#undrawn", timeout=500) == ""


def test_print_before_maps_are_inflated_counts_them(opened):
    """They cannot be waited for, so the paper has their number."""
    opened.page.evaluate(
        "polyhead.show({ ...polyhead.data }); dispatchEvent(new Event('beforeprint'))"
    )
    assert opened.page.text_content("#undrawn").startswith("6 of 6 maps are not drawn yet")


@pytest.mark.parametrize("theme", ["system", "chosen"])
def test_print_is_light_and_the_screen_dark_again(open_page, planted, on_paper, theme):
    opened = open_page(planted(), color_scheme="dark" if theme == "system" else "light")
    if theme == "chosen":
        opened.page.get_by_role("button", name="Dark colors").click()
    opened.drawn(1)
    assert opened.drawn(1)[0, -1].max() < 60
    on_paper(opened)
    assert opened.page.locator('.tile[data-place="1"] canvas[data-drawn]').count() == 1
    assert opened.drawn(1)[0, -1].min() == 255
    ink = opened.page.evaluate("getComputedStyle(document.querySelector('.token')).color")
    assert max(map(int, ink[4:-1].split(", "))) < 100
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    opened.page.emulate_media(media="screen")
    assert opened.drawn(1)[0, -1].max() < 60


def test_print_to_pdf_draws_every_map(opened):
    """A browser's own printing sends the event."""
    assert printing(opened, "polyhead.page.paper === true") is True
    assert opened.page.evaluate("polyhead.page.paper") is False


@pytest.mark.slow
def test_print_cuts_neither_text_nor_head(open_page, planted, on_paper):
    opened = open_page(planted(repeats=60), "#layer=1&head=0&token=700")
    opened.page.evaluate("polyhead.page.drawn")
    page = opened.page
    on_paper(opened)
    for name in ("#head", "#text", "#grid"):
        box = page.locator(name)
        style = box.evaluate(
            "(box) => [getComputedStyle(box).overflowY, getComputedStyle(box).maxHeight]"
        )
        assert style == ["visible", "none"], name
    looks = """async () => {
        const looks = await polyhead.page.looksOf(polyhead.page.state.head);
        return new Set([...looks.to(700), ...looks.from(700)].map(([at]) => at)).size;
    }"""
    tinted = page.locator(".token.tinted").count()
    assert tinted == page.evaluate(looks)  # wherever in the text they are
    assert tinted >= 8
    exact = "(part) => getComputedStyle(part).printColorAdjust"
    for part in (".tile", ".token", ".picture", ".swatch"):
        assert page.locator(part).first.evaluate(exact) == "exact"


def test_forced_colors_keep_data_and_marks(open_page, planted):
    """What means something by its color keeps it; what is chosen has more than a color."""
    opened = open_page(planted(), "#layer=1&head=0&token=90&with=0.0", forced_colors="active")
    page = opened.page
    page.evaluate("polyhead.page.drawn")
    swatches = page.locator(".swatch")
    colors = {
        swatches.nth(n).evaluate("(s) => getComputedStyle(s).backgroundColor") for n in range(4)
    }
    assert len(colors) == 4
    names = page.locator("#about b[style]")
    assert len({names.nth(n).evaluate("(b) => getComputedStyle(b).color") for n in range(2)}) == 2
    chosen = page.locator('.tile[aria-selected="true"]').first
    assert chosen.evaluate("(tile) => getComputedStyle(tile).boxShadow") != "none"
    pressed = page.locator('#compare[aria-pressed="true"]')
    assert pressed.evaluate("(b) => getComputedStyle(b).borderTopWidth") == "3px"


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_forced_colors_win_over_the_chosen_theme(open_page, planted, scheme, dark):
    """A page remembered as dark must not write light words on a light background."""
    opened = open_page(planted(), forced_colors="active", color_scheme=scheme)
    other = "light" if dark else "dark"
    opened.page.evaluate(f"localStorage.setItem('polyhead-theme', '{other}')")
    opened.page.reload()
    opened.page.wait_for_selector("canvas.map")
    assert opened.page.evaluate("polyhead.page.theme()") == scheme
    assert not opened.page.locator("#theme").is_visible()
    sheet = opened.drawn(1)[0, -1].float().mean()
    assert (sheet < 60) == dark
    ink = opened.page.evaluate("getComputedStyle(document.querySelector('.token')).color")
    light = min(map(int, ink[4:-1].split(", ")))
    assert light > 200 if dark else light < 60
