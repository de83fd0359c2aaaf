"""The text under the chosen head, in a browser."""

from __future__ import annotations

import re

import pytest


def backgrounds(page):
    """{token: alpha of its background} of those that have one."""
    found = page.evaluate(
        """Object.fromEntries([...document.querySelectorAll(".token")]
            .filter((token) => token.style.background)
            .map((token) => [token.dataset.token, token.style.background]))"""
    )
    return {
        int(token): [float(alpha) for alpha in re.findall(r"rgba?\([^)]*?([\d.]+)\)", color)]
        for token, color in found.items()
    }


def tinted(page, least=0.3):
    return {at for at, alphas in backgrounds(page).items() if max(alphas) >= least}


@pytest.fixture
def opened(open_page, planted):
    return open_page(planted(), "#layer=0&head=0&token=20")


def read(page, words):
    page.locator("#reading", has_text=words).wait_for()
    return page.inner_text("#reading")


def test_hover_shows_where_it_looks_and_who_looks(opened):
    """The previous-token head: token 30 looks at 29, and 31 looks at it."""
    page = opened.page
    opened.token(30).hover()
    said = read(page, "(30)")
    assert tinted(page) == {29, 31}
    assert (
        "looks at “mat” (29) 90 %" in said.replace("looks at “sat”", "looks at “sat”")
        or "(29) 90 %" in said
    )
    assert "(31) 90 %" in said
    page.mouse.move(5, 5)
    assert read(page, "(20)")
    assert tinted(page) == {19, 21}
    assert opened.state()["token"] == 20


def test_one_way_or_the_other(opened):
    page = opened.page
    page.get_by_role("radio", name="where it looks", exact=True).check()
    assert tinted(page) == {19}
    page.get_by_role("radio", name="who looks at it", exact=True).check()
    assert tinted(page) == {21}


def test_strength(open_page, planted):
    """The local head has four keys of 0.225 each; the tint follows the root of the weight."""
    opened = open_page(planted(), "#layer=1&head=1&token=20")
    page = opened.page
    page.get_by_role("radio", name="where it looks", exact=True).check()
    shown = backgrounds(page)
    weights = planted().layers[1].weights[1, 20]
    for at in (17, 18, 19, 20, 3):
        assert shown[at][0] == pytest.approx(0.7 * weights[at].sqrt().item(), abs=0.01)


def test_keys_kept_of_a_long_text(open_page, planted):
    """With a pooled map, the same from the keys."""
    opened = open_page(planted(bins=8), "#layer=0&head=0&token=20")
    page = opened.page
    assert tinted(page) == {19, 21}
    opened.token(0).hover()
    read(page, "(0)")
    assert {0, 1} <= tinted(page)


def test_a_named_token_is_brought_in_sight(open_page, planted):
    opened = open_page(planted(repeats=20, bins=240), "#layer=0&head=1&token=230")
    page = opened.page
    text = page.locator("#text").bounding_box()
    assert opened.token(0).bounding_box()["y"] < text["y"]
    page.locator("#reading").get_by_role("button").first.click()
    box = opened.token(0).bounding_box()
    assert text["y"] <= box["y"] <= text["y"] + text["height"]


def test_stepping_through_the_text(opened):
    page = opened.page
    assert page.locator('.token[tabindex="0"]').count() == 1
    opened.token(20).focus()
    for key, at in [
        ("ArrowRight", 21),
        ("ArrowLeft", 20),
        ("End", 95),
        ("ArrowRight", 95),
        ("Home", 0),
    ]:
        page.keyboard.press(key)
        assert opened.state()["token"] == at, key
        assert page.evaluate("Number(document.activeElement.dataset.token)") == at
    assert read(page, "(0)")
    page.keyboard.press("ArrowDown")
    below = opened.state()["token"]
    top = [opened.token(at).bounding_box() for at in (0, below)]
    assert top[1]["y"] > top[0]["y"]
    assert abs(top[1]["x"] - top[0]["x"]) < 40
    page.keyboard.press("ArrowUp")
    assert opened.state()["token"] in range(3)


def test_two_heads_in_one_text(open_page, planted):
    """Compared, the halves of a background are the two heads': both look at token 0 from 1."""
    opened = open_page(planted(), "#layer=0&head=0&token=1&with=0.1")
    page = opened.page
    assert "gradient" in opened.token(0).evaluate("(e) => e.style.background")
    said = page.inner_text("#reading")
    assert "0.0 looks at the (0)" in said
    assert "0.1 looks at the (0)" in said


def test_blanks_can_be_seen(open_page, planted):
    words = ["a", " ", "\n", "\t", "", "  ", " b", ".\n\n", "\r\n"] * 3
    opened = open_page(planted(words))
    page = opened.page
    texts = page.evaluate(
        "[...document.querySelectorAll('.token')].slice(0, 9).map((token) => token.textContent)"
    )
    assert texts == ["a", "␣", "↵\n", "⇥", "∅", "␣␣", " b", ".↵\n↵\n", "␍↵\n"]
    assert opened.token(2).get_attribute("aria-label") == "newline"
    assert all(box["width"] > 2 for box in [opened.token(at).bounding_box() for at in range(9)])


def test_right_to_left(open_page, planted):
    """Each line in its own direction, and the arrow keys go where they point."""
    opened = open_page(planted(["plain", " text", "\n", "مرحبا ", "بالعالم ", "الكبير "] * 3))
    page = opened.page
    boxes = [page.locator(f'.token[data-token="{at}"]').bounding_box() for at in (0, 3, 4)]
    text = page.locator("#text").bounding_box()
    assert boxes[0]["x"] < text["x"] + 40
    assert boxes[1]["x"] + boxes[1]["width"] > text["x"] + text["width"] - 60
    assert boxes[2]["x"] < boxes[1]["x"]
    for start, key, end in [(4, "ArrowLeft", 5), (4, "ArrowRight", 3), (1, "ArrowLeft", 0)]:
        page.evaluate(f"polyhead.page.choose({{ token: {start} }}); polyhead.page.focusText()")
        page.keyboard.press(key)
        assert opened.state()["token"] == end, (start, key)
