"""The style of the page (lesson.css): on paper, and where the system forces its colors."""

from __future__ import annotations

import pytest


def styles(opened, selector, name):
    """Return the computed values of one property, one per element."""
    script = f"(parts) => parts.map((part) => getComputedStyle(part).{name})"
    return opened.page.locator(selector).evaluate_all(script)


@pytest.fixture
def on_paper(open_lesson):
    """`on_paper(step)`: a page in print media; the screen is back after the test."""
    printed = []

    def show(step):
        found = open_lesson(step=step, color_scheme="dark")
        found.page.emulate_media(media="print")
        printed.append(found.page)
        return found

    yield show
    for page in printed:
        page.emulate_media(media="screen")


@pytest.mark.parametrize("step", range(1, 11))
def test_print_is_light_with_the_colors_of_heads(on_paper, step):
    opened = on_paper(step)
    ink = styles(opened, "#title", "color")[0]
    assert max(map(int, ink[4:-1].split(", "))) < 60
    assert set(styles(opened, "td, .strip li, .bars i, .line", "printColorAdjust")) == {"exact"}
    for gone in ("#steps", ".turn", ".quiet"):
        assert not opened.page.locator(gone).is_visible()
    assert opened.page.locator("#gap").is_visible()
    assert styles(opened, "footer", "position") == ["static"]
    assert set(styles(opened, ".lane", "breakInside")) == {"avoid"}


def test_print_cuts_no_table(on_paper):
    """A4 with margins is about 700 px wide: what scrolls on a screen must fit on paper."""
    opened = on_paper(5)
    opened.page.set_viewport_size({"width": 700, "height": 990})
    fits = "(boxes) => boxes.every((box) => box.scrollWidth <= box.clientWidth + 1)"
    assert opened.page.locator(".scroll, .code").evaluate_all(fits)
    opened.page.set_viewport_size({"width": 1280, "height": 900})


def test_forced_colors_keep_heads_apart(open_lesson):
    opened = open_lesson(step=3, forced_colors="active")
    cells = dict.fromkeys(styles(opened, "#split ~ .figure .strip li", "backgroundColor"))
    assert len(cells) == 2
    assert len(set(styles(opened, "#split ~ .figure caption span", "color"))) == 2


def test_forced_colors_mark_with_more_than_a_color(open_lesson):
    opened = open_lesson(step=3, forced_colors="active")
    opened.press("Forget the transpose")
    opened.page.mouse.move(0, 0)
    for mark in ("[aria-current]", ".on", ".line.runs", ".switch", '[aria-selected="true"]'):
        assert set(styles(opened, mark, "outlineStyle")) == {"solid"}, mark
    assert styles(opened, ".verdict.bad", "textDecorationLine") == ["underline"]
    opened.press("Forget the transpose")
    assert styles(opened, ".switch", "outlineStyle") == ["none"] or opened.page.evaluate(
        "document.activeElement.matches('.switch')"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_forced_colors_axe_finds_nothing(open_lesson, axe, scheme):
    opened = open_lesson(forced_colors="active", color_scheme=scheme)
    for step in (1, 3, 6):
        opened.go(step)
        assert axe(opened.page) == []
